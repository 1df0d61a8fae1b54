#include "../kernels/small_nll.h"

#include <cstring>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../shapes.h"
#include "lanes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

template <typename T>
struct Tensors {
  const T *y, *m, *k, *noise;
  T *nll, *gy, *gm, *gk, *gnoise;
  int64_t* status;
};

// The lanes are `problems` problems times `width` columns of the whitened basis: all D of them, or
// where D exceeds the lanes one problem takes several passes.
struct Grouping {
  int64_t width, problems;
  Grouping(int64_t D, int64_t lanes) : width(std::min(D, lanes)), problems(lanes / width) {}
};

// What one problem needs beside the lanes.
template <typename T>
struct Problem {
  Whitened basis;
  SmallStatus status = kFine;
  double logdet = 0, quad = 0;
  double trace[kMaxSmallD] = {}, trace_M[kMaxSmallD] = {};  // tr C_j⁻¹ and tr M C_j⁻¹
  std::vector<T> m, data, X, G;                             // M, Y R, C_j⁻¹ (Y R)_j, Σ λ_j C_j⁻¹

  void resize(int64_t t, int64_t d) {
    m.resize(t * t);
    G.resize(t * t);
    data.resize(t * d);
    X.resize(t * d);
  }
};

// gm = ½ (gm - A K Aᵀ), and (M A)ᵀ, from Aᵀ and A K.
template <typename T>
KRON_CLONES void outer_products(const T* m, const T* At, const T* AK, int64_t n, int64_t D, T* gm,
                                T* MAt) {
  for (int64_t i = 0; i < n; ++i) {
    T* row = gm + i * n;
    for (int64_t d = 0; d < D; ++d) {
      const T factor = AK[i * D + d];
      const T* other = At + d * n;
      for (int64_t k = 0; k < n; ++k) row[k] -= factor * other[k];
    }
    for (int64_t k = 0; k < n; ++k) row[k] *= T(0.5);
  }
  for (int64_t d = 0; d < D; ++d) {
    T* row = MAt + d * n;
    for (int64_t k = 0; k < n; ++k) row[k] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T factor = At[d * n + i];
      for (int64_t k = 0; k < n; ++k) row[k] += factor * m[i * n + k];
    }
  }
}

template <typename T>
class Worker {
 public:
  using V = Lanes<T>;

  Worker(const SmallNll& s, const Tensors<T>& t, bool gradients)
      : s_(s),
        t_(t),
        gradients_(gradients),
        grouping_(s.D, V::kCount),
        C_(s.T * s.T + 4),
        w_(s.T),
        x_(s.T),
        At_(s.T * s.D),
        AK_(s.T * s.D),
        MA_(s.T * s.D) {
    for (Problem<T>& p : problems_) p.resize(s.T, s.D);
  }

  void run(int64_t group) {
    const int64_t first = group * grouping_.problems;
    const int64_t count = std::min(grouping_.problems, s_.y_batch.count - first);
    for (int64_t p = 0; p < count; ++p) load(first + p, problems_[p]);
    for (int64_t j = 0; j < s_.D; j += grouping_.width) pass(count, j);
    for (int64_t p = 0; p < count; ++p) store(first + p, problems_[p]);
  }

 private:
  void load(int64_t b, Problem<T>& p) {
    const T* m = t_.m + s_.m_batch.offset(b);
    const T* y = t_.y + s_.y_batch.offset(b);
    p.logdet = p.quad = 0;
    const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
    const int D = static_cast<int>(s_.D);
    p.status = whiten_small(outputs(b), D, eps, &work_, &p.basis);
    if (p.status != kFine) spoil(&p.basis, D);
    double zero = 0;
    for (int64_t i = 0; i < s_.T; ++i) {
      for (int64_t k = 0; k < s_.T; ++k) {
        p.m[i * s_.T + k] = m[i * s_.m_row + k * s_.m_col];
        zero += range_test(p.basis, p.m[i * s_.T + k]);
      }
    }
    if (p.status == kFine && !(zero == 0)) {
      p.status = kNotFinite;
      spoil(&p.basis, D);
    }
    for (int64_t i = 0; i < s_.T; ++i) {
      for (int64_t j = 0; j < s_.D; ++j) {
        double sum = 0;
        for (int64_t d = 0; d < s_.D; ++d) {
          sum += static_cast<double>(y[i * s_.y_row + d * s_.y_col]) * p.basis.R[d * s_.D + j];
        }
        p.data[i * s_.D + j] = static_cast<T>(sum);
      }
    }
    if (gradients_) std::fill(p.G.begin(), p.G.end(), T(0));
  }

