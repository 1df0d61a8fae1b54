#include "../kernels/whiten_small.h"

#include <limits>
#include <tuple>

#include "../shapes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

template <typename T>
KRON_CLONES SmallStatus one(const SmallOutputs<T>& x, int D, T* lam, T* R) {
  WhitenWork work;
  Whitened found;
  const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
  const SmallStatus status = whiten_small(x, D, eps, &work, &found);
  return status == kFine ? store_ascending(found, D, lam, R) : status;
}

template <typename T>
double noise_logdet_of(const SmallOutputs<T>& x, int D) {
  WhitenWork work;
  return noise_logdet(x, D, &work);
}

template <typename T>
void run(const WhitenSmall& w, const T* k, const T* noise, T* lam, T* R, T* logdet,
         int64_t* status) {
  const int64_t D = w.D;
  parallel_items(w.k_batch.count, 100 * D * D * D, [&](int64_t b) {
    status[b] = one(w.outputs(k, noise, b), static_cast<int>(D), lam + b * D, R + b * D * D);
  });
  parallel_items(w.own_noise_batch.count, 10 * D * D * D, [&](int64_t b) {
    logdet[b] = static_cast<T>(noise_logdet_of(w.noise_alone(noise, b), static_cast<int>(D)));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> whiten_small(const Tensor& K, const Tensor& noise,
                                                        bool full_noise) {
  const Sizes batch = whiten_small_batch(K, noise, full_noise);
  const WhitenSmall w = whiten_small_of(K, noise, full_noise, batch);
  Tensor lam = torch::stable::new_empty(K, concat(batch, {w.D}));
  Tensor R = torch::stable::new_empty(K, concat(batch, {w.D, w.D}));
  Tensor logdet = torch::stable::new_empty(K, batch_sizes(noise, full_noise ? 2 : 1));
  Tensor status = torch::stable::new_empty(K, batch, ScalarType::Long);
  dispatch_floating(K, "whiten_small", [&](auto zero) {
    using T = decltype(zero);
    run(w, K.const_data_ptr<T>(), noise.const_data_ptr<T>(), lam.mutable_data_ptr<T>(),
        R.mutable_data_ptr<T>(), logdet.mutable_data_ptr<T>(), status.mutable_data_ptr<int64_t>());
  });
  return {lam, R, logdet, status};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  m.impl("whiten_small", TORCH_BOX(&whiten_small));
}

}  // namespace
}  // namespace torch_kronlik
