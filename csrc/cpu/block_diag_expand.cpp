#include "../kernels/block_diag_expand.h"

#include "../shapes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

template <typename T>
void expand_row(const BlockExpand& e, const T* s, int64_t row, T* out) {
  const int64_t cols = e.p * e.n, begin = row / e.m * e.n;
  std::fill(out, out + begin, T(0));
  for (int64_t col = begin; col < begin + e.n; ++col) out[col] = expanded_entry(e, s, row, col);
  std::fill(out + begin + e.n, out + cols, T(0));
}

Tensor block_diag_expand(const Tensor& S, int64_t num_blocks) {
  const BlockExpand e = expansion_of(S, num_blocks);
  const int64_t rows = e.p * e.m, cols = e.p * e.n;
  Tensor out = torch::stable::new_empty(S, concat(batch_sizes(S, 2), {rows, cols}));
  dispatch_floating(S, "block_diag_expand", [&](auto zero) {
    using T = decltype(zero);
    const T* s = S.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    parallel_items(e.batch.count * rows, cols, [&](int64_t item) {
      const T* own = s + e.batch.offset(item / rows);
      expand_row(e, own, item % rows, result + item * cols);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  m.impl("block_diag_expand", TORCH_BOX(&block_diag_expand));
}

}  // namespace
}  // namespace torch_kronlik
