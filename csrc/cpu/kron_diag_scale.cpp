#include "../kernels/kron_diag_scale.h"

#include <tuple>
#include <vector>

#include "../shapes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

constexpr int kLanes = 8;

// One row, in lanes that are added in a fixed order.
template <typename T>
KRON_CLONES double scale_row(double s, const T* lam, int64_t lam_stride, const T* y,
                             int64_t y_stride, int64_t D, T* z) {
  double quad[kLanes] = {};
  int64_t j = 0;
  const bool unit = lam_stride == 1 && y_stride == 1;
  for (; unit && j + kLanes <= D; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      quad[l] += scale_entry(s, static_cast<double>(lam[j + l]), y[j + l], z + j + l);
    }
  }
  for (; j < D; ++j) {
    const double lam_j = static_cast<double>(lam[j * lam_stride]);
    quad[j % kLanes] += scale_entry(s, lam_j, y[j * y_stride], z + j);
  }
  for (int l = 1; l < kLanes; ++l) quad[0] += quad[l];
  return quad[0];
}

template <typename T>
double scale_chunk(const KronDiagScale& k, const T* s, const T* lam, const T* y, int64_t count,
                   T* z) {
  double quad = 0;
  for (int64_t i = 0; i < count; ++i) {
    quad += scale_row(static_cast<double>(s[i * k.grid.s_stride]), lam, k.grid.lam_stride,
                      y + i * k.row_stride, k.col_stride, k.grid.D, z + i * k.grid.D);
  }
  return quad;
}

template <typename T>
void run(const KronDiagScale& k, const T* s, const T* lam, const T* y, T* z, T* inv_quad) {
  const KronDiag& g = k.grid;
  const int64_t count = k.y_batch.count, chunks = g.chunks();
  std::vector<double> partial(count * chunks);
  parallel_items(count * chunks, kRowsPerChunk * g.D, [&](int64_t item) {
    const int64_t b = item / chunks, chunk = item % chunks, begin = g.chunk_begin(chunk);
    partial[item] =
        scale_chunk(k, s + g.s_batch.offset(b) + begin * g.s_stride, lam + g.lam_batch.offset(b),
                    y + k.y_batch.offset(b) + begin * k.row_stride, g.chunk_size(chunk),
                    z + (b * g.T + begin) * g.D);
  });
  for (int64_t b = 0; b < count; ++b) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[b * chunks + c];
    inv_quad[b] = static_cast<T>(total);
  }
}

std::tuple<Tensor, Tensor> kron_diag_scale(const Tensor& s, const Tensor& lam, const Tensor& Y) {
  const Sizes batch = scale_batch(s, lam, Y, "kron_diag_scale");
  const KronDiagScale k = kron_diag_scale_of(s, lam, Y, batch);
  Tensor Z = torch::stable::new_empty(Y, concat(batch, {k.grid.T, k.grid.D}));
  Tensor inv_quad = torch::stable::new_empty(Y, batch);
  dispatch_floating(Y, "kron_diag_scale", [&](auto zero) {
    using T = decltype(zero);
    run(k, s.const_data_ptr<T>(), lam.const_data_ptr<T>(), Y.const_data_ptr<T>(),
        Z.mutable_data_ptr<T>(), inv_quad.mutable_data_ptr<T>());
  });
  return {Z, inv_quad};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  m.impl("kron_diag_scale", TORCH_BOX(&kron_diag_scale));
}

}  // namespace
}  // namespace torch_kronlik
