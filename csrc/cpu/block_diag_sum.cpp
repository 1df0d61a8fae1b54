#include "../kernels/block_diag_sum.h"

#include <algorithm>
#include <memory>

#include "../shapes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

// Partial sums of one tile stay in the first-level cache.
constexpr int64_t kTileEntries = 1024;

template <typename T>
KRON_CLONES void sum_tile_unit(const Blocks& s, const T* a, int64_t count, int64_t rows,
                               double* total) {
  sum_tile(s, a, count, rows, s.n, 1, total);
}

template <typename T>
void sum_tile_any(const Blocks& s, const T* a, int64_t count, int64_t rows, double* total) {
  sum_tile(s, a, count, rows, s.n, s.col_stride, total);
}

// Partial sums (batch, chunk, m, n), then their sum over chunks in order.
template <typename T>
void run(const Blocks& s, const T* a, T* out, OutStrides strides) {
  const int64_t chunks = s.chunks(), entries = s.m * s.n;
  if (s.batch.count * entries == 0) return;
  const int64_t tile_rows = std::clamp<int64_t>(kTileEntries / s.n, 1, s.m);
  const int64_t tiles = (s.m + tile_rows - 1) / tile_rows;
  const auto sum = s.col_stride == 1 ? sum_tile_unit<T> : sum_tile_any<T>;
  std::unique_ptr<double[]> partial(new double[s.batch.count * chunks * entries]);
  parallel_items(s.batch.count * chunks * tiles, tile_rows * s.n * kBlocksPerChunk, [&](int64_t q) {
    const int64_t i = q % tiles * tile_rows, chunk = q / tiles % chunks, b = q / tiles / chunks;
    const T* begin = a + s.batch.offset(b) + s.chunk_begin(chunk) * s.block_stride;
    sum(s, begin + i * s.row_stride, s.chunk_size(chunk), std::min(tile_rows, s.m - i),
        partial.get() + (b * chunks + chunk) * entries + i * s.n);
  });
  parallel_items(s.batch.count * s.m, s.n * chunks, [&](int64_t item) {
    const int64_t i = item % s.m, b = item / s.m;
    T* row = out + b * entries + i * strides.row;
    for (int64_t j = 0; j < s.n; ++j) {
      const double* p = partial.get() + b * chunks * entries + i * s.n + j;
      double total = 0;
      for (int64_t c = 0; c < chunks; ++c) total += p[c * entries];
      row[j * strides.col] = static_cast<T>(total);
    }
  });
}

Tensor block_diag_sum(const Tensor& A, int64_t num_blocks) {
  Blocks s = blocks_of(A, num_blocks);
  Tensor out = torch::stable::new_empty(A, concat(batch_sizes(A, 2), {s.m, s.n}));
  const OutStrides strides = run_along_contiguous(s);
  dispatch_floating(A, "block_diag_sum", [&](auto zero) {
    using T = decltype(zero);
    run(s, A.const_data_ptr<T>(), out.mutable_data_ptr<T>(), strides);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  m.impl("block_diag_sum", TORCH_BOX(&block_diag_sum));
}

}  // namespace
}  // namespace torch_kronlik
