#include "../kernels/block_diag_expand.h"
#include "../shapes.h"
#include "launch.h"

namespace torch_kronlik {
namespace {

// One block of threads for each row of the result.
template <typename T>
__global__ void expand_rows(BlockExpand e, const T* __restrict__ s, T* __restrict__ out) {
  const int64_t rows = e.p * e.m, cols = e.p * e.n, line = blockIdx.x, row = line % rows;
  const T* own = s + e.batch.offset(line / rows);
  for (int64_t col = threadIdx.x; col < cols; col += kThreads) {
    out[line * cols + col] = expanded_entry(e, own, row, col);
  }
}

Tensor block_diag_expand(const Tensor& S, int64_t num_blocks) {
  const BlockExpand e = expansion_of(S, num_blocks);
  const int64_t rows = e.p * e.m, cols = e.p * e.n;
  Tensor out = torch::stable::new_empty(S, concat(batch_sizes(S, 2), {rows, cols}));
  const Launcher launcher(S);
  dispatch_floating(S, "block_diag_expand", [&](auto zero) {
    using T = decltype(zero);
    launcher.blocks(cols == 0 ? 0 : e.batch.count * rows, expand_rows<T>, e, S.const_data_ptr<T>(),
                    out.mutable_data_ptr<T>());
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) {
  m.impl("block_diag_expand", TORCH_BOX(&block_diag_expand));
}

}  // namespace
}  // namespace torch_kronlik
