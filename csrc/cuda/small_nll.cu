#include <tuple>

#include "../kernels/small_nll.h"
#include "../shapes.h"
#include "launch.h"
#include "row_elimination.h"
#include "whiten_warp.h"

namespace torch_kronlik {
namespace {

constexpr int64_t kMaxSmallT = 64;  // the rows of a block of threads

template <typename T>
struct Pointers : SmallTensors<T> {
  double* basis;  // a Whitened for each problem
  T* symmetric;   // (T, T) for each problem, the symmetric part of M

  __device__ const Whitened& whitened(int64_t b) const {
    return reinterpret_cast<const Whitened*>(basis)[b];
  }
};

enum Sum { kLogdet, kQuad, kTrace, kTraceM, kSums };

// A block of threads has one problem, N threads of it one column j of the whitened basis at a time,
// and each of these one row of C_j = λ_j M + I.
template <typename T, int N>
struct Shared {
  StepRows<T, N> step[kThreads / N];
  T inverse[N * (N + 1) / 2];               // Σ_j λ_j C_j⁻¹, its lower triangle
  T X[kMaxSmallD * N];                      // (D, N): C_j⁻¹ ỹ_j in row j, and later (M A)ᵀ
  T A[kMaxSmallD * N], AK[kMaxSmallD * N];  // Aᵀ and (A K)ᵀ
  double sums[kSums][kMaxSmallD][2];        // of each j, by half of its threads where N = 64
  double half;                              // ½, or a NaN for a problem that failed

  __device__ double sum(Sum what, int j) const {
    return N > 32 ? sums[what][j][0] + sums[what][j][1] : sums[what][j][0];
  }
};

// One warp for each problem: its basis, the symmetric part of M, and its status, which tells of all
// inputs but Y.
template <typename T>
__global__ void whiten_problems(SmallNll s, Pointers<T> t) {
  __shared__ WhitenWork work;
  __shared__ Whitened basis;
  const int64_t b = blockIdx.x;
  const int D = static_cast<int>(s.D);
  const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
  SmallStatus status = whiten_by_warp(t.outputs(s, b), D, eps, &work, &basis);
  const T* m = t.m + s.m_batch.offset(b);
  const int n = static_cast<int>(s.T);
  T* symmetric = t.symmetric + b * n * n;
  double zero = 0;
  for (int i = 0; i < n; ++i) {
    for (int k = threadIdx.x; k < n; k += 32) {
      const T entry = symmetric_entry(s, m, i, k);
      symmetric[i * n + k] = entry;
      zero += range_test(basis, entry);
    }
  }
  if (!__all_sync(kWholeWarp, zero == 0) && status == kFine) status = kNotFinite;
  __syncwarp();  // all lanes have read the basis
  if (status != kFine && threadIdx.x == 0) spoil(&basis, D);
  __syncwarp();
  constexpr int kCount = sizeof(Whitened) / sizeof(double);
  const double* from = reinterpret_cast<const double*>(&basis);
  for (int e = threadIdx.x; e < kCount; e += 32) t.basis[b * kCount + e] = from[e];
  if (threadIdx.x == 0) t.status[b] = status;
}

// The sum over the threads of column j, in a fixed order.
template <int N>
__device__ __forceinline__ void add_up(double value, double (*sums)[2], int i, int j, int D) {
  value = warp_sum(value, N < 32 ? N : 32);
  if (j < D && i % 32 == 0) sums[j][i / 32] = value;
}

// λ_j C_j⁻¹ in the row's place, and the traces of C_j⁻¹ and M C_j⁻¹: of entries (i, c), c ≥ i.
template <typename T, int N>
__device__ void weigh(const SmallNll& s, Shared<T, N>& sh, Row<T, N>& row, const T* m, T lam, int i,
                      int j) {
  const int n = static_cast<int>(s.T), D = static_cast<int>(s.D);
  const T inverse = 1 / row.pivot;
  double trace = 0, trace_M = 0;
  m += min(i, n - 1) * s.m_col;
#pragma unroll
  for (int e = 0; n > 0 && e < N; ++e) {
    const int c = row.column(e, n);
    const T entry = c < i || c >= n ? T(0) : row.a[e] * inverse;
    const T product = entry * m[min(c, n - 1) * s.m_row];
    trace_M += (c == i ? 1 : 2) * static_cast<double>(product);
    if (c == i) trace = static_cast<double>(entry);
    row.a[e] = lam * entry;
    if (e % 8 == 7) __syncwarp();  // or all loads come first, for which registers do not suffice
  }
  add_up<N>(trace, sh.sums[kTrace], i, j, D);
  add_up<N>(trace_M, sh.sums[kTraceM], i, j, D);
}

// Σ_j λ_j C_j⁻¹: the columns that the block works on take turns, so that the order is always one.
// Several entries at a time, so that one load does not wait for the store before it.
template <typename T, int N>
__device__ void collect(const Row<T, N>& row, int n, int i, bool first, T* sum) {
  constexpr int kStep = 8;
#pragma unroll
  for (int start = 0; start < N; start += kStep) {
    T before[kStep];
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int c = row.column(start + u, n);
      before[u] = first || c < i || c >= n ? T(0) : sum[c * (c + 1) / 2 + i];
    }
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int c = row.column(start + u, n);
      if (c >= i && c < n) sum[c * (c + 1) / 2 + i] = before[u] + row.a[start + u];
    }
  }
}

