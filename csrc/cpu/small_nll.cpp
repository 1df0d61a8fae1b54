#include <algorithm>
#include <tuple>

#include "../shapes.h"
#include "parallel.h"
#include "small_problem.h"

namespace torch_kronlik {
namespace {

constexpr int64_t kMaxSmallT = 128;  // a thread's scratch stays in its cache

// The lanes are `problems` problems times `width` columns of the whitened basis, which take
// `passes` passes. Every sum of a problem runs over its columns in order: its bits do not depend on
// this.
struct Grouping {
  int64_t width, problems, passes, groups;
  Grouping(int64_t width, int64_t lanes, int64_t D, int64_t count)
      : width(width),
        problems(lanes / width),
        passes((D + width - 1) / width),
        groups((count + problems - 1) / problems) {}
};

// Columns of one problem side by side where problems are few, else problems side by side: then no
// sum runs across lanes.
Grouping grouping_of(int64_t lanes, int64_t D, int64_t count) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto rounds = [&](const Grouping& g) {
    return (g.groups + threads - 1) / threads * g.passes;
  };
  const Grouping columns(std::min(D, lanes), lanes, D, count), problems(1, lanes, D, count);
  return rounds(columns) < rounds(problems) ? columns : problems;
}

template <typename T, int kBytes>
class Worker {
 public:
  using V = typename LanesOf<T, kBytes>::type;
  static constexpr int kLanes = kBytes / sizeof(T);
  using Wide = typename LanesOf<double, kLanes * sizeof(double)>::type;

  Worker(const SmallNll& s, const SmallTensors<T>& t, bool gradients, const Grouping& grouping)
      : s_(s),
        t_(t),
        gradients_(gradients),
        grouping_(grouping),
        N_(tiles_of(s.T)),
        M_(tile_at(N_, 0)),
        C_(tile_at(N_, 0)),
        X_(gradients ? tile_at(N_, 0) : 0),
        G_(gradients ? tile_at(N_, 0) : 0),
        w_(padded(s.T)),
        x_(padded(s.T)),
        mx_(padded(s.T)) {
    const int64_t most = std::min(grouping.problems, s.y_batch.count);
    problems_.reserve(most);
    for (int64_t p = 0; p < most; ++p) problems_.emplace_back(s.T, s.D);
  }

  void run(int64_t group) {
    const int64_t first = group * grouping_.problems;
    count_ = std::min(grouping_.problems, s_.y_batch.count - first);
    for (int64_t p = 0; p < count_; ++p) load_problem(s_, t_, first + p, problems_[p]);
    passes(*this);
    for (int64_t p = 0; p < count_; ++p) {
      store_value(s_, t_, first + p, problems_[p]);
      if (gradients_)
        store_gradients(s_, t_, first + p, problems_[p], reinterpret_cast<T*>(&G_[0]) + p, kLanes);
    }
  }

 private:
  // All that is done in lanes is compiled into this, for the instruction set that it runs on.
  KRON_CLONES KRON_FLATTEN static void passes(Worker& worker) {
    for (int64_t p = 0; p < worker.count_; ++p) worker.load_M(p);
    if (worker.gradients_) std::fill(&worker.G_[0], &worker.G_[tile_at(worker.N_, 0)], V{});
    for (int64_t j = 0; j < worker.s_.D; j += worker.grouping_.width) worker.pass(j);
  }

  // M of one problem in its lanes; of the first in all of them, so that none is empty.
  void load_M(int64_t p) {
    if (p == 0) {
      for_entries(p, [&](int64_t at, T entry) { M_[at] = V{} + entry; });
      return;
    }
    for (int64_t l = p * grouping_.width; l < (p + 1) * grouping_.width; ++l) {
      for_entries(p, [&](int64_t at, T entry) { M_[at][l] = entry; });
    }
  }

