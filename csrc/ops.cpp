// The list of everything native.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_kronlik, m) {
  m.def("block_diag_sum(Tensor A, SymInt num_blocks) -> Tensor");
}
