#pragma once

// The second stage of a sum whose first stage left its parts in memory, in a fixed order.

#include "launch.h"

namespace torch_kronlik {

// put(b, entry, Σ_part partial[b, part, entry]): a block of threads takes kThreads / lanes entries,
// `lanes` threads each.
template <typename Put>
__global__ void add_parts_kernel(int64_t count, int64_t parts, int64_t entries, int lanes,
                                 const double* __restrict__ partial, Put put) {
  const int width = kThreads / lanes, lane = threadIdx.x / width;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * width + threadIdx.x % width;
  const int64_t entry = item % entries, b = item / entries;
  double total = 0;
  for (int64_t part = lane; b < count && part < parts; part += lanes) {
    total += partial[(b * parts + part) * entries + entry];
  }
  total = block_sum(total, width);
  if (lane == 0 && b < count) put(b, entry, total);
}

// partial (count, parts, entries). A thread adds up to eight parts where a block has threads
// enough.
template <typename Put>
void add_parts(const Launcher& launcher, int64_t count, int64_t parts, int64_t entries,
               const Tensor& partial, const Put& put) {
  int lanes = 1;
  while (lanes < kThreads && 8 * lanes < parts) lanes *= 2;
  launcher.threads(count * entries * lanes, add_parts_kernel<Put>, count, parts, entries, lanes,
                   partial.const_data_ptr<double>(), put);
}

// As they come: out (count, entries).
template <typename T>
struct PutInOrder {
  T* out;
  int64_t entries;

  __device__ void operator()(int64_t b, int64_t entry, double total) const {
    out[b * entries + entry] = static_cast<T>(total);
  }
};

}  // namespace torch_kronlik
