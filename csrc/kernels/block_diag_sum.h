#pragma once

// out[i, j] = Σ_k A[k m + i, k n + j], k < p: with the block stride m·row_stride + n·col_stride
// the blocks are one strided array a[k, i, j], and only their entries are read.

#include "../batch.h"

namespace torch_kronlik {

// The sum over blocks is taken in chunks of this many, and the chunks are added in order: the
// result does not depend on the number of threads, and rounding grows with p / 64 + 64, not p.
constexpr int64_t kBlocksPerChunk = 64;

struct Blocks {
  int64_t p, m, n;
  int64_t block_stride, row_stride, col_stride;
  BatchLayout batch;

  KRON_HD int64_t chunks() const { return (p + kBlocksPerChunk - 1) / kBlocksPerChunk; }
  KRON_HD int64_t chunk_begin(int64_t chunk) const { return chunk * kBlocksPerChunk; }
  KRON_HD int64_t chunk_size(int64_t chunk) const {
    const int64_t left = p - chunk_begin(chunk);
    return left < kBlocksPerChunk ? left : kBlocksPerChunk;
  }
};

// total[j] = Σ_k a[k * block_stride + j * stride] for j < n, k < count. Four blocks at a time:
// four streams of loads are in flight, and total is read and written a quarter as often.
template <typename T>
KRON_HD void sum_blocks(const T* a, int64_t block_stride, int64_t count, int64_t stride, int64_t n,
                        double* total) {
  for (int64_t j = 0; j < n; ++j) total[j] = 0;
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const T* a0 = a + k * block_stride;
    const T* a1 = a0 + block_stride;
    const T* a2 = a1 + block_stride;
    const T* a3 = a2 + block_stride;
    for (int64_t j = 0; j < n; ++j) {
      total[j] += (static_cast<double>(a0[j * stride]) + static_cast<double>(a1[j * stride])) +
                  (static_cast<double>(a2[j * stride]) + static_cast<double>(a3[j * stride]));
    }
  }
  for (; k < count; ++k) {
    const T* a0 = a + k * block_stride;
    for (int64_t j = 0; j < n; ++j) total[j] += static_cast<double>(a0[j * stride]);
  }
}

}  // namespace torch_kronlik