  // Calls f(place, entry) for the tiles of a problem's M.
  template <typename F>
  void for_entries(int64_t p, const F& f) const {
    const int64_t n = padded(s_.T);
    for (int64_t I = 0; I < N_; ++I) {
      for (int64_t J = 0; J <= I; ++J) {
        const T* m = &problems_[p].m[I * kTile * n + J * kTile];
        for (int e = 0; e < kTileSize; ++e) f(tile_at(I, J) + e, m[e % kTile * n + e / kTile]);
      }
    }
  }

  // Calls f(lane, its problem, its j) for every lane in use.
  template <typename F>
  void for_lanes(int64_t first, const F& f) {
    const int64_t width = std::min(grouping_.width, s_.D - first);
    for (int64_t p = 0; p < count_; ++p) {
      for (int64_t j = 0; j < width; ++j) f(p * grouping_.width + j, problems_[p], first + j);
    }
  }

  // The columns first, …, first + width - 1 of every problem.
  void pass(int64_t first) {
    V lam = {};
    std::fill(&w_[0], &w_[padded(s_.T)], V{});
    for_lanes(first, [&](int64_t l, SmallProblem<T>& p, int64_t j) {
      lam[l] = static_cast<T>(p.basis.lam[j]);
      for (int64_t i = 0; i < s_.T; ++i) {
        w_[i][l] = static_cast<T>(p.rotated[j * padded(s_.T) + i]);
      }
    });
    for (int64_t e = 0; e < tile_at(N_, 0); ++e) C_[e] = lam * M_[e];
    for (int64_t i = 0; i < padded(s_.T); ++i) C_[entry_at(i, i)] += 1;
    cholesky(&C_[0], N_);
    substitute(&C_[0], &w_[0], N_);
    Wide quad = {};
    for (int64_t i = 0; i < s_.T; ++i) {
      const Wide w = __builtin_convertvector(w_[i], Wide);
      quad += w * w;
    }
    for_lanes(first, [&](int64_t l, SmallProblem<T>& p, int64_t) {
      p.quad += quad[l];
      p.logdet -= 2 * log_diagonal(l);
    });
    if (gradients_) inverses(first, lam);
  }

  // The sum of the logarithms, as logarithms of products that stay in the range of doubles.
  double log_diagonal(int64_t l) const {
    double sum = 0, product = 1;
    for (int64_t i = 0; i < s_.T; ++i) {
      product *= static_cast<double>(C_[entry_at(i, i)][l]);
      if (!(product > 1e-150 && product < 1e150)) {
        sum += std::log(product);
        product = 1;
      }
    }
    return sum + std::log(product);
  }

  void inverses(int64_t first, const V& lam) {
    invert(&C_[0], N_, &X_[0]);
    back_multiply(&X_[0], &w_[0], &x_[0], N_);
    multiply(&M_[0], &x_[0], &mx_[0], N_);
    gram(&X_[0], N_, &C_[0]);
    double trace[kLanes] = {}, trace_M[kLanes] = {};
    for (int64_t i = 0; i < s_.T; ++i) {
      for (int l = 0; l < kLanes; ++l) trace[l] += static_cast<double>(C_[entry_at(i, i)][l]);
    }
    for (int64_t I = 0; I < N_; ++I) {
      for (int64_t J = 0; J <= I; ++J) finish_tile(I, J, lam, trace_M);
    }
    if (grouping_.width == 1) {
      for (int64_t e = 0; e < tile_at(N_, 0); ++e) G_[e] += C_[e];
    } else {
      for (int64_t e = 0; e < tile_at(N_, 0); ++e) add_lanes(C_[e], G_[e]);
    }
    for_lanes(first, [&](int64_t l, SmallProblem<T>& p, int64_t j) {
      p.trace[j] = trace[l];
      p.trace_M[j] = trace_M[l];
      for (int64_t i = 0; i < padded(s_.T); ++i) {
        p.X[j * padded(s_.T) + i] = static_cast<double>(x_[i][l]);
        p.MX[j * padded(s_.T) + i] = static_cast<double>(mx_[i][l]);
      }
    });
  }

