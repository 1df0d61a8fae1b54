#include <tuple>

#include "../kernels/kron_diag_sums.h"
#include "../shapes.h"
#include "parts.h"

namespace torch_kronlik {
namespace {

// One thread for each column of one chunk of rows: partial (batch, chunk, 3, D).
template <typename T>
__global__ void column_chunks(KronDiag g, int64_t items, const T* __restrict__ s,
                              const T* __restrict__ lam, double* __restrict__ partial) {
  const int64_t item = thread_index();
  if (item >= items) return;
  const int64_t j = item % g.D, chunk = item / g.D % g.chunks(), b = item / g.D / g.chunks();
  const double v = static_cast<double>(lam[g.lam_batch.offset(b) + j * g.lam_stride]);
  const T* u = s + g.s_batch.offset(b) + g.chunk_begin(chunk) * g.s_stride;
  const LineSums<1> sums = line_sums<1, true>(u, g.s_stride, g.chunk_size(chunk), &v);
  double* to = partial + (b * g.chunks() + chunk) * 3 * g.D + j;
  to[0] = sums.weighted[0];
  to[g.D] = sums.plain[0];
  to[2 * g.D] = sums.log[0];
}

// The sums of one column; logs (batch, D) waits for its own sum.
template <typename T>
struct PutColumn {
  int64_t D;
  T *col_sum_s, *col_sum_1;
  double* logs;

  __device__ void operator()(int64_t b, int64_t entry, double total) const {
    const int64_t which = entry / D, at = b * D + entry % D;
    if (which == 0) col_sum_s[at] = static_cast<T>(total);
    if (which == 1) col_sum_1[at] = static_cast<T>(total);
    if (which == 2) logs[at] = total;
  }
};

// One thread for each row.
template <typename T>
__global__ void rows(KronDiag g, int64_t items, const T* __restrict__ s, const T* __restrict__ lam,
                     T* __restrict__ row_sum) {
  const int64_t item = thread_index();
  if (item >= items) return;
  const int64_t i = item % g.T, b = item / g.T;
  const double v = static_cast<double>(s[g.s_batch.offset(b) + i * g.s_stride]);
  const T* u = lam + g.lam_batch.offset(b);
  row_sum[item] = static_cast<T>(line_sums<1, false>(u, g.lam_stride, g.D, &v).weighted[0]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kron_diag_sums(const Tensor& s, const Tensor& lam) {
  const Sizes batch = factor_batch(s, lam, "kron_diag_sums");
  const KronDiag g = kron_diag_of(s, lam, batch);
  const int64_t count = g.s_batch.count;
  Tensor logdet = torch::stable::new_empty(s, batch);
  Tensor row_sum = torch::stable::new_empty(s, concat(batch, {g.T}));
  Tensor col_sum_s = torch::stable::new_empty(s, concat(batch, {g.D}));
  Tensor col_sum_1 = torch::stable::new_empty(s, concat(batch, {g.D}));
  const Launcher launcher(s);
  Tensor partial = scratch(s, count * g.chunks() * 3 * g.D);
  Tensor logs = scratch(s, count * g.D);
  dispatch_floating(s, "kron_diag_sums", [&](auto zero) {
    using T = decltype(zero);
    const T* s_data = s.const_data_ptr<T>();
    const T* lam_data = lam.const_data_ptr<T>();
    const int64_t pieces = count * g.chunks() * g.D;
    launcher.threads(pieces, column_chunks<T>, g, pieces, s_data, lam_data,
                     partial.mutable_data_ptr<double>());
    add_parts(launcher, count, g.chunks(), 3 * g.D, partial,
              PutColumn<T>{g.D, col_sum_s.mutable_data_ptr<T>(), col_sum_1.mutable_data_ptr<T>(),
                           logs.mutable_data_ptr<double>()});
    add_parts(launcher, count, g.D, 1, logs, PutInOrder<T>{logdet.mutable_data_ptr<T>(), 1});
    launcher.threads(count * g.T, rows<T>, g, count * g.T, s_data, lam_data,
                     row_sum.mutable_data_ptr<T>());
  });
  return {logdet, row_sum, col_sum_s, col_sum_1};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) {
  m.impl("kron_diag_sums", TORCH_BOX(&kron_diag_sums));
}

}  // namespace
}  // namespace torch_kronlik
