#pragma once

// Two LAPACK routines, where the process has them: libtorch_cpu exports them on x86-64 Linux and
// not everywhere else, so that they are weak symbols and their callers ask first.

#include <cstdint>

#if defined(__linux__) && defined(__x86_64__)
#define KRON_LAPACK __attribute__((weak))
extern "C" {
KRON_LAPACK void spotrf_(const char*, const int*, float*, const int*, int*);
KRON_LAPACK void dpotrf_(const char*, const int*, double*, const int*, int*);
KRON_LAPACK void spotri_(const char*, const int*, float*, const int*, int*);
KRON_LAPACK void dpotri_(const char*, const int*, double*, const int*, int*);
}

namespace torch_kronlik {

inline bool has_lapack() { return spotrf_ && dpotrf_ && spotri_ && dpotri_; }

// A = L Lᵀ in the lower triangle of the row-major A: 0, or the order of the minor that failed.
inline int potrf(float* A, int n) {
  int info = 0;
  const int ld = n > 1 ? n : 1;
  spotrf_("U", &n, A, &ld, &info);
  return info;
}
inline int potrf(double* A, int n) {
  int info = 0;
  const int ld = n > 1 ? n : 1;
  dpotrf_("U", &n, A, &ld, &info);
  return info;
}

// (L Lᵀ)⁻¹ from L, in place.
inline void potri(float* A, int n) {
  int info = 0;
  const int ld = n > 1 ? n : 1;
  spotri_("U", &n, A, &ld, &info);
}
inline void potri(double* A, int n) {
  int info = 0;
  const int ld = n > 1 ? n : 1;
  dpotri_("U", &n, A, &ld, &info);
}

}  // namespace torch_kronlik
#else
namespace torch_kronlik {

inline bool has_lapack() { return false; }
template <typename T>
int potrf(T*, int) {
  return 0;
}
template <typename T>
void potri(T*, int) {}

}  // namespace torch_kronlik
#endif
