"""The README's table of supported transforms: each row is made again and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from transforms import cases, header, row

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- transforms -->", "<!-- /transforms -->"
CASES = cases()


@pytest.fixture(scope="module")
def lines() -> list[str]:
    text = README.read_text(encoding="utf-8")
    if START not in text or END not in text:
        pytest.fail(
            f"README.md has no table of transforms: put the output of tests/transforms.py between "
            f"{START} and {END}"
        )
    return text.split(START)[1].split(END)[0].strip().splitlines()


def test_the_table_has_the_transforms_and_functions_tried_here(lines: list[str]) -> None:
    rows = [line for line in lines if line.startswith("|")]
    assert rows[:2] == header()
    assert [line.split("`")[1] for line in rows[2:]] == list(CASES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("default")  # torch's own, of compile and export
def test_each_row_is_what_is_seen(name: str, lines: list[str]) -> None:
    expected = next((line for line in lines if line.startswith(f"| `{name}` |")), "no such row")
    assert row(name, CASES[name]) == expected