// All that needs C_j: its share of the value, and of Σ_j λ_j C_j⁻¹, the traces and X.
template <typename T, int N>
__device__ void column(const SmallNll& s, Shared<T, N>& sh, const Whitened& basis, const T* m,
                       const T* y, int j, int group, bool gradients) {
  const int n = static_cast<int>(s.T), D = static_cast<int>(s.D), i = threadIdx.x % N;
  const T lam = j < D ? static_cast<T>(basis.lam[j]) : T(0);
  Row<T, N> row;
  row.load(m, s.m_row, s.m_col, lam, n, i);
  double data = 0;
  for (int d = 0; i < n && j < D && d < D; ++d) {
    data += static_cast<double>(y[i * s.y_row + d * s.y_col]) * basis.R[d * D + j];
  }
  row.x = static_cast<T>(data);
  row.eliminate(sh.step[group], n, i);
  const double w = static_cast<double>(row.w), pivot = static_cast<double>(row.pivot);
  add_up<N>(log(pivot), sh.sums[kLogdet], i, j, D);
  add_up<N>(w * w / pivot, sh.sums[kQuad], i, j, D);
  if (!gradients) return;
  if (j < D) sh.X[j * N + i] = row.x;
  weigh(s, sh, row, m, lam, i, j);
  const int groups = blockDim.x / N;
  for (int turn = 0; turn < groups; ++turn) {
    if (turn == group && j < D) collect(row, n, i, j == 0, sh.inverse);
    __syncthreads();
  }
}

template <typename T, int N>
__device__ void finish(const SmallNll& s, const Pointers<T>& t, Shared<T, N>& sh, int64_t b) {
  const double count = static_cast<double>(s.T);
  double logdet = 0, quad = 0;
  for (int j = 0; j < s.D; ++j) {
    logdet += sh.sum(kLogdet, j);
    quad += sh.sum(kQuad, j);
  }
  const double total = logdet + count * t.whitened(b).logdet_noise + quad +
                       count * static_cast<double>(s.D) * 1.8378770664093454836;
  int64_t status = t.status[b];
  if (status == kFine && !isfinite(logdet)) status = kCovariancePositive;
  const T nll = static_cast<T>(0.5 * total);
  if (status == kFine && !isfinite(nll)) status = kNotFinite;
  sh.half = status == kFine ? 0.5 : NAN;
  t.status[b] = status;
  t.nll[b] = status == kFine ? nll : static_cast<T>(NAN);
}

// A = X Rᵀ, and then A K and M A.
template <typename T, int N>
__device__ void products(const SmallNll& s, const SmallOutputs<T>& o, Shared<T, N>& sh,
                         const Whitened& basis, const T* m, T* gy) {
  const int n = static_cast<int>(s.T), D = static_cast<int>(s.D);
  for (int e = threadIdx.x; e < D * N; e += blockDim.x) {
    const int d = e / N, i = e % N;
    double sum = 0;
    for (int j = 0; j < D; ++j) sum += static_cast<double>(sh.X[j * N + i]) * basis.R[d * D + j];
    sh.A[e] = static_cast<T>(sum);
    if (i < n) gy[i * D + d] = static_cast<T>(2 * sh.half * sum);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < D * N; e += blockDim.x) {
    const int d = e / N, i = e % N;
    double with_K = 0, with_M = 0;
    for (int c = 0; c < D; ++c) with_K += static_cast<double>(sh.A[c * N + i]) * o.K(c, d);
    for (int k = 0; k < n && i < n; ++k) {
      with_M +=
          static_cast<double>(m[k * s.m_row + i * s.m_col]) * static_cast<double>(sh.A[d * N + k]);
    }
    sh.AK[e] = static_cast<T>(with_K);
    sh.X[e] = static_cast<T>(with_M);
  }
  __syncthreads();
}

// gM = ½ (Σ_j λ_j C_j⁻¹ - A K Aᵀ).
template <typename T, int N>
__device__ void rows_gradient(const SmallNll& s, const Shared<T, N>& sh, T* gm) {
  const int n = static_cast<int>(s.T), D = static_cast<int>(s.D);
  for (int e = threadIdx.x; e < n * N; e += blockDim.x) {
    const int i = e / N, k = e % N, high = max(i, k), low = min(i, k);
    if (k >= n) continue;
    T value = sh.inverse[high * (high + 1) / 2 + low];
    for (int d = 0; d < D; ++d) value -= sh.AK[d * N + high] * sh.A[d * N + low];
    gm[i * n + k] = static_cast<T>(sh.half) * value;
  }
}

