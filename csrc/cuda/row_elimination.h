#pragma once

// The inverse of a symmetric positive definite n×n matrix, n ≤ N, and the solution of one system,
// by N threads with one row each in registers and one barrier for each row.

#include <cuda_runtime.h>

namespace torch_kronlik {

template <int N>
__device__ __forceinline__ void sync_rows() {
  N > 32 ? __syncthreads() : __syncwarp();
}

// Where the row of each step is for all to read, in shared memory: two, since the row of the step
// before may still be read while the next one is written.
template <typename T, int N>
struct StepRows {
  static constexpr int kPitch = N + 16 / sizeof(T);  // for the right-hand side, and aligned
  alignas(16) T row[2][kPitch];
};

// Thread i's row. The rows are eliminated one after the other: with p_k the pivot and r the row of
// step k (row k of L⁻¹ left of the diagonal, 1 on it, row k of the Schur complement right of it), a
// row below k loses r_i/p_k times r, and a row above k, which has become row i of p_i C⁻¹, gains
// p_i r_i/p_k times r. At step k entry e belongs to column (k + e) % N, so that every index of a
// register is a constant.
template <typename T, int N>
struct Row {
  T a[N];
  T x;             // of the right-hand side y, then of C⁻¹ y
  T w = 0;         // of L⁻¹ y for C = L Diag(p) Lᵀ
  T pivot = T(1);  // p_i

  // C = lam M + I, of which the lower triangle is read; the rest of the row is an identity's.
  __device__ void load(const T* m, int64_t row_stride, int64_t col_stride, T lam, int n, int i) {
    m += min(i, n - 1) * col_stride;
#pragma unroll
    for (int c = 0; c < N; ++c) a[c] = 0;
    if (n > 0) {  // once: in a loop of conditions each load would wait for the one before
#pragma unroll
      for (int c = 0; c < N; ++c) a[c] = m[min(c, n - 1) * row_stride];
    }
#pragma unroll
    for (int c = 0; c < N; ++c) a[c] = (c >= i && c < n ? lam : T(0)) * a[c] + T(c == i);
  }

  // A pivot that is not positive stays as it is.
  __device__ void eliminate(StepRows<T, N>& shared, int n, int i) {
    T scale = 1;
    for (int k = 0; k < n; ++k) {
      T* r = shared.row[k % 2];
      if (i == k) publish(r);
      sync_rows<N>();
      const T step = r[(i - k) & (N - 1)] / r[0], factor = i == k ? T(0) : step * scale;
#pragma unroll
      for (int c = 1; c < N; ++c) a[c - 1] = a[c] - factor * r[c];
      a[N - 1] = i == k ? T(1) : -factor;
      x = i == k ? w / pivot : x + (i < k ? step : -step) * r[N];
      if (i == k) scale = -pivot;
    }
  }

  __device__ void publish(T* r) {
    pivot = a[0];
    w = x;
#pragma unroll
    for (int c = 0; c < N; ++c) r[c] = a[c];
    r[N] = x;
  }

  // The column of p_i C⁻¹ to which entry e belongs at the end.
  __device__ static int column(int e, int n) { return (n + e) & (N - 1); }
};

}  // namespace torch_kronlik
