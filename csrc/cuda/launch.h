#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <limits>

#include "../checks.h"

namespace torch_kronlik {

constexpr int kThreads = 256;

// The device of an op's tensors, made current while it lives, and the stream to launch on.
class Launcher {
 public:
  explicit Launcher(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // One thread for every item; the kernel compares its thread_index() with its item count.
  template <typename... Params, typename... Args>
  void threads(int64_t items, void (*kernel)(Params...), Args... args) const {
    blocks((items + kThreads - 1) / kThreads, kernel, args...);
  }

  // `count` blocks of kThreads threads.
  template <typename... Params, typename... Args>
  void blocks(int64_t count, void (*kernel)(Params...), Args... args) const {
    blocks_of(kThreads, count, kernel, args...);
  }

  // `count` blocks of `threads` threads; no blocks launch nothing. A call of the runtime instead
  // of <<<>>>, so that tests/cuda_emulation can compile it as C++.
  template <typename... Params, typename... Args>
  void blocks_of(int threads, int64_t count, void (*kernel)(Params...), Args... args) const {
    if (count == 0) return;
    check(count <= std::numeric_limits<int32_t>::max(), "too large for one CUDA grid");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(count));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    cudaLaunchKernelEx(&config, kernel, args...);
    const cudaError_t error = cudaGetLastError();  // taken away, not left for the next to find
    check(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Scratch memory of the current stream.
inline Tensor scratch(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Double);
}

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

// Thread t < width gets the sum over the threads t, t + width, t + 2 width, … of its block, in a
// fixed order; width is a power of two.
__device__ __forceinline__ double block_sum(double value, int width = 1) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = value;
  for (int half = kThreads / 2; half >= width; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  return shared[threadIdx.x];
}

}  // namespace torch_kronlik
