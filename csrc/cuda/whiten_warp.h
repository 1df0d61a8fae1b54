#pragma once

// whiten_small by the 32 lanes of one warp: entries, rows and columns go to lanes, and the Jacobi
// rotations of disjoint pairs of outputs run at the same time. D is padded to an even m with an
// output of its own, which takes part in nothing.

#include <cuda_runtime.h>

#include "../kernels/whiten_small.h"

namespace torch_kronlik {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ double warp_sum(double value, int width = 32) {
  for (int step = width / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, step);
  }
  return value;
}

struct Rotation {
  int p, q;
  double c, s, move;
};

// The pairs of round r of a tournament among m players.
__device__ __forceinline__ void pair_up(int r, int l, int m, Rotation* x) {
  const int a = l == 0 ? m - 1 : (r + l) % (m - 1), b = (r + m - 1 - l) % (m - 1);
  x->p = a < b ? a : b;
  x->q = a < b ? b : a;
}

// As in jacobi_rotate: the rotation for which A_pq becomes zero, if that is not small already.
__device__ __forceinline__ bool find_rotation(const double* A, int m, Rotation* x) {
  constexpr double kTiny = 1e-17;
  const double app = A[x->p * m + x->p], aqq = A[x->q * m + x->q], off = A[x->p * m + x->q];
  x->c = 1;
  x->s = x->move = 0;
  if (!(fabs(off) > kTiny * (sqrt(fabs(app)) * sqrt(fabs(aqq))) && fabs(off) > 1e-307)) {
    return false;
  }
  const double theta = (aqq - app) / (2 * off);
  const double t = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
  x->c = 1 / sqrt(t * t + 1);
  x->s = t * x->c;
  x->move = t * off;
  return true;
}

// Entry (i, j) of A and its mirror image.
__device__ __forceinline__ void put(double* A, int m, int i, int j, double value) {
  A[i * m + j] = A[j * m + i] = value;
}

// The 2×2 block of A at the rows of u and the columns of v, rotated from both sides.
__device__ __forceinline__ void rotate_block(double* A, int m, const Rotation& u,
                                             const Rotation& v) {
  const double a = A[u.p * m + v.p], b = A[u.p * m + v.q];
  const double c = A[u.q * m + v.p], d = A[u.q * m + v.q];
  const double pp = u.c * a - u.s * c, pq = u.c * b - u.s * d;
  const double qp = u.s * a + u.c * c, qq = u.s * b + u.c * d;
  put(A, m, u.p, v.p, v.c * pp - v.s * pq);
  put(A, m, u.p, v.q, v.s * pp + v.c * pq);
  put(A, m, u.q, v.p, v.c * qp - v.s * qq);
  put(A, m, u.q, v.q, v.s * qp + v.c * qq);
}

__device__ __forceinline__ void apply_round(double* A, double* Q, int m, const Rotation* all) {
  const int half = m / 2;
  for (int e = threadIdx.x; e < half * half; e += 32) {
    const Rotation &u = all[e / half], &v = all[e % half];
    if (e / half < e % half) rotate_block(A, m, u, v);
    if (e / half == e % half && u.s != 0) {
      A[u.p * m + u.p] -= u.move;
      A[u.q * m + u.q] += u.move;
      put(A, m, u.p, u.q, 0);
    }
  }
  for (int e = threadIdx.x; e < half * m; e += 32) {
    const Rotation& u = all[e / m];
    const int k = e % m;
    const double a = Q[k * m + u.p], b = Q[k * m + u.q];
    Q[k * m + u.p] = u.c * a - u.s * b;
    Q[k * m + u.q] = u.s * a + u.c * b;
  }
  __syncwarp();
}

// As jacobi_eigen, the m - 1 rounds of a sweep of m / 2 rotations each.
__device__ __forceinline__ void jacobi_by_rounds(double* A, double* Q, int m) {
  __shared__ Rotation all[kMaxSmallD / 2];
  for (int e = threadIdx.x; e < m * m; e += 32) Q[e] = e % (m + 1) == 0 ? 1 : 0;
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool rotated = false;
    for (int r = 0; r < m - 1; ++r) {
      __syncwarp();
      const int l = threadIdx.x;
      if (l < m / 2) {
        pair_up(r, l, m, &all[l]);
        rotated = find_rotation(A, m, &all[l]) || rotated;
      }
      __syncwarp();
      apply_round(A, Q, m, all);
    }
    if (!__any_sync(kWholeWarp, rotated)) return;
  }
}

