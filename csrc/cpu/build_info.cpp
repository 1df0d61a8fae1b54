#include <torch/csrc/stable/library.h>

#include <string>

#include "../macros.h"
#include "lapack.h"

namespace {

// Which clone of the CPU kernels runs on this machine.
std::string cpu_instruction_set() {
#if KRON_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("has_lapack", TORCH_BOX(&torch_kronlik::has_lapack));
}

}  // namespace
