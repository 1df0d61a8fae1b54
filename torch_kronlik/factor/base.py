"""What a route leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..records import Kind

__all__ = ["COMPLETE", "PARTIAL", "Factor"]

# The noise beside a factor: the same for all rows, where all entries are observed, or one for each.
COMPLETE = ("Diagonal", "Full")
PARTIAL = ("PerRow",)


if TYPE_CHECKING:
    Factor = Any  # which record stands in an open field, a checker cannot know
else:

    class Factor(Kind):
        """The factorised forms of U⁻¹ and log det U, one for each route: NamedTuples of tensors.

        Constants for differentiation. Each can ``solve``, has ``quad_logdet``, and the gradients of
        log det U with their derivatives (``logdet_gradient``, ``logdet_gradients``,
        ``logdet_hvp``). Those for complete data have further the members of
        :class:`.spectral.Spectral`, those for a noise of each row ``blocks``, ``explained``,
        ``explained_pairs`` and ``inverse``, as :class:`.capacitance.Capacitance`.
        """
