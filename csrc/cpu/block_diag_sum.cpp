#include "../kernels/block_diag_sum.h"

#include <cstdlib>
#include <memory>
#include <utility>

#include "../shapes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

template <typename T>
KRON_CLONES void sum_blocks_unit(const T* a, int64_t block_stride, int64_t count, int64_t n,
                                 double* total) {
  sum_blocks(a, block_stride, count, 1, n, total);
}

template <typename T>
void sum_chunk_row(const Blocks& s, const T* a, int64_t chunk, int64_t i, double* total) {
  const T* begin = a + s.chunk_begin(chunk) * s.block_stride + i * s.row_stride;
  if (s.col_stride == 1) {
    sum_blocks_unit(begin, s.block_stride, s.chunk_size(chunk), s.n, total);
  } else {
    sum_blocks(begin, s.block_stride, s.chunk_size(chunk), s.col_stride, s.n, total);
  }
}

// Partial sums (batch, chunk, m, n), then their sum over chunks in order.
template <typename T>
void run(const Blocks& s, const T* a, T* out, int64_t out_row_stride, int64_t out_col_stride) {
  const int64_t chunks = s.chunks(), entries = s.m * s.n;
  std::unique_ptr<double[]> partial(new double[s.batch.count * chunks * entries]);
  parallel_items(s.batch.count * chunks * s.m, s.n * kBlocksPerChunk, [&](int64_t item) {
    const int64_t i = item % s.m, chunk = item / s.m % chunks, b = item / s.m / chunks;
    sum_chunk_row(s, a + s.batch.offset(b), chunk, i, partial.get() + item * s.n);
  });
  parallel_items(s.batch.count * s.m, s.n * chunks, [&](int64_t item) {
    const int64_t i = item % s.m, b = item / s.m;
    T* row = out + b * entries + i * out_row_stride;
    for (int64_t j = 0; j < s.n; ++j) {
      const double* p = partial.get() + b * chunks * entries + i * s.n + j;
      double total = 0;
      for (int64_t c = 0; c < chunks; ++c) total += p[c * entries];
      row[j * out_col_stride] = static_cast<T>(total);
    }
  });
}

Tensor block_diag_sum(const Tensor& A, int64_t num_blocks) {
  Blocks s = blocks_of(A, num_blocks);
  Tensor out = torch::stable::new_empty(A, concat(batch_sizes(A, 2), {s.m, s.n}));
  int64_t out_row_stride = s.n, out_col_stride = 1;
  // Run along the direction in which A is contiguous.
  if (std::abs(s.row_stride) < std::abs(s.col_stride)) {
    std::swap(s.m, s.n);
    std::swap(s.row_stride, s.col_stride);
    std::swap(out_row_stride, out_col_stride);
  }
  dispatch_floating(A, "block_diag_sum", [&](auto zero) {
    using T = decltype(zero);
    run(s, A.const_data_ptr<T>(), out.mutable_data_ptr<T>(), out_row_stride, out_col_stride);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  m.impl("block_diag_sum", TORCH_BOX(&block_diag_sum));
}

}  // namespace
}  // namespace torch_kronlik
