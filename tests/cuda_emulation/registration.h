#pragma once

// Included before every source. Its operators become CPU kernels of torch_kronlik_emulated, or,
// with EMULATED_DEVICE defined, torch_kronlik's kernels for the emulated device (device.cpp).

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) \
  _STABLE_TORCH_LIBRARY_FRAGMENT(torch_kronlik_emulated, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_IMPL
#ifdef EMULATED_DEVICE
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, PrivateUse1, m, C10_UID)
#else
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(torch_kronlik_emulated, CPU, m, C10_UID)
#endif
