#include <torch/csrc/stable/library.h>

#include <vector>

namespace {

// Compute capabilities with code of their own in this library: 800 is 8.0.
std::vector<int64_t> cuda_architectures() { return {__CUDA_ARCH_LIST__}; }

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}

}  // namespace