// L of the noise, its outputs in descending order; false if it is not positive definite.
template <typename T>
__device__ bool noise_root_by_columns(const SmallOutputs<T>& x, int D, int m, const int* order,
                                      double* L) {
  const int i = threadIdx.x;
  for (int e = i; e < m * m; e += 32) L[e] = e % (m + 1) == 0 ? 1 : 0;
  __syncwarp();
  if (!x.full) {
    if (i < D) L[i * m + i] = exp(0.5 * x.log_noise(order[i]));
    __syncwarp();
    return true;
  }
  for (int j = 0; j < D; ++j) {
    double sum = 0;
    if (i >= j && i < D) {
      sum = x.Sigma(order[i], order[j]);
      for (int k = 0; k < j; ++k) sum -= L[i * m + k] * L[j * m + k];
    }
    const double pivot = __shfl_sync(kWholeWarp, sum, j);
    if (!(pivot > 0)) return false;
    if (i >= j && i < D) L[i * m + j] = i == j ? sqrt(pivot) : sum / sqrt(pivot);
    __syncwarp();
  }
  return true;
}

// B <- L⁻¹ B, one column for each lane.
__device__ __forceinline__ void solve_columns(const double* L, int m, double* B) {
  const int c = threadIdx.x;
  for (int i = 0; i < m && c < m; ++i) {
    double sum = B[i * m + c];
    for (int k = 0; k < i; ++k) sum -= L[i * m + k] * B[k * m + c];
    B[i * m + c] = sum / L[i * m + i];
  }
  __syncwarp();
}

template <typename T>
__device__ bool all_finite(const SmallOutputs<T>& x, int D) {
  double zero = 0;
  for (int e = threadIdx.x; e < D * D; e += 32) {
    zero += 0 * x.K(e / D, e % D) + 0 * (x.full ? x.Sigma(e / D, e % D) : x.log_noise(e / D));
  }
  return __all_sync(kWholeWarp, zero == 0);
}

// order, and B = L⁻¹ K L⁻ᵀ, both permuted; false if the noise is not positive definite.
template <typename T>
__device__ bool whitened_matrix(const SmallOutputs<T>& x, int D, int m, WhitenWork* work) {
  double *L = work->L, *A = work->A, *B = work->B;
  const int lane = threadIdx.x;
  if (lane < D) {
    int rank = 0;
    for (int i = 0; i < D; ++i) {
      rank += x.size(i) > x.size(lane) || (x.size(i) == x.size(lane) && i < lane);
    }
    work->order[rank] = lane;
  }
  __syncwarp();
  for (int e = lane; e < m * m; e += 32) {
    const int i = e / m, j = e % m;
    A[e] = i < D && j < D ? x.K(work->order[i], work->order[j]) : 0;
  }
  if (!noise_root_by_columns(x, D, m, work->order, L)) return false;
  solve_columns(L, m, A);
  for (int e = lane; e < m * m; e += 32) B[e] = A[e % m * m + e / m];
  __syncwarp();
  solve_columns(L, m, B);
  for (int e = lane; e < m * m; e += 32) {
    const int i = e / m, j = e % m;
    if (j < i) put(B, m, i, j, 0.5 * (B[i * m + j] + B[j * m + i]));
  }
  return true;
}

// One warp, all of whose lanes get the status; `work` and `out` are in shared memory.
template <typename T>
__device__ SmallStatus whiten_by_warp(const SmallOutputs<T>& x, int D, double eps, WhitenWork* work,
                                      Whitened* out) {
  if (!all_finite(x, D)) return kNotFinite;
  const int m = D + D % 2, j = threadIdx.x;
  if (!whitened_matrix(x, D, m, work)) return kNoisePositive;
  double *L = work->L, *Q = work->A, *B = work->B;
  const int* order = work->order;
  jacobi_by_rounds(B, Q, m);
  double largest = 0;
  for (int k = 0; k < D; ++k) largest = fmax(largest, fabs(B[k * m + k]));
  double logdet = 0;
  if (j < D) {
    const double lam = B[j * m + j];
    // Rounding below zero is zero.
    out->lam[j] = lam < 0 && lam >= -D * eps * largest ? 0 : lam;
    logdet = x.full ? 2 * log(L[j * m + j]) : x.log_noise(j);
    // R = L⁻ᵀ Q, column by column.
    for (int i = D - 1; i >= 0; --i) {
      double sum = Q[i * m + j];
      for (int k = i + 1; k < D; ++k) sum -= L[k * m + i] * out->R[order[k] * D + j];
      out->R[order[i] * D + j] = sum / L[i * m + i];
    }
  }
  logdet = warp_sum(logdet);
  if (j == 0) {
    out->largest = largest;
    out->logdet_noise = logdet;
  }
  __syncwarp();
  // L_11 is the largest root of a noise variance, which may exceed the range of doubles.
  return std::isfinite(largest + logdet + L[0]) ? kFine : kNotFinite;
}

}  // namespace torch_kronlik
