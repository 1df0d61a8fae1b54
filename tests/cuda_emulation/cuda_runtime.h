#pragma once

// Stands in for CUDA's header of this name, so that a C++ compiler makes a CPU library of the
// unchanged kernels. The threads of a block are fibers of one thread, see emulator.cpp; what is
// shared by a block is thread-local, which gives the emulator one piece of memory to poison.

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 gridDim, blockDim, blockIdx, threadIdx;
constexpr int warpSize = 32;

using std::max;
using std::min;
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <typename T>
T __ldg(const T* x) {
  return *x;
}

// --- launches ------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);

namespace emulation {
void run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
}

template <typename... Params, typename... Args>
void cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                        Args&&... args) {
  // The arguments that every thread copies are no concern of the search for races.
  emulation::run_grid(*config, [&]() __attribute__((no_sanitize("thread"))) { kernel(args...); });
}

// --- where threads meet --------------------------------------------------------------------------

namespace emulation {

struct Site {
  const char* file;
  int line;
};

void barrier(Site site);
// The lanes of mask meet; gives what each of them offered.
const uint64_t* gather(unsigned mask, uint64_t offered, Site site, bool orders_memory = false);
int lane();
[[noreturn]] void fail(const std::string& what, Site site);

// What lane `source` offers, or this lane's own value where the source is outside of its segment.
template <typename T>
T shuffle(unsigned mask, T value, int source, bool inside, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = gather(mask, bits, site);
  if (!inside) return value;
  if (!(mask >> source & 1)) fail("a shuffle reads a lane that is not in its mask", site);
  std::memcpy(&value, &all[source], sizeof(T));
  return value;
}

}  // namespace emulation

#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_SITE) { emulation::barrier({file, line}); }

inline void __syncwarp(unsigned mask = ~0u, EMULATION_SITE) {
  emulation::gather(mask, 0, {file, line}, true);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_SITE) {
  const int own = emulation::lane();
  return emulation::shuffle(mask, value, (own & -width) | (source & (width - 1)), true,
                            {file, line});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_SITE) {
  const int own = emulation::lane(), from = own - static_cast<int>(delta);
  return emulation::shuffle(mask, value, from, from >= (own & -width), {file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_SITE) {
  const int own = emulation::lane(), from = own + static_cast<int>(delta);
  return emulation::shuffle(mask, value, from, from < (own & -width) + width, {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_SITE) {
  const int own = emulation::lane(), from = own ^ bits;
  return emulation::shuffle(mask, value, from, from < (own & -width) + width, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, bool vote, EMULATION_SITE) {
  const uint64_t* all = emulation::gather(mask, vote, {file, line});
  unsigned result = 0;
  for (int l = 0; l < 32; ++l) result |= (mask >> l & 1) && all[l] ? 1u << l : 0;
  return result;
}

inline bool __any_sync(unsigned mask, bool vote, EMULATION_SITE) {
  return __ballot_sync(mask, vote, file, line) != 0;
}

inline bool __all_sync(unsigned mask, bool vote, EMULATION_SITE) {
  return __ballot_sync(mask, !vote, file, line) == 0;
}

#undef EMULATION_SITE
