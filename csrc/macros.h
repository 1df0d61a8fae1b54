#pragma once

// KRON_HD: a function that the CPU loops and the CUDA kernels share.
#if defined(__CUDACC__)
#define KRON_HD __host__ __device__ __forceinline__
#else
#define KRON_HD inline __attribute__((always_inline))
#endif

// KRON_CLONES: the function is compiled once per instruction set and picked when the library is
// loaded, so that one binary runs on every x86-64 and is fast on the newer ones. Not under the
// address sanitizer: the choice is made before that is ready.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__CUDACC__) && !defined(__SANITIZE_ADDRESS__)
#define KRON_HAS_CLONES 1
#define KRON_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define KRON_HAS_CLONES 0
#define KRON_CLONES
#endif

// KRON_FLATTEN: all calls are inlined, so that with KRON_CLONES they are part of its clones.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define KRON_FLATTEN __attribute__((flatten))
#else
#define KRON_FLATTEN
#endif
