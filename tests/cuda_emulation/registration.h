#pragma once

// Included before every source: its operators become CPU kernels of torch_kronlik_emulated.

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) \
  _STABLE_TORCH_LIBRARY_FRAGMENT(torch_kronlik_emulated, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(torch_kronlik_emulated, CPU, m, C10_UID)
