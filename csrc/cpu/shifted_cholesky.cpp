#include "../kernels/shifted_cholesky.h"

#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "../shapes.h"
#include "lapack.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

constexpr int64_t kRows = 64;
constexpr int64_t kTile = 32;

template <typename T>
KRON_CLONES void fill(const T* m, const ShiftedCholesky& c, T lam, int64_t begin, int64_t end,
                      T* L) {
  shifted_rows(m, c.m_row, c.m_col, lam, begin, end, c.T, L);
}

template <typename T>
KRON_CLONES double accumulate(const T* inverse, const T* m, const ShiftedCholesky& c, T lam,
                              int64_t begin, int64_t end, T* rows) {
  double with_M = 0;
  for (int64_t i = begin; i < end; ++i) {
    with_M += add_row(inverse + i * c.T, m + i * c.m_row, c.m_col, lam, i, rows + i * c.T);
  }
  return with_M + above_diagonal(inverse, m, c.m_row, c.m_col, begin, end, c.T);
}

// The upper triangle from the lower one, for the rows of one strip.
template <typename T>
void reflect(int64_t n, int64_t begin, int64_t end, T* rows) {
  for (int64_t k0 = begin; k0 < n; k0 += kTile) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = std::max(k0, i + 1); k < std::min(k0 + kTile, n); ++k) {
        rows[i * n + k] = rows[k * n + i];
      }
    }
  }
}

// f(first row, last row + 1) for strips of rows, in parallel.
template <typename F>
void strips(int64_t n, int64_t height, const F& f) {
  parallel_items((n + height - 1) / height, height * n / 2,
                 [&](int64_t strip) { f(strip * height, std::min(n, (strip + 1) * height)); });
}

// LAPACK's own threads gain little on matrices of this kind, and lose where the machine is shared:
// a few threads are better given to one matrix each, and many are left to LAPACK.
bool one_thread_each(int64_t items) {
  const int64_t threads = torch::stable::get_num_threads();
  return items > 1 && threads > 1 && (threads <= 4 || threads <= items);
}

template <typename F>
void problems(int64_t count, const F& f) {
  if (one_thread_each(count)) return parallel_items(count, int64_t{1} << 40, f);
  for (int64_t item = 0; item < count; ++item) f(item);
}

template <typename T>
double log_diagonal(const T* L, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::log(static_cast<double>(L[i * (n + 1)]));
  return 2 * sum;
}

template <typename T>
void factorise(const ShiftedCholesky& c, const T* m, const T* lam, T* L, T* logdet,
               int64_t* status) {
  problems(c.m_batch.count * c.n, [&](int64_t item) {
    const int64_t b = item / c.n, j = item % c.n;
    const T* own = m + c.m_batch.offset(b);
    const T own_lam = lam[c.lam_batch.offset(b) + j * c.lam_stride];
    T* to = L + item * c.T * c.T;
    strips(c.T, kRows, [&](int64_t begin, int64_t end) { fill(own, c, own_lam, begin, end, to); });
    status[item] = potrf(to, static_cast<int>(c.T));
    logdet[item] = static_cast<T>(log_diagonal(to, c.T));
    if (!std::isfinite(logdet[item])) status[item] = 1;
  });
}

// Adds λ_j C_j⁻¹ of one problem to `sum` for a few j at once, in this order for every entry, so
// that the result does not depend on how many they are.
template <typename T>
void add_inverses(const ShiftedCholesky& c, const T* m, const T* lam, const T* inverses,
                  int64_t few, T* sum, T* with_M, T* plain) {
  const int64_t size = c.T * c.T, count = (c.T + kRows - 1) / kRows;
  std::vector<double> partial(few * count);
  strips(c.T, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t j = 0; j < few; ++j) {
      partial[j * count + begin / kRows] =
          accumulate(inverses + j * size, m, c, lam[j * c.lam_stride], begin, end, sum);
    }
  });
  for (int64_t j = 0; j < few; ++j) {
    double total = 0, trace = 0;
    for (int64_t s = 0; s < count; ++s) total += partial[j * count + s];
    for (int64_t i = 0; i < c.T; ++i) {
      trace += static_cast<double>(inverses[j * size + i * (c.T + 1)]);
    }
    with_M[j] = static_cast<T>(total);
    plain[j] = static_cast<T>(trace);
  }
}