  // tr M C_j⁻¹, and C_j⁻¹ -> λ_j (C_j⁻¹ - x_j x_jᵀ), whose sum is 2 gM since A K Aᵀ = X Diag(λ) Xᵀ.
  void finish_tile(int64_t I, int64_t J, const V& lam, double* trace_M) {
    V* C = &C_[tile_at(I, J)];
    const V* M = &M_[tile_at(I, J)];
    V sum[kTile] = {};
    for (int c = 0; c < kTile; ++c) {
      for (int r = 0; r < kTile; ++r, ++C, ++M) {
        sum[c] += *M * *C;
        *C = lam * (*C - x_[I * kTile + r] * x_[J * kTile + c]);
      }
    }
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const double weight = I == J ? 1 : 2;
    for (int l = 0; l < kLanes; ++l) trace_M[l] += weight * static_cast<double>(sum[0][l]);
  }

  // What the lanes of problem p hold, into lane p of G.
  void add_lanes(const V& C, V& G) {
    const int64_t width = grouping_.width;
    for (int64_t p = 0; p < count_; ++p) {
      T sum = G[p];
      for (int64_t l = p * width; l < (p + 1) * width; ++l) sum += C[l];
      G[p] = sum;
    }
  }

  const SmallNll& s_;
  const SmallTensors<T>& t_;
  const bool gradients_;
  const Grouping grouping_;
  const int64_t N_;  // tile rows
  // C: λ_j M + I, then L, at last λ_j (C_j⁻¹ - x_j x_jᵀ). X: L⁻¹. G: 2 gM of problem p in lane p.
  const Buffer<V> M_, C_, X_, G_;
  const Buffer<V> w_, x_, mx_;  // L⁻¹ ỹ_j, x_j, M x_j
  std::vector<SmallProblem<T>> problems_;
  int64_t count_ = 0;  // of them in this group
};

template <typename T, int kBytes>
void run_lanes(const SmallNll& s, const SmallTensors<T>& t, bool gradients,
               const Grouping& grouping) {
  const int64_t work = s.T * s.T * s.T * grouping.passes * kBytes / sizeof(T);
  torch::stable::parallel_for(0, grouping.groups,
                              std::max<int64_t>((1 << 16) / std::max<int64_t>(work, 1), 1),
                              [&](int64_t begin, int64_t end) {
                                Worker<T, kBytes> worker(s, t, gradients, grouping);
                                for (int64_t g = begin; g < end; ++g) worker.run(g);
                              });
}

// Vectors no wider than the registers of this machine, and than there is work for.
template <typename T>
void run(const SmallNll& s, const SmallTensors<T>& t, bool gradients) {
  constexpr int64_t kSize = sizeof(T);
  const Grouping grouping = grouping_of(vector_bytes() / kSize, s.D, s.y_batch.count);
  const int64_t lanes = std::min(grouping.problems, s.y_batch.count) * grouping.width;
  if (lanes * kSize <= 16) return run_lanes<T, 16>(s, t, gradients, grouping);
  if (lanes * kSize <= 32) return run_lanes<T, 32>(s, t, gradients, grouping);
  return run_lanes<T, 64>(s, t, gradients, grouping);
}

auto small_nll(const Tensor& Y, const Tensor& M, const Tensor& K, const Tensor& noise,
               bool full_noise, bool gradients) {
  const Sizes batch = small_batch(Y, M, K, noise, full_noise);
  const SmallNll s = small_nll_of(Y, M, K, noise, full_noise, batch, kMaxSmallT);
  SmallResults results(s, Y, batch, gradients);
  dispatch_floating(Y, "small_nll", [&](auto zero) {
    run(s, results.data<decltype(zero)>(Y, M, K, noise), gradients);
  });
  return results.as_tuple();
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) { m.impl("small_nll", TORCH_BOX(&small_nll)); }

}  // namespace
}  // namespace torch_kronlik
