#include "../kernels/block_diag_sum.h"
#include "../shapes.h"
#include "launch.h"

namespace torch_kronlik {
namespace {

// One thread for each entry of partial (batch, chunk, m, n).
template <typename T>
__global__ void sum_chunks(Blocks s, int64_t items, const T* __restrict__ a,
                           double* __restrict__ partial) {
  const int64_t item = thread_index();
  if (item >= items) return;
  const int64_t entries = s.m * s.n, chunks = s.chunks();
  const int64_t entry = item % entries, chunk = item / entries % chunks;
  const T* begin = a + s.batch.offset(item / entries / chunks) +
                   s.chunk_begin(chunk) * s.block_stride + entry / s.n * s.row_stride +
                   entry % s.n * s.col_stride;
  sum_tile(s, begin, s.chunk_size(chunk), 1, 1, 0, partial + item);
}

// One thread for each entry of the result adds its chunks in order.
template <typename T>
__global__ void add_chunks(Blocks s, int64_t items, const double* __restrict__ partial,
                           T* __restrict__ out, int64_t out_row_stride, int64_t out_col_stride) {
  const int64_t item = thread_index();
  if (item >= items) return;
  const int64_t entries = s.m * s.n, chunks = s.chunks();
  const int64_t entry = item % entries, b = item / entries;
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += partial[(b * chunks + c) * entries + entry];
  out[b * entries + entry / s.n * out_row_stride + entry % s.n * out_col_stride] =
      static_cast<T>(total);
}

Tensor block_diag_sum(const Tensor& A, int64_t num_blocks) {
  Blocks s = blocks_of(A, num_blocks);
  Tensor out = torch::stable::new_empty(A, concat(batch_sizes(A, 2), {s.m, s.n}));
  const OutStrides strides = run_along_contiguous(s);
  const Launcher launcher(A);
  const int64_t results = s.batch.count * s.m * s.n;
  Tensor partial = scratch(A, results * s.chunks());
  dispatch_floating(A, "block_diag_sum", [&](auto zero) {
    using T = decltype(zero);
    launcher.threads(results * s.chunks(), sum_chunks<T>, s, results * s.chunks(),
                     A.const_data_ptr<T>(), partial.mutable_data_ptr<double>());
    launcher.threads(results, add_chunks<T>, s, results, partial.const_data_ptr<double>(),
                     out.mutable_data_ptr<T>(), strides.row, strides.col);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) {
  m.impl("block_diag_sum", TORCH_BOX(&block_diag_sum));
}

}  // namespace
}  // namespace torch_kronlik