  SmallOutputs<T> outputs(int64_t b) const {
    return {t_.k + s_.k_batch.offset(b),
            s_.k_row,
            s_.k_col,
            t_.noise + s_.noise_batch.offset(b),
            s_.noise_row,
            s_.noise_col,
            s_.full_noise};
  }

  // The columns first, …, first + width - 1 of `count` problems.
  void pass(int64_t count, int64_t first) {
    const int64_t n = s_.T, width = grouping_.width;
    LaneInfo<T> info;
    for (int l = 0; l < V::kCount; ++l) {
      const int64_t p = l / width, j = first + l % width;
      const bool used = p < count && j < s_.D;
      info.lam[l] = used ? static_cast<T>(problems_[p].basis.lam[j]) : T(0);
      info.m[l] = problems_[used ? p : 0].m.data();
      for (int64_t i = 0; i < n; ++i) w_[i].v[l] = used ? problems_[p].data[i * s_.D + j] : T(0);
    }
    load_C(C_.data(), n, info);
    cholesky(C_.data(), n);
    substitute(C_.data(), w_.data(), n);
    double logdet[V::kCount] = {}, quad[V::kCount] = {};
    for (int64_t i = 0; i < n; ++i) {
      for (int l = 0; l < V::kCount; ++l) {
        logdet[l] -= 2 * std::log(static_cast<double>(C_[i * n + i].v[l]));
        quad[l] += static_cast<double>(w_[i].v[l]) * static_cast<double>(w_[i].v[l]);
      }
    }
    for (int64_t l = 0; l < count * width; ++l) {
      if (first + l % width >= s_.D) continue;
      problems_[l / width].logdet += logdet[l];
      problems_[l / width].quad += quad[l];
    }
    if (gradients_) inverses(count, first, info);
  }

  void inverses(int64_t count, int64_t first, const LaneInfo<T>& info) {
    const int64_t n = s_.T, width = grouping_.width;
    invert(C_.data(), x_.data(), n);
    back_multiply(C_.data(), w_.data(), x_.data(), n);
    double trace[V::kCount] = {}, trace_M[V::kCount] = {};
    for (int64_t a = 0; a < n; ++a) {
      for (int64_t b = 0; b <= a; b += 4) {
        V entry[4];
        inverse_entries(C_.data(), n, a, b, entry);
        for (int64_t c = 0; c < 4 && b + c <= a; ++c) {
          accumulate(entry[c], info, count, a, b + c, trace, trace_M);
        }
      }
    }
    for (int64_t l = 0; l < count * width; ++l) {
      const int64_t j = first + l % width;
      if (j >= s_.D) continue;
      Problem<T>& p = problems_[l / width];
      p.trace[j] = trace[l];
      p.trace_M[j] = trace_M[l];
      for (int64_t i = 0; i < n; ++i) p.X[i * s_.D + j] = x_[i].v[l];
    }
  }

  void accumulate(const V& entry, const LaneInfo<T>& info, int64_t count, int64_t a, int64_t b,
                  double* trace, double* trace_M) {
    const int64_t at = a * s_.T + b, width = grouping_.width;
    for (int64_t p = 0; p < count; ++p) {
      T sum = 0;
      for (int64_t l = p * width; l < (p + 1) * width; ++l) {
        sum += info.lam[l] * entry.v[l];
        const double product = static_cast<double>(entry.v[l] * info.m[l][at]);
        trace_M[l] += a == b ? product : 2 * product;
        if (a == b) trace[l] += static_cast<double>(entry.v[l]);
      }
      problems_[p].G[at] += sum;
    }
  }

  void store(int64_t b, Problem<T>& p) {
    const double log_2pi = 1.8378770664093454836;
    const double total = p.logdet + static_cast<double>(s_.T) * p.basis.logdet_noise + p.quad +
                         static_cast<double>(s_.T * s_.D) * log_2pi;
    if (p.status == kFine && !std::isfinite(p.logdet)) p.status = kCovariancePositive;
    const T nll = static_cast<T>(0.5 * total);
    if (p.status == kFine && !std::isfinite(nll)) p.status = kNotFinite;
    t_.status[b] = p.status;
    t_.nll[b] = nll;
    if (gradients_) store_gradients(b, p);
  }

