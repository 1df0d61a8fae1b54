#pragma once

// Reads the sizes and strides of an op's tensors into what its kernel works with; the same on
// every device.

#include "checks.h"
#include "kernels/block_diag_sum.h"

namespace torch_kronlik {

inline Blocks blocks_of(const Tensor& A, int64_t num_blocks) {
  const char* op = "block_diag_sum";
  check_min_dim(A, 2, op);
  STD_TORCH_CHECK(num_blocks >= 1, op, ": num_blocks must be positive, got ", num_blocks);
  const int64_t rows = A.size(A.dim() - 2), cols = A.size(A.dim() - 1);
  STD_TORCH_CHECK(rows % num_blocks == 0 && cols % num_blocks == 0, op, ": ", rows, " x ", cols,
                  " is not made of ", num_blocks, " x ", num_blocks, " blocks");
  Blocks s;
  s.p = num_blocks;
  s.m = rows / num_blocks;
  s.n = cols / num_blocks;
  s.row_stride = A.stride(A.dim() - 2);
  s.col_stride = A.stride(A.dim() - 1);
  s.block_stride = s.m * s.row_stride + s.n * s.col_stride;
  s.batch = batch_layout(A, 2, batch_sizes(A, 2));
  return s;
}

}  // namespace torch_kronlik
