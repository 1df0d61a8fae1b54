#include "../kernels/block_diag_sum.h"
#include "../shapes.h"
#include "parts.h"
#include "runs.h"

namespace torch_kronlik {
namespace {

// The sum of `kWidth` neighbouring entries over a part of the blocks is one thread's work. So many
// such sums keep every memory channel busy; where there are fewer, the blocks are cut into parts.
// A constant, so that results do not depend on the device.
constexpr int64_t kEnoughSums = 1 << 16;
constexpr int kLoads = 8;  // in flight at a time in each thread

struct Parts {
  int64_t bands;  // of kRows neighbouring rows
  int64_t runs;   // of kWidth entries in a row
  int64_t size;   // blocks in a part, a multiple of kLoads
  int64_t count;  // of parts
};

Parts parts_of(const Blocks& s, int width, int rows) {
  Parts q;
  q.bands = (s.m + rows - 1) / rows;
  q.runs = s.n / width;
  const int64_t sums = s.batch.count * s.m * q.runs;
  const int64_t loads = (s.p * sums + kEnoughSums * kLoads - 1) / (kEnoughSums * kLoads);
  q.size = kLoads * loads;
  q.count = (s.p + q.size - 1) / q.size;
  return q;
}

// total += the sum of kCount blocks, whose loads are all in flight at once.
template <int kCount, int kWidth, typename T>
__device__ __forceinline__ void add_blocks(const T* a, int64_t stride, double* total) {
  Run<T, kWidth> run[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) run[k] = load_run<kWidth>(a + k * stride);
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    double sum = static_cast<double>(run[0].x[v]);
#pragma unroll
    for (int k = 1; k < kCount; ++k) sum += static_cast<double>(run[k].x[v]);
    total[v] += sum;
  }
}

// total += the sum of `count` blocks, chunk by chunk.
template <int kWidth, typename T>
__device__ __forceinline__ void add_part(const T* a, int64_t stride, int64_t count, double* total) {
  while (count > 0) {
    double chunk[kWidth] = {};
    int left = static_cast<int>(count < kBlocksPerChunk ? count : kBlocksPerChunk);
    count -= left;
    for (; left >= kLoads; left -= kLoads, a += kLoads * stride) {
      add_blocks<kLoads, kWidth>(a, stride, chunk);
    }
    if (left & 4) add_blocks<4, kWidth>(a, stride, chunk), a += 4 * stride;
    if (left & 2) add_blocks<2, kWidth>(a, stride, chunk), a += 2 * stride;
    if (left & 1) add_blocks<1, kWidth>(a, stride, chunk);
#pragma unroll
    for (int v = 0; v < kWidth; ++v) total[v] += chunk[v];
  }
}

// to (batch, part, m, n) at these strides of the last two: one thread for each run and part.
// Where the result runs across memory, neighbouring threads take kRows rows, so that they write
// neighbouring entries too.
template <int kWidth, int kRows, typename T, typename Out>
__global__ void sum_parts(Blocks s, Parts q, const T* __restrict__ a, Out* __restrict__ to,
                          OutStrides strides) {
  const int64_t in_matrix = q.bands * q.runs * kRows, item = thread_index();
  const int64_t within = item % in_matrix, b_part = item / in_matrix;
  const int64_t b = b_part / q.count, part = b_part % q.count;
  const int64_t i = within / kRows / q.runs * kRows + within % kRows;
  const int64_t j = within / kRows % q.runs * kWidth;
  if (b >= s.batch.count || i >= s.m) return;
  const int64_t first = part * q.size, left = s.p - first;
  const T* begin = a + s.batch.offset(b) + first * s.block_stride + i * s.row_stride;
  double total[kWidth] = {};
  add_part<kWidth>(begin + j * s.col_stride, s.block_stride, left < q.size ? left : q.size, total);
  to += b_part * s.m * s.n;
  if constexpr (kRows == 1) {
    store_run<kWidth>(total, to + i * s.n + j);
  } else {
    store_each<kWidth>(total, to + i * strides.row + j * strides.col, strides.col);
  }
}

// out (batch, m, n) at these strides of the last two.
template <typename T>
struct PutEntry {
  T* out;
  int64_t m, n;
  OutStrides strides;

  __device__ void operator()(int64_t b, int64_t entry, double total) const {
    out[b * m * n + entry / n * strides.row + entry % n * strides.col] = static_cast<T>(total);
  }
};

template <int kWidth, int kRows, typename T>
void run(const Launcher& launcher, const Blocks& s, const Tensor& A, Tensor& out,
         OutStrides strides) {
  const Parts q = parts_of(s, kWidth, kRows);
  const T* a = A.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t threads = s.batch.count * q.count * q.bands * q.runs * kRows;
  if (q.count == 1) {
    return launcher.threads(threads, sum_parts<kWidth, kRows, T, T>, s, q, a, to, strides);
  }
  Tensor partial = scratch(A, s.batch.count * q.count * s.m * s.n);
  launcher.threads(threads, sum_parts<kWidth, kRows, T, double>, s, q, a,
                   partial.mutable_data_ptr<double>(), OutStrides{s.n, 1});
  add_parts(launcher, s.batch.count, q.count, s.m * s.n, partial,
            PutEntry<T>{to, s.m, s.n, strides});
}

template <int kWidth, typename T>
void run_across(const Launcher& launcher, const Blocks& s, const Tensor& A, Tensor& out,
                OutStrides strides) {
  const auto f = strides.col == 1 ? run<kWidth, 1, T> : run<kWidth, 8, T>;
  f(launcher, s, A, out, strides);
}

Tensor block_diag_sum(const Tensor& A, int64_t num_blocks) {
  Blocks s = blocks_of(A, num_blocks);
  Tensor out = torch::stable::new_empty(A, concat(batch_sizes(A, 2), {s.m, s.n}));
  const OutStrides strides = run_along_contiguous(s);
  if (s.batch.count * s.m * s.n == 0) return out;
  const Launcher launcher(A);
  dispatch_floating(A, "block_diag_sum", [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = 16 / sizeof(T);
    const T* a = A.const_data_ptr<T>();
    const bool whole = whole_runs<kWidth>(a, s.n, s.col_stride, s.row_stride, s.batch);
    const auto f = whole ? run_across<kWidth, T> : run_across<1, T>;
    f(launcher, s, A, out, strides);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) {
  m.impl("block_diag_sum", TORCH_BOX(&block_diag_sum));
}

}  // namespace
}  // namespace torch_kronlik
