#pragma once

// Neighbouring entries that one thread reads or writes at once: 16 bytes are the widest access.

#include <cstdint>

#include "../batch.h"

namespace torch_kronlik {

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Run {
  T x[kWidth];
};

template <int kWidth, typename T>
__device__ __forceinline__ Run<T, kWidth> load_run(const T* from) {
  return *reinterpret_cast<const Run<T, kWidth>*>(from);
}

template <int kWidth, typename T>
__device__ __forceinline__ void store_run(const double* values, T* to) {
  Run<T, kWidth> run;
#pragma unroll
  for (int v = 0; v < kWidth; ++v) run.x[v] = static_cast<T>(values[v]);
  *reinterpret_cast<Run<T, kWidth>*>(to) = run;
}

template <int kWidth, typename T>
__device__ __forceinline__ void store_each(const double* values, T* to, int64_t stride) {
#pragma unroll
  for (int v = 0; v < kWidth; ++v) to[v * stride] = static_cast<T>(values[v]);
}

// Whether every row of n entries, in every matrix of the batch, is made of aligned runs.
template <int kWidth, typename T>
bool whole_runs(const T* data, int64_t n, int64_t stride, int64_t row_stride,
                const BatchLayout& batch) {
  bool whole = stride == 1 && n % kWidth == 0 && row_stride % kWidth == 0 &&
               reinterpret_cast<uintptr_t>(data) % sizeof(Run<T, kWidth>) == 0;
  for (int d = 0; d < batch.dims; ++d) whole = whole && batch.stride[d] % kWidth == 0;
  return whole;
}

}  // namespace torch_kronlik
