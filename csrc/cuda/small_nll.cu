#include <tuple>

#include "../kernels/small_nll.h"
#include "../shapes.h"
#include "launch.h"

namespace torch_kronlik {
namespace {

constexpr int kPitch = kMaxSmallT + 1;  // neighbouring rows start in different banks

template <typename T>
struct Pointers {
  const T *y, *m, *k, *noise;
  T *nll, *gy, *gm, *gk, *gnoise;
  int64_t* status;
};

// What a block of threads shares: one problem at a time, one column j of the whitened basis.
template <typename T>
struct Shared {
  T C[kMaxSmallT * kPitch];
  T w[kMaxSmallT], x[kMaxSmallT];
  Whitened basis;
  double trace[kMaxSmallD], trace_M[kMaxSmallD];
  WhitenWork work;
  double logdet, quad;
  SmallStatus status;
};

template <typename T>
__device__ SmallOutputs<T> outputs_of(const SmallNll& s, const Pointers<T>& t, int64_t b) {
  return {t.k + s.k_batch.offset(b),
          s.k_row,
          s.k_col,
          t.noise + s.noise_batch.offset(b),
          s.noise_row,
          s.noise_col,
          s.full_noise};
}

// L from C_j = λ_j M + I, its log determinant and w = L⁻¹ ỹ_j.
template <typename T>
__device__ void factorise(const SmallNll& s, Shared<T>& sh, const T* m, const T* y, int j) {
  const int n = static_cast<int>(s.T), D = static_cast<int>(s.D);
  const T lam = static_cast<T>(sh.basis.lam[j]);
  for (int e = threadIdx.x; e < n * n; e += kThreads) {
    const int i = e / n, k = e % n;
    if (k <= i) sh.C[i * kPitch + k] = lam * m[i * s.m_row + k * s.m_col] + T(i == k);
  }
  for (int i = threadIdx.x; i < n; i += kThreads) {
    double sum = 0;
    for (int d = 0; d < D; ++d) {
      sum += static_cast<double>(y[i * s.y_row + d * s.y_col]) * sh.basis.R[d * D + j];
    }
    sh.w[i] = static_cast<T>(sum);
  }
  __syncthreads();
  for (int k = 0; k < n; ++k) {
    const T root = sqrt(sh.C[k * kPitch + k]);  // a NaN if the matrix is not positive definite
    __syncthreads();
    for (int i = k + threadIdx.x; i < n; i += kThreads) {
      sh.C[i * kPitch + k] = i == k ? root : sh.C[i * kPitch + k] / root;
    }
    __syncthreads();
    const int rest = n - k - 1;
    const T pivot = sh.w[k] / root;
    for (int e = threadIdx.x; e < rest * rest; e += kThreads) {
      const int i = k + 1 + e / rest, c = k + 1 + e % rest;
      if (c <= i) sh.C[i * kPitch + c] -= sh.C[i * kPitch + k] * sh.C[c * kPitch + k];
    }
    __syncthreads();
    for (int i = k + threadIdx.x; i < n; i += kThreads) {
      sh.w[i] = i == k ? pivot : sh.w[i] - sh.C[i * kPitch + k] * pivot;
    }
    __syncthreads();
  }
}

// Adds the log determinant and the quadratic form of column j.
template <typename T>
__device__ void accumulate(int n, Shared<T>& sh) {
  double logdet = 0, quad = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    logdet += 2 * log(static_cast<double>(sh.C[i * kPitch + i]));
    quad += static_cast<double>(sh.w[i]) * static_cast<double>(sh.w[i]);
  }
  logdet = block_sum(logdet);
  __syncthreads();
  quad = block_sum(quad);
  if (threadIdx.x == 0) {
    sh.logdet += logdet;
    sh.quad += quad;
  }
  __syncthreads();
}

// L -> L⁻¹ in place, row by row: a row is read whole before it is written.
template <typename T>
__device__ void invert(int n, Shared<T>& sh) {
  for (int i = 0; i < n; ++i) {
    const int j = threadIdx.x;
    T value = 0;
    if (j <= i) {
      for (int k = j; k < i; ++k) value -= sh.C[i * kPitch + k] * sh.C[k * kPitch + j];
      value = (i == j ? T(1) : value) / sh.C[i * kPitch + i];
    }
    __syncthreads();
    if (j <= i) sh.C[i * kPitch + j] = value;
    __syncthreads();
  }
}

// From L⁻¹: gm += λ_j C_j⁻¹, the traces, and column j of X (T, D).
template <typename T>
__device__ void add_inverse(const SmallNll& s, Shared<T>& sh, const T* m, T* gm, T* X, int j) {
  const int n = static_cast<int>(s.T);
  const T lam = static_cast<T>(sh.basis.lam[j]);
  double trace = 0, trace_M = 0;
  for (int e = threadIdx.x; e < n * n; e += kThreads) {
    const int a = e / n, b = e % n;
    T sum = 0;
    for (int i = a > b ? a : b; i < n; ++i) sum += sh.C[i * kPitch + a] * sh.C[i * kPitch + b];
    gm[e] = (j == 0 ? T(0) : gm[e]) + lam * sum;
    trace_M += static_cast<double>(sum) * static_cast<double>(m[a * s.m_row + b * s.m_col]);
    if (a == b) trace += static_cast<double>(sum);
  }
  for (int k = threadIdx.x; k < n; k += kThreads) {
    T sum = 0;
    for (int i = k; i < n; ++i) sum += sh.C[i * kPitch + k] * sh.w[i];
    X[k * s.D + j] = sum;
  }
  trace = block_sum(trace);
  __syncthreads();
  trace_M = block_sum(trace_M);
  if (threadIdx.x == 0) {
    sh.trace[j] = trace;
    sh.trace_M[j] = trace_M;
  }
  __syncthreads();
}

// X -> A = X Rᵀ in place.
template <typename T>
__device__ void back_transform(const SmallNll& s, const Shared<T>& sh, T* X) {
  const int D = static_cast<int>(s.D);
  for (int i = threadIdx.x; i < s.T; i += kThreads) {
    T row[kMaxSmallD];
    for (int d = 0; d < D; ++d) {
      double sum = 0;
      for (int j = 0; j < D; ++j) {
        sum += static_cast<double>(X[i * D + j]) * sh.basis.R[d * D + j];
      }
      row[d] = static_cast<T>(sum);
    }
    for (int d = 0; d < D; ++d) X[i * D + d] = row[d];
  }
  __syncthreads();
}

// gm = ½ (gm - A K Aᵀ).
template <typename T>
__device__ void subtract_rows(const SmallNll& s, const SmallOutputs<T>& o, const T* A, T* gm) {
  const int n = static_cast<int>(s.T), D = static_cast<int>(s.D);
  for (int e = threadIdx.x; e < n * n; e += kThreads) {
    const T *a = A + e / n * D, *b = A + e % n * D;
    double sum = 0;
    for (int d = 0; d < D; ++d) {
      double inner = 0;
      for (int c = 0; c < D; ++c) inner += o.K(d, c) * static_cast<double>(b[c]);
      sum += static_cast<double>(a[d]) * inner;
    }
    gm[e] = static_cast<T>(0.5 * (static_cast<double>(gm[e]) - sum));
  }
}

__device__ double weighted(const Whitened& basis, int D, const double* weights, int d, int e,
                           double scale = 1) {
  double sum = 0;
  for (int j = 0; j < D; ++j) {
    sum += (scale * basis.R[d * D + j]) * weights[j] * (scale * basis.R[e * D + j]);
  }
  return sum;
}

// One thread for each entry of gK and of the noise's gradient.
template <typename T>
__device__ void columns(const SmallNll& s, const Shared<T>& sh, const SmallOutputs<T>& o,
                        const T* m, const T* A, T* gk, T* gnoise) {
  const int D = static_cast<int>(s.D);
  for (int at = threadIdx.x; at < D * D; at += kThreads) {
    const int d = at / D, e = at % D;
    // exp(s) itself may overflow.
    const double root = s.full_noise ? 1.0 : exp(0.5 * o.log_noise(d));
    double with_M = 0, plain = 0;
    for (int i = 0; i < s.T; ++i) {
      double inner = 0;
      for (int k = 0; k < s.T; ++k) {
        inner +=
            static_cast<double>(m[i * s.m_row + k * s.m_col]) * static_cast<double>(A[k * D + e]);
      }
      const double a = static_cast<double>(A[i * D + d]);
      with_M += a * inner;
      plain += (root * a) * (root * static_cast<double>(A[i * D + e]));
    }
    gk[at] = static_cast<T>(0.5 * (weighted(sh.basis, D, sh.trace_M, d, e) - with_M));
    const T value = static_cast<T>(0.5 * (weighted(sh.basis, D, sh.trace, d, e, root) - plain));
    if (s.full_noise) gnoise[at] = value;
    if (!s.full_noise && d == e) gnoise[d] = value;
  }
}

template <typename T>
__device__ void finish(const SmallNll& s, const Pointers<T>& t, Shared<T>& sh, int64_t b) {
  const double count = static_cast<double>(s.T);
  const double total = sh.logdet + count * sh.basis.logdet_noise + sh.quad +
                       count * static_cast<double>(s.D) * 1.8378770664093454836;
  if (sh.status == kFine && !isfinite(sh.logdet)) sh.status = kCovariancePositive;
  const T nll = static_cast<T>(0.5 * total);
  if (sh.status == kFine && !isfinite(nll)) sh.status = kNotFinite;
  t.status[b] = sh.status;
  t.nll[b] = nll;
}

// Both triangles of M, of which the factorisation reads one.
template <typename T>
__device__ void require_range(const SmallNll& s, Shared<T>& sh, const T* m) {
  double zero = 0;
  for (int64_t e = threadIdx.x; e < s.T * s.T; e += kThreads) {
    zero += range_test(sh.basis, m[e / s.T * s.m_row + e % s.T * s.m_col]);
  }
  zero = block_sum(zero);
  if (threadIdx.x == 0 && sh.status == kFine && !(zero == 0)) {
    sh.status = kNotFinite;
    spoil(&sh.basis, static_cast<int>(s.D));
  }
  __syncthreads();
}

template <typename T>
__global__ void small_problems(SmallNll s, Pointers<T> t, bool gradients) {
  __shared__ Shared<T> sh;
  const int64_t b = blockIdx.x, n = s.T, D = s.D;
  const T *m = t.m + s.m_batch.offset(b), *y = t.y + s.y_batch.offset(b);
  const SmallOutputs<T> o = outputs_of(s, t, b);
  if (threadIdx.x == 0) {
    const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
    sh.status = whiten_small(o, static_cast<int>(D), eps, &sh.work, &sh.basis);
    if (sh.status != kFine) spoil(&sh.basis, static_cast<int>(D));
    sh.logdet = sh.quad = 0;
  }
  __syncthreads();
  require_range(s, sh, m);
  T *gm = t.gm + b * n * n, *A = t.gy + b * n * D;
  for (int j = 0; j < D; ++j) {
    factorise(s, sh, m, y, j);
    accumulate(static_cast<int>(n), sh);
    if (gradients) {
      invert(static_cast<int>(n), sh);
      add_inverse(s, sh, m, gm, A, j);
    }
  }
  if (threadIdx.x == 0) finish(s, t, sh, b);
  if (!gradients) return;
  back_transform(s, sh, A);
  subtract_rows(s, o, A, gm);
  columns(s, sh, o, m, A, t.gk + b * D * D, t.gnoise + b * D * (s.full_noise ? D : 1));
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results small_nll(const Tensor& Y, const Tensor& M, const Tensor& K, const Tensor& noise,
                  bool full_noise, bool gradients) {
  const Sizes batch = small_batch(Y, M, K, noise, full_noise);
  const SmallNll s = small_nll_of(Y, M, K, noise, full_noise, batch);
  const auto grad = [&](std::initializer_list<int64_t> core) {
    return torch::stable::new_empty(Y, gradients ? concat(batch, core) : Sizes{0});
  };
  Tensor nll = torch::stable::new_empty(Y, batch);
  Tensor status = torch::stable::new_empty(Y, batch, ScalarType::Long);
  Tensor gy = grad({s.T, s.D}), gm = grad({s.T, s.T}), gk = grad({s.D, s.D});
  Tensor gnoise = full_noise ? grad({s.D, s.D}) : grad({s.D});
  const Launcher launcher(Y);
  dispatch_floating(Y, "small_nll", [&](auto zero) {
    using T = decltype(zero);
    const Pointers<T> t{Y.const_data_ptr<T>(),        M.const_data_ptr<T>(),
                        K.const_data_ptr<T>(),        noise.const_data_ptr<T>(),
                        nll.mutable_data_ptr<T>(),    gy.mutable_data_ptr<T>(),
                        gm.mutable_data_ptr<T>(),     gk.mutable_data_ptr<T>(),
                        gnoise.mutable_data_ptr<T>(), status.mutable_data_ptr<int64_t>()};
    launcher.blocks(s.y_batch.count, small_problems<T>, s, t, gradients);
  });
  return {nll, gy, gm, gk, gnoise, status};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) { m.impl("small_nll", TORCH_BOX(&small_nll)); }

}  // namespace
}  // namespace torch_kronlik