  void store_gradients(int64_t b, const Problem<T>& p) {
    const int64_t n = s_.T, D = s_.D;
    const SmallOutputs<T> o = outputs(b);
    const double* R = p.basis.R;
    T *gy = t_.gy + b * n * D, *gm = t_.gm + b * n * n;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t j = 0; j < D; ++j) {
          sum += static_cast<double>(p.X[i * D + j]) * R[d * D + j];
        }
        gy[i * D + d] = At_[d * n + i] = static_cast<T>(sum);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t e = 0; e < D; ++e) sum += static_cast<double>(gy[i * D + e]) * o.K(e, d);
        AK_[i * D + d] = static_cast<T>(sum);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < n; ++k) gm[i * n + k] = p.G[std::max(i, k) * n + std::min(i, k)];
    }
    outer_products(p.m.data(), At_.data(), AK_.data(), n, D, gm, MA_.data());
    T* gk = t_.gk + b * D * D;
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t e = 0; e < D; ++e) {
        gk[d * D + e] =
            static_cast<T>(0.5 * (weighted(R, p.trace_M, d, e) - dot(&At_[d * n], &MA_[e * n])));
      }
    }
    store_noise(b, p);
  }

  void store_noise(int64_t b, const Problem<T>& p) {
    const int64_t D = s_.D, size = s_.full_noise ? D * D : D;
    T* g = t_.gnoise + b * size;
    for (int64_t at = 0; at < size; ++at) {
      const int64_t d = s_.full_noise ? at / D : at, e = s_.full_noise ? at % D : at;
      // exp(s) itself may overflow.
      const double root = s_.full_noise ? 1.0 : std::exp(0.5 * outputs(b).log_noise(d));
      g[at] = static_cast<T>(0.5 * (weighted(p.basis.R, p.trace, d, e, root) -
                                    dot(&At_[d * s_.T], &At_[e * s_.T], root)));
    }
  }

  double weighted(const double* R, const double* weights, int64_t d, int64_t e,
                  double scale = 1) const {
    double sum = 0;
    for (int64_t j = 0; j < s_.D; ++j) {
      sum += (scale * R[d * s_.D + j]) * weights[j] * (scale * R[e * s_.D + j]);
    }
    return sum;
  }

  double dot(const T* a, const T* b, double scale = 1) const {
    double sum = 0;
    for (int64_t i = 0; i < s_.T; ++i) {
      sum += (scale * static_cast<double>(a[i])) * (scale * static_cast<double>(b[i]));
    }
    return sum;
  }

  const SmallNll& s_;
  const Tensors<T>& t_;
  const bool gradients_;
  const Grouping grouping_;
  std::vector<V> C_, w_, x_;
  std::vector<T> At_, AK_, MA_;
  Problem<T> problems_[V::kCount];
  WhitenWork work_;
};

template <typename T>
void run(const SmallNll& s, const Tensors<T>& t, bool gradients) {
  const Grouping grouping(s.D, Lanes<T>::kCount);
  const int64_t groups = (s.y_batch.count + grouping.problems - 1) / grouping.problems;
  const int64_t work = s.T * s.T * s.T * Lanes<T>::kCount;
  torch::stable::parallel_for(0, groups,
                              std::max<int64_t>((1 << 16) / std::max<int64_t>(work, 1), 1),
                              [&](int64_t begin, int64_t end) {
                                Worker<T> worker(s, t, gradients);
                                for (int64_t g = begin; g < end; ++g) worker.run(g);
                              });
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results small_nll(const Tensor& Y, const Tensor& M, const Tensor& K, const Tensor& noise,
                  bool full_noise, bool gradients) {
  const Sizes batch = small_batch(Y, M, K, noise, full_noise);
  const SmallNll s = small_nll_of(Y, M, K, noise, full_noise, batch);
  const auto grad = [&](std::initializer_list<int64_t> core) {
    return torch::stable::new_empty(Y, gradients ? concat(batch, core) : Sizes{0});
  };
  Tensor nll = torch::stable::new_empty(Y, batch);
  Tensor status = torch::stable::new_empty(Y, batch, ScalarType::Long);
  Tensor gy = grad({s.T, s.D}), gm = grad({s.T, s.T}), gk = grad({s.D, s.D});
  Tensor gnoise = full_noise ? grad({s.D, s.D}) : grad({s.D});
  dispatch_floating(Y, "small_nll", [&](auto zero) {
    using T = decltype(zero);
    run(s,
        Tensors<T>{Y.const_data_ptr<T>(), M.const_data_ptr<T>(), K.const_data_ptr<T>(),
                   noise.const_data_ptr<T>(), nll.mutable_data_ptr<T>(), gy.mutable_data_ptr<T>(),
                   gm.mutable_data_ptr<T>(), gk.mutable_data_ptr<T>(), gnoise.mutable_data_ptr<T>(),
                   status.mutable_data_ptr<int64_t>()},
        gradients);
  });
  return {nll, gy, gm, gk, gnoise, status};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) { m.impl("small_nll", TORCH_BOX(&small_nll)); }

}  // namespace
}  // namespace torch_kronlik
