#include "../kernels/kron_diag_sums.h"

#include <tuple>
#include <vector>

#include "../shapes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

constexpr int kLanes = 8;
using Sums = LineSums<kLanes>;

KRON_CLONES void column_strip(const double* s, int64_t count, const double* lam, Sums* sums) {
  *sums = line_sums<kLanes, true>(s, 1, count, lam);
}

KRON_CLONES void row_strip(const double* lam, int64_t count, const double* s, Sums* sums) {
  *sums = line_sums<kLanes, false>(lam, 1, count, s);
}

// Copies a strided vector, followed by zeros up to a whole number of strips.
template <typename T>
std::vector<double> padded_copy(const T* from, int64_t stride, int64_t count) {
  std::vector<double> to((count + kLanes - 1) / kLanes * kLanes, 0.0);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(from[i * stride]);
  return to;
}

// One chunk of rows: its row sums, and its part of the column sums as partial (3, D).
template <typename T>
void chunk_sums(const std::vector<double>& s, int64_t count, const std::vector<double>& lam,
                int64_t D, T* row_sum, double* partial) {
  Sums sums;
  for (int64_t j = 0; j < D; j += kLanes) {
    column_strip(s.data(), count, lam.data() + j, &sums);
    for (int64_t l = 0; l < std::min<int64_t>(kLanes, D - j); ++l) {
      partial[j + l] = sums.weighted[l];
      partial[D + j + l] = sums.plain[l];
      partial[2 * D + j + l] = sums.log[l];
    }
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    row_strip(lam.data(), D, s.data() + i, &sums);
    for (int64_t l = 0; l < std::min<int64_t>(kLanes, count - i); ++l) {
      row_sum[i + l] = static_cast<T>(sums.weighted[l]);
    }
  }
}

template <typename T>
void run(const KronDiag& g, const T* s, const T* lam, T* logdet, T* row_sum, T* col_sum_s,
         T* col_sum_1) {
  const int64_t count = g.s_batch.count, chunks = g.chunks(), D = g.D;
  std::vector<double> partial(count * chunks * 3 * D);
  parallel_items(count * chunks, kRowsPerChunk * D * 4, [&](int64_t item) {
    const int64_t b = item / chunks, chunk = item % chunks, begin = g.chunk_begin(chunk);
    const T* own = s + g.s_batch.offset(b) + begin * g.s_stride;
    chunk_sums(padded_copy(own, g.s_stride, g.chunk_size(chunk)), g.chunk_size(chunk),
               padded_copy(lam + g.lam_batch.offset(b), g.lam_stride, D), D,
               row_sum + b * g.T + begin, partial.data() + item * 3 * D);
  });
  parallel_items(count, chunks * 3 * D, [&](int64_t b) {
    double log_total = 0;
    for (int64_t j = 0; j < D; ++j) {
      double total[3] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        for (int q = 0; q < 3; ++q) total[q] += partial[((b * chunks + c) * 3 + q) * D + j];
      }
      col_sum_s[b * D + j] = static_cast<T>(total[0]);
      col_sum_1[b * D + j] = static_cast<T>(total[1]);
      log_total += total[2];
    }
    logdet[b] = static_cast<T>(log_total);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kron_diag_sums(const Tensor& s, const Tensor& lam) {
  const Sizes batch = factor_batch(s, lam, "kron_diag_sums");
  const KronDiag g = kron_diag_of(s, lam, batch);
  Tensor logdet = torch::stable::new_empty(s, batch);
  Tensor row_sum = torch::stable::new_empty(s, concat(batch, {g.T}));
  Tensor col_sum_s = torch::stable::new_empty(s, concat(batch, {g.D}));
  Tensor col_sum_1 = torch::stable::new_empty(s, concat(batch, {g.D}));
  dispatch_floating(s, "kron_diag_sums", [&](auto zero) {
    using T = decltype(zero);
    run(g, s.const_data_ptr<T>(), lam.const_data_ptr<T>(), logdet.mutable_data_ptr<T>(),
        row_sum.mutable_data_ptr<T>(), col_sum_s.mutable_data_ptr<T>(),
        col_sum_1.mutable_data_ptr<T>());
  });
  return {logdet, row_sum, col_sum_s, col_sum_1};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  m.impl("kron_diag_sums", TORCH_BOX(&kron_diag_sums));
}

}  // namespace
}  // namespace torch_kronlik