template <typename T>
void invert(const ShiftedCholesky& c, const T* L, const T* m, const T* lam, T* rows, T* with_M,
            T* plain) {
  const int64_t size = c.T * c.T;
  problems(c.m_batch.count, [&](int64_t b) {
    const T *own = m + c.m_batch.offset(b), *own_lam = lam + c.lam_batch.offset(b);
    T* sum = rows + b * size;
    // The factors are n matrices already: large ones are to be eight in all.
    const int64_t together = one_thread_each(c.n) && (c.n < 5 || c.T < 1000) ? 2 : 1;
    const std::unique_ptr<T[]> work(new T[together * size]);
    for (int64_t j = 0; j < c.n; j += together) {
      const int64_t few = std::min(together, c.n - j);
      problems(few, [&](int64_t l) {
        std::copy_n(L + (b * c.n + j + l) * size, size, work.get() + l * size);
        potri(work.get() + l * size, static_cast<int>(c.T));
      });
      add_inverses(c, own, own_lam + j * c.lam_stride, work.get(), few, sum, with_M + b * c.n + j,
                   plain + b * c.n + j);
    }
    strips(c.T, kTile, [&](int64_t begin, int64_t end) { reflect(c.T, begin, end, sum); });
  });
}

std::tuple<Tensor, Tensor, Tensor> shifted_cholesky(const Tensor& M, const Tensor& lam) {
  const Sizes batch = shifted_batch(M, lam);
  const ShiftedCholesky c = shifted_cholesky_of(M, lam, batch);
  Tensor L = torch::stable::new_empty(M, concat(batch, {c.n, c.T, c.T}));
  Tensor logdet = torch::stable::new_empty(M, concat(batch, {c.n}));
  Tensor status = torch::stable::new_empty(M, concat(batch, {c.n}), ScalarType::Long);
  dispatch_floating(M, "shifted_cholesky", [&](auto zero) {
    using T = decltype(zero);
    factorise(c, M.const_data_ptr<T>(), lam.const_data_ptr<T>(), L.mutable_data_ptr<T>(),
              logdet.mutable_data_ptr<T>(), status.mutable_data_ptr<int64_t>());
  });
  return {L, logdet, status};
}

std::tuple<Tensor, Tensor, Tensor> shifted_inverses(const Tensor& L, const Tensor& M,
                                                    const Tensor& lam) {
  const Sizes batch = shifted_batch(M, lam);
  const ShiftedCholesky c = shifted_cholesky_of(M, lam, batch);
  const Tensor factors = torch::stable::contiguous(L);
  check_alike(L, M, "shifted_inverses");
  check(batch_sizes(L, 0) == concat(batch, {c.n, c.T, c.T}), "shifted_inverses: L does not fit");
  Tensor rows = torch::stable::new_zeros(M, concat(batch, {c.T, c.T}));
  Tensor with_M = torch::stable::new_empty(M, concat(batch, {c.n}));
  Tensor plain = torch::stable::new_empty(M, concat(batch, {c.n}));
  dispatch_floating(M, "shifted_inverses", [&](auto zero) {
    using T = decltype(zero);
    invert(c, factors.const_data_ptr<T>(), M.const_data_ptr<T>(), lam.const_data_ptr<T>(),
           rows.mutable_data_ptr<T>(), with_M.mutable_data_ptr<T>(), plain.mutable_data_ptr<T>());
  });
  return {rows, with_M, plain};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  // Without LAPACK these are left undefined, and the Python route does the same by torch.linalg.
  if (has_lapack()) {
    m.impl("shifted_cholesky", TORCH_BOX(&shifted_cholesky));
    m.impl("shifted_inverses", TORCH_BOX(&shifted_inverses));
  }
}

}  // namespace
}  // namespace torch_kronlik
