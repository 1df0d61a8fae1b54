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

// total[j] += the sum of `count` blocks' entries a[k * block_stride + j * stride], j < n.
template <int count, typename T>
KRON_HD void add_runs(const T* __restrict__ a, int64_t block_stride, int64_t stride, int64_t n,
                      double* __restrict__ total) {
  for (int64_t j = 0; j < n; ++j) {
    double sum = static_cast<double>(a[j * stride]);
    for (int k = 1; k < count; ++k) {
      sum += static_cast<double>(a[k * block_stride + j * stride]);
    }
    total[j] += sum;
  }
}

// total (rows, n) = the sum over one chunk of blocks of the tile that begins at a in its first
// block. Four blocks at a time: four streams of loads are in flight, and total is read and
// written a quarter as often. Rows inside: they are closer in memory than blocks.
template <typename T>
KRON_HD void sum_tile(const Blocks& s, const T* a, int64_t count, int64_t rows, int64_t n,
                      int64_t stride, double* total) {
  for (int64_t e = 0; e < rows * n; ++e) total[e] = 0;
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    for (int64_t i = 0; i < rows; ++i) {
      add_runs<4>(a + k * s.block_stride + i * s.row_stride, s.block_stride, stride, n,
                  total + i * n);
    }
  }
  for (; k < count; ++k) {
    for (int64_t i = 0; i < rows; ++i) {
      add_runs<1>(a + k * s.block_stride + i * s.row_stride, s.block_stride, stride, n,
                  total + i * n);
    }
  }
}

}  // namespace torch_kronlik
