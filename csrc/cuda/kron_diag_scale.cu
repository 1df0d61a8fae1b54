#include <tuple>

#include "../kernels/kron_diag_scale.h"
#include "../shapes.h"
#include "parts.h"

namespace torch_kronlik {
namespace {

// One block of threads for each chunk of rows; partial (batch, chunk) is its part of inv_quad.
template <typename T>
__global__ void scale_chunks(KronDiagScale k, const T* __restrict__ s, const T* __restrict__ lam,
                             const T* __restrict__ y, T* __restrict__ z,
                             double* __restrict__ partial) {
  const KronDiag& g = k.grid;
  const int64_t item = blockIdx.x, b = item / g.chunks(), chunk = item % g.chunks();
  const int64_t begin = g.chunk_begin(chunk);
  s += g.s_batch.offset(b) + begin * g.s_stride;
  lam += g.lam_batch.offset(b);
  y += k.y_batch.offset(b) + begin * k.row_stride;
  z += (b * g.T + begin) * g.D;
  double quad = 0;
  // Entry e is (i, j); steps of kThreads entries are made without a division.
  const int64_t D = max(g.D, int64_t{1}), rows = kThreads / D, rest = kThreads % D;
  int64_t i = threadIdx.x / D, j = threadIdx.x % D;
  for (int64_t e = threadIdx.x; e < g.chunk_size(chunk) * g.D; e += kThreads) {
    quad += scale_entry(static_cast<double>(s[i * g.s_stride]),
                        static_cast<double>(lam[j * g.lam_stride]),
                        y[i * k.row_stride + j * k.col_stride], z + e);
    const bool carry = j + rest >= D;
    i += rows + carry;
    j += rest - (carry ? D : 0);
  }
  quad = block_sum(quad);
  if (threadIdx.x == 0) partial[item] = quad;
}

std::tuple<Tensor, Tensor> kron_diag_scale(const Tensor& s, const Tensor& lam, const Tensor& Y) {
  const Sizes batch = scale_batch(s, lam, Y, "kron_diag_scale");
  const KronDiagScale k = kron_diag_scale_of(s, lam, Y, batch);
  Tensor Z = torch::stable::new_empty(Y, concat(batch, {k.grid.T, k.grid.D}));
  Tensor inv_quad = torch::stable::new_empty(Y, batch);
  const Launcher launcher(Y);
  const int64_t chunks = k.grid.chunks(), count = k.y_batch.count;
  Tensor partial = scratch(Y, count * chunks);
  dispatch_floating(Y, "kron_diag_scale", [&](auto zero) {
    using T = decltype(zero);
    launcher.blocks(count * chunks, scale_chunks<T>, k, s.const_data_ptr<T>(),
                    lam.const_data_ptr<T>(), Y.const_data_ptr<T>(), Z.mutable_data_ptr<T>(),
                    partial.mutable_data_ptr<double>());
    add_parts(launcher, count, chunks, 1, partial,
              PutInOrder<T>{inv_quad.mutable_data_ptr<T>(), 1});
  });
  return {Z, inv_quad};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) {
  m.impl("kron_diag_scale", TORCH_BOX(&kron_diag_scale));
}

}  // namespace
}  // namespace torch_kronlik