__device__ __forceinline__ double weighted(const Whitened& basis, int D, double weight, int d,
                                           int e, int j, double scale) {
  return (scale * basis.R[d * D + j]) * weight * (scale * basis.R[e * D + j]);
}

// One thread for each entry of gK and of the noise's gradient.
template <typename T, int N>
__device__ void columns_gradient(const SmallNll& s, const SmallOutputs<T>& o,
                                 const Shared<T, N>& sh, const Whitened& basis, T* gk, T* gnoise) {
  const int D = static_cast<int>(s.D);
  for (int at = threadIdx.x; at < D * D; at += blockDim.x) {
    const int d = at / D, e = at % D;
    // exp(s) itself may overflow.
    const double root = s.full_noise ? 1.0 : exp(0.5 * o.log_noise(d));
    double with_M = 0, plain = 0;
    for (int j = 0; j < D; ++j) {
      with_M += weighted(basis, D, sh.sum(kTraceM, j), d, e, j, 1);
      plain += weighted(basis, D, sh.sum(kTrace, j), d, e, j, root);
    }
    for (int i = 0; i < s.T; ++i) {
      const double a = static_cast<double>(sh.A[d * N + i]);
      with_M -= a * static_cast<double>(sh.X[e * N + i]);
      plain -= (root * a) * (root * static_cast<double>(sh.A[e * N + i]));
    }
    gk[at] = static_cast<T>(sh.half * with_M);
    if (s.full_noise) gnoise[at] = static_cast<T>(sh.half * plain);
    if (!s.full_noise && d == e) gnoise[d] = static_cast<T>(sh.half * plain);
  }
}

// As many blocks on a multiprocessor as its 65536 registers hold, with a row and some 80 others for
// each thread.
template <typename T, int N>
constexpr int blocks_at_once() {
  return 65536 / kThreads / (N * static_cast<int>(sizeof(T)) / 4 + 80);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, (blocks_at_once<T, N>()))
    small_problems(SmallNll s, Pointers<T> t, bool gradients) {
  static_assert(sizeof(Shared<T, N>) <= 48 * 1024, "more than a block has by itself");
  __shared__ Shared<T, N> sh;
  const int64_t b = blockIdx.x, n = s.T, D = s.D;
  const T *m = t.symmetric + b * n * n, *y = t.y + s.y_batch.offset(b);
  const Whitened& basis = t.whitened(b);
  const int group = threadIdx.x / N, groups = blockDim.x / N;
  for (int first = 0; first < D; first += groups) {
    column(s, sh, basis, m, y, first + group, group, gradients);
    __syncthreads();
  }
  if (threadIdx.x == 0) finish(s, t, sh, b);
  __syncthreads();
  if (!gradients) return;
  const SmallOutputs<T> o = t.outputs(s, b);
  products(s, o, sh, basis, m, t.gy + b * n * D);
  rows_gradient(s, sh, t.gm + b * n * n);
  columns_gradient(s, o, sh, basis, t.gk + b * D * D, t.gnoise + b * D * (s.full_noise ? D : 1));
}

template <typename T, int N>
void launch(const Launcher& launcher, SmallNll s, const Pointers<T>& t, bool gradients) {
  s.m_row = s.T;
  s.m_col = 1;
  const int wanted = N * static_cast<int>(s.D);
  const int threads = std::min((wanted + 31) / 32 * 32, kThreads);
  launcher.blocks_of(threads, s.y_batch.count, small_problems<T, N>, s, t, gradients);
}

auto small_nll(const Tensor& Y, const Tensor& M, const Tensor& K, const Tensor& noise,
               bool full_noise, bool gradients) {
  const Sizes batch = small_batch(Y, M, K, noise, full_noise);
  const SmallNll s = small_nll_of(Y, M, K, noise, full_noise, batch, kMaxSmallT);
  const int64_t count = s.y_batch.count;
  SmallResults results(s, Y, batch, gradients);
  const Launcher launcher(Y);
  Tensor symmetric = torch::stable::new_empty(Y, {count * s.T * s.T});
  Tensor basis = scratch(Y, count * static_cast<int64_t>(sizeof(Whitened) / sizeof(double)));
  dispatch_floating(Y, "small_nll", [&](auto zero) {
    using T = decltype(zero);
    const Pointers<T> t{results.data<T>(Y, M, K, noise), basis.mutable_data_ptr<double>(),
                        symmetric.mutable_data_ptr<T>()};
    launcher.blocks_of(32, count, whiten_problems<T>, s, t);
    if (s.T <= 16) return launch<T, 16>(launcher, s, t, gradients);
    if (s.T <= 32) return launch<T, 32>(launcher, s, t, gradients);
    launch<T, 64>(launcher, s, t, gradients);
  });
  return results.as_tuple();
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) { m.impl("small_nll", TORCH_BOX(&small_nll)); }

}  // namespace
}  // namespace torch_kronlik
