// The list of everything native. Each op has its formula in kernels/<op>.h, its CPU loops in
// cpu/<op>.cpp and its CUDA launches in cuda/<op>.cu.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_kronlik, m) {
  m.def("block_diag_sum(Tensor A, SymInt num_blocks) -> Tensor");
  m.def("block_diag_expand(Tensor S, SymInt num_blocks) -> Tensor");
  m.def(
      "kron_diag_sums(Tensor s, Tensor lam)"
      " -> (Tensor logdet, Tensor row_sum, Tensor col_sum_s, Tensor col_sum_1)");
  m.def("kron_diag_scale(Tensor s, Tensor lam, Tensor Y) -> (Tensor Z, Tensor inv_quad)");
  // What this build and machine have, for diagnostics.
  m.def("cpu_instruction_set() -> str");
  m.def("cuda_architectures() -> int[]");
  m.def("has_lapack() -> bool");
  m.def("pivoted_cholesky(Tensor M, SymInt max_rank) -> (Tensor F, Tensor rank)");
  m.def(
      "small_nll(Tensor Y, Tensor M, Tensor K, Tensor noise, bool full_noise, bool gradients)"
      " -> (Tensor nll, Tensor gY, Tensor gM, Tensor gK, Tensor gnoise, Tensor status)");
  m.def(
      "whiten_small(Tensor K, Tensor noise, bool full_noise)"
      " -> (Tensor lam, Tensor R, Tensor logdet_noise, Tensor status)");
  // On the CPU, where the process has LAPACK.
  m.def("shifted_cholesky(Tensor M, Tensor lam) -> (Tensor L, Tensor logdet, Tensor status)");
  m.def(
      "shifted_inverses(Tensor L, Tensor M, Tensor lam)"
      " -> (Tensor rows, Tensor with_M, Tensor plain)");
}
