// Kernels with known results and known faults, which show that the emulator sees what it should.

#include <cuda_runtime.h>

#include "../../csrc/cuda/launch.h"

namespace torch_kronlik {
namespace {

// --- right ---------------------------------------------------------------------------------------

__global__ void shuffles(const double* __restrict__ x, double* __restrict__ out) {
  const unsigned t = threadIdx.x, all = ~0u;
  double sum = x[t];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(all, sum, step);
  out[8 * t] = sum;
  out[8 * t + 1] = __shfl_up_sync(all, x[t], 3, 8);
  out[8 * t + 2] = __shfl_down_sync(all, x[t], 3, 8);
  out[8 * t + 3] = __shfl_sync(all, x[t], 5, 8);
  const unsigned half = t % 32 < 16 ? 0xffffu : 0xffff0000u;
  out[8 * t + 4] = __shfl_xor_sync(half, x[t], 15);
  out[8 * t + 5] = __ballot_sync(all, x[t] > 0);
  out[8 * t + 6] = __any_sync(half, x[t] > 2);
  out[8 * t + 7] = __all_sync(half, x[t] > -2);
}

__global__ void reversed(const double* __restrict__ x, double* __restrict__ out) {
  __shared__ double line[kThreads];
  line[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = line[blockDim.x - 1 - threadIdx.x];
}

// --- wrong ---------------------------------------------------------------------------------------

__global__ void no_barrier(const double* __restrict__ x, double* __restrict__ out) {
  __shared__ double line[kThreads];
  line[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = line[blockDim.x - 1 - threadIdx.x];
}

// A warp's barrier is none for threads of another one.
__global__ void warp_barrier(const double* __restrict__ x, double* __restrict__ out) {
  __shared__ double line[kThreads];
  line[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = line[threadIdx.x ^ 1];
  __syncwarp();
  line[threadIdx.x] = line[blockDim.x - 1 - threadIdx.x];
}

// A shuffle makes lanes wait for each other, but not for what they write to memory.
__global__ void shuffle_as_barrier(const double* __restrict__ x, double* __restrict__ out) {
  __shared__ double line[kThreads];
  line[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = __shfl_sync(~0u, x[threadIdx.x], 0) + line[threadIdx.x ^ 1];
}

__global__ void overwritten_too_early(const double* __restrict__ x, double* __restrict__ out) {
  out[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const double other = out[threadIdx.x ^ 1];
  out[threadIdx.x] = other;
}

__global__ void returns_early(const double* __restrict__ x, double* __restrict__ out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void two_barriers(const double* __restrict__ x, double* __restrict__ out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void absent_lane(const double* __restrict__ x, double* __restrict__ out) {
  if (threadIdx.x % 32 == 9) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
}

__global__ void not_aligned(const double* __restrict__ x, double* __restrict__ out) {
  struct alignas(16) Pair {
    double a, b;
  };
  out[threadIdx.x] = reinterpret_cast<const Pair*>(x + 1)[threadIdx.x / 4].a;
}

__global__ void past_the_end(const double* __restrict__ x, double* __restrict__ out) {
  __shared__ double line[16];
  line[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = line[0];
}

__global__ void not_written(const double* __restrict__ x, double* __restrict__ out) {
  __shared__ double line[kThreads];
  if (x[threadIdx.x] > 1e9) line[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = line[threadIdx.x];
}

using Kernel = void (*)(const double*, double*);

const std::pair<const char*, Kernel> kKernels[] = {
    {"shuffles", shuffles},
    {"reversed", reversed},
    {"no_barrier", no_barrier},
    {"warp_barrier", warp_barrier},
    {"shuffle_as_barrier", shuffle_as_barrier},
    {"overwritten_too_early", overwritten_too_early},
    {"returns_early", returns_early},
    {"two_barriers", two_barriers},
    {"absent_lane", absent_lane},
    {"not_aligned", not_aligned},
    {"past_the_end", past_the_end},
    {"not_written", not_written},
};

// `values` numbers from each thread of one block.
Tensor self_test(std::string name, const Tensor& x, int64_t values) {
  Tensor out = torch::stable::new_empty(x, {x.numel(), values});
  for (const auto& [known, kernel] : kKernels) {
    if (name == known) {
      Launcher(x).blocks_of(static_cast<int>(x.numel()), 1, kernel, x.const_data_ptr<double>(),
                            out.mutable_data_ptr<double>());
    }
  }
  return out;
}

STABLE_TORCH_LIBRARY(torch_kronlik, m) {
  m.def("self_test(str name, Tensor x, int values) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) { m.impl("self_test", TORCH_BOX(&self_test)); }

}  // namespace
}  // namespace torch_kronlik
