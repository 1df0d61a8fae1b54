#include <tuple>

#include "../kernels/pivoted_cholesky.h"
#include "../shapes.h"
#include "launch.h"

namespace torch_kronlik {
namespace {

// A launch for every column, in which each block of threads has kRows rows of a matrix and kLanes
// threads for each row. What a launch reads of other blocks was written by the launches before it:
// what is new of the whole matrix comes in two copies, one to read and one to write.
constexpr int kRows = 32;
constexpr int kLanes = kThreads / kRows;

// The rest's diagonal: its sums and where it is the largest, the first of equals.
struct Diagonal {
  double sum, absolute, largest, pivot;

  __device__ Diagonal with(const Diagonal& b) const {
    const bool later = b.largest > largest || (b.largest == largest && b.pivot < pivot);
    return {sum + b.sum, absolute + b.absolute, later ? b.largest : largest,
            later ? b.pivot : pivot};
  }
};

// The same for all threads of a warp.
__device__ Diagonal over_warp(Diagonal d) {
  for (int step = 16; step > 0; step /= 2) {
    d = d.with({__shfl_xor_sync(~0u, d.sum, step), __shfl_xor_sync(~0u, d.absolute, step),
                __shfl_xor_sync(~0u, d.largest, step), __shfl_xor_sync(~0u, d.pivot, step)});
  }
  return d;
}

// Of the rows i of a warp, each with its own rest.
__device__ Diagonal over_rows(double rest, int64_t i) {
  return over_warp({rest, fabs(rest), rest > 0 ? rest : 0, static_cast<double>(rest > 0 ? i : 0)});
}

// Of all rows, for all threads of a block.
__device__ Diagonal over_parts(const Diagonal* parts, int64_t count) {
  __shared__ Diagonal of_warp[kThreads / 32];
  Diagonal d{};
  for (int64_t part = threadIdx.x; part < count; part += kThreads) d = d.with(parts[part]);
  d = over_warp(d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = d;
  __syncthreads();
  d = of_warp[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) d = d.with(of_warp[warp]);
  return d;
}

enum State { kRunning = -2, kFailed = -1 };  // or the rank, once the rest is rounding

template <typename T>
struct Matrix {
  const T* m;
  T* f;               // column after column
  Diagonal* parts;    // (2, blocks)
  double* rest;       // (T)
  double* absolutes;  // (max_rank + 1): of the diagonal after so many columns
  double* fv;         // (max_rank): Fᵀ v
  double* state;      // (2)
  double* tolerance;
};

struct Shape : PivotedCholesky {
  int64_t blocks;  // of threads, for each matrix

  __host__ __device__ int64_t work() const { return 8 * blocks + T + 2 * max_rank + 4; }

  template <typename E>
  __device__ Matrix<E> matrix(const E* m, E* f, double* work_of_all, int64_t b) const {
    double* parts = work_of_all + b * work();
    double *rest = parts + 8 * blocks, *absolutes = rest + T, *fv = absolutes + max_rank + 1;
    double* state = fv + max_rank;
    return {m + batch.offset(b),
            f + b * T * max_rank,
            reinterpret_cast<Diagonal*>(parts),
            rest,
            absolutes,
            fv,
            state,
            state + 2};
  }
};

template <typename T>
__global__ void start(Shape c, const T* m, T* f, double* work) {
  const int64_t b = blockIdx.x / c.blocks, part = blockIdx.x % c.blocks;
  const Matrix<T> x = c.matrix(m, f, work, b);
  const int64_t i = part * kRows + threadIdx.x;
  double rest = 0;
  if (i < c.T) x.rest[i] = rest = static_cast<double>(x.m[i * (c.row_stride + c.col_stride)]);
  const Diagonal d = over_rows(rest, i);
  if (threadIdx.x == 0) x.parts[part] = d;
  if (part == 0 && threadIdx.x == 0) x.state[0] = kRunning;
}

// Row i of column k, and what is then left of the diagonal in the block's rows.
template <typename T>
__device__ void new_column(const Shape& c, const Matrix<T>& x, const Diagonal& d, int64_t k,
                           int64_t part) {
  const int64_t i = part * kRows + threadIdx.x % kRows, p = static_cast<int64_t>(d.pivot);
  const bool own = threadIdx.x < kRows && i < c.T;
  double rest = own ? x.rest[i] : 0, known = 0;  // an earlier pivot's rest is zero and stays so
  const double entry =
      rest != 0 ? static_cast<double>(x.m[p * c.row_stride + i * c.col_stride]) : 0;
  for (int64_t l = threadIdx.x / kRows; i < c.T && l < k; l += kLanes) {
    known += static_cast<double>(x.f[l * c.T + i]) * static_cast<double>(x.f[l * c.T + p]);
  }
  known = block_sum(known, kRows);
  if (threadIdx.x >= kRows) return;
  if (rest != 0) {
    const T value = static_cast<T>((entry - known) / sqrt(d.largest));
    x.f[k * c.T + i] = value;
    rest = i == p ? 0 : rest - static_cast<double>(value) * static_cast<double>(value);
    x.rest[i] = rest;
  }
  const Diagonal next = over_rows(rest, i);
  if (threadIdx.x == 0) x.parts[(k + 1) % 2 * c.blocks + part] = next;
}

template <typename T>
__global__ void add_column(Shape c, const T* m, T* f, double* work, int64_t k) {
  const int64_t b = blockIdx.x / c.blocks, part = blockIdx.x % c.blocks;
  const bool first = part == 0 && threadIdx.x == 0;
  const Matrix<T> x = c.matrix(m, f, work, b);
  double state = x.state[k % 2];
  if (state == kRunning) {
    const Diagonal d = over_parts(x.parts + k % 2 * c.blocks, c.blocks);
    const double tolerance = k == 0 ? trace_tolerance<T>(c.T, d.largest) : *x.tolerance;
    if (!isfinite(tolerance)) {
      state = kFailed;
    } else if (is_rounding(k, d.sum, d.absolute, x.absolutes, tolerance)) {
      state = static_cast<double>(k);
    } else if (k == c.max_rank || !(d.largest > 0)) {
      state = kFailed;
    } else {
      new_column(c, x, d, k, part);
    }
    if (first) x.absolutes[k] = d.absolute;
    if (first && k == 0) *x.tolerance = tolerance;
  }
  if (first) x.state[(k + 1) % 2] = state;
}

template <typename T>
__device__ int64_t rank_of(const Shape& c, const Matrix<T>& x) {
  return static_cast<int64_t>(x.state[(c.max_rank + 1) % 2]);
}

// One block for each column: an entry of Fᵀ v.
template <typename T>
__global__ void test_columns(Shape c, const T* m, T* f, double* work) {
  const int64_t b = blockIdx.x / c.max_rank, k = blockIdx.x % c.max_rank;
  const Matrix<T> x = c.matrix(m, f, work, b);
  if (k >= rank_of(c, x)) return;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < c.T; i += kThreads) {
    sum += test_entry(i) * static_cast<double>(x.f[k * c.T + i]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) x.fv[k] = sum;
}

// Whether an entry of M v - F Fᵀ v is above tolerance (a NaN is) in the block's rows.
template <typename T>
__global__ void test_rows(Shape c, const T* m, T* f, double* work) {
  const int64_t b = blockIdx.x / c.blocks, part = blockIdx.x % c.blocks;
  const Matrix<T> x = c.matrix(m, f, work, b);
  const int64_t i = part * kRows + threadIdx.x % kRows, lane = threadIdx.x / kRows;
  const int64_t rank = rank_of(c, x);
  if (rank < 0) return;
  double product = 0;
  // Along a column: M is symmetric, and neighbouring threads then read neighbouring entries.
  for (int64_t j = lane; i < c.T && j < c.T; j += kLanes) {
    product += test_entry(j) * static_cast<double>(x.m[j * c.row_stride + i * c.col_stride]);
  }
  for (int64_t k = lane; i < c.T && k < rank; k += kLanes) {
    product -= static_cast<double>(x.f[k * c.T + i]) * x.fv[k];
  }
  product = block_sum(product, kRows);
  if (threadIdx.x >= kRows) return;
  const bool good = fabs(product) <= product_tolerance(c.T, *x.tolerance);
  const unsigned bad = __ballot_sync(~0u, !good);
  if (threadIdx.x == 0) x.parts[part].sum = bad == 0 ? 0 : 1;
}

template <typename T>
__global__ void finish(Shape c, const T* m, T* f, double* work, int64_t* ranks) {
  const int64_t b = thread_index();
  if (b >= c.batch.count) return;
  const Matrix<T> x = c.matrix(m, f, work, b);
  int64_t rank = rank_of(c, x);
  for (int64_t part = 0; rank >= 0 && part < c.blocks; ++part) {
    if (x.parts[part].sum != 0) rank = kFailed;
  }
  ranks[b] = rank;
}

std::tuple<Tensor, Tensor> pivoted_cholesky(const Tensor& M, int64_t max_rank) {
  const PivotedCholesky sizes = pivoted_cholesky_of(M, max_rank);
  const Shape c{sizes, std::max<int64_t>(1, (sizes.T + kRows - 1) / kRows)};
  const int64_t count = c.batch.count;
  const Sizes batch = batch_sizes(M, 2);
  Tensor F = torch::stable::new_zeros(M, concat(batch, {max_rank, c.T}));
  Tensor rank = torch::stable::new_empty(M, batch, ScalarType::Long);
  const Launcher launcher(M);
  Tensor scratch_memory = scratch(M, count * c.work());
  double* work = scratch_memory.mutable_data_ptr<double>();
  dispatch_floating(M, "pivoted_cholesky", [&](auto zero) {
    using T = decltype(zero);
    const T* m = M.const_data_ptr<T>();
    T* f = F.mutable_data_ptr<T>();
    launcher.blocks_of(kRows, count * c.blocks, start<T>, c, m, f, work);
    for (int64_t k = 0; k <= max_rank; ++k) {
      launcher.blocks(count * c.blocks, add_column<T>, c, m, f, work, k);
    }
    launcher.blocks(count * max_rank, test_columns<T>, c, m, f, work);
    launcher.blocks(count * c.blocks, test_rows<T>, c, m, f, work);
    launcher.threads(count, finish<T>, c, m, f, work, rank.mutable_data_ptr<int64_t>());
  });
  return {torch::stable::transpose(F, -2, -1), rank};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) {
  m.impl("pivoted_cholesky", TORCH_BOX(&pivoted_cholesky));
}

}  // namespace
}  // namespace torch_kronlik
