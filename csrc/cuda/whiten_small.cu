#include <tuple>

#include "../kernels/whiten_small.h"
#include "../shapes.h"
#include "launch.h"
#include "whiten_warp.h"

namespace torch_kronlik {
namespace {

// One warp for each problem.
template <typename T>
__global__ void whiten_problems(WhitenSmall w, const T* __restrict__ k, const T* __restrict__ noise,
                                T* __restrict__ lam, T* __restrict__ R,
                                int64_t* __restrict__ status) {
  __shared__ WhitenWork work;
  __shared__ Whitened found;
  const int64_t b = blockIdx.x, D = w.D;
  const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
  SmallStatus state =
      whiten_by_warp(w.outputs(k, noise, b), static_cast<int>(D), eps, &work, &found);
  bool finite = true;
  if (state == kFine && threadIdx.x < D) {
    finite = store_ascending(found, static_cast<int>(D), static_cast<int>(threadIdx.x), lam + b * D,
                             R + b * D * D);
  }
  if (!__all_sync(kWholeWarp, finite)) state = kNotFinite;
  if (threadIdx.x == 0) status[b] = state;
}

// One block of one thread for each.
template <typename T>
__global__ void noise_logdets(WhitenSmall w, const T* __restrict__ noise, T* __restrict__ logdet) {
  __shared__ WhitenWork work;
  const SmallOutputs<T> x = w.noise_alone(noise, blockIdx.x);
  logdet[blockIdx.x] = static_cast<T>(noise_logdet(x, static_cast<int>(w.D), &work));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> whiten_small(const Tensor& K, const Tensor& noise,
                                                        bool full_noise) {
  const Sizes batch = whiten_small_batch(K, noise, full_noise);
  const WhitenSmall w = whiten_small_of(K, noise, full_noise, batch);
  Tensor lam = torch::stable::new_empty(K, concat(batch, {w.D}));
  Tensor R = torch::stable::new_empty(K, concat(batch, {w.D, w.D}));
  Tensor logdet = torch::stable::new_empty(K, batch_sizes(noise, full_noise ? 2 : 1));
  Tensor status = torch::stable::new_empty(K, batch, ScalarType::Long);
  const Launcher launcher(K);
  dispatch_floating(K, "whiten_small", [&](auto zero) {
    using T = decltype(zero);
    const T* noise_data = noise.const_data_ptr<T>();
    launcher.blocks_of(32, w.k_batch.count, whiten_problems<T>, w, K.const_data_ptr<T>(),
                       noise_data, lam.mutable_data_ptr<T>(), R.mutable_data_ptr<T>(),
                       status.mutable_data_ptr<int64_t>());
    launcher.blocks_of(1, w.own_noise_batch.count, noise_logdets<T>, w, noise_data,
                       logdet.mutable_data_ptr<T>());
  });
  return {lam, R, logdet, status};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) {
  m.impl("whiten_small", TORCH_BOX(&whiten_small));
}

}  // namespace
}  // namespace torch_kronlik
