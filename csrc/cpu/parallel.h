#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace torch_kronlik {

// Calls f(item) for every item, in parallel where the work (in entries) is worth a thread.
template <typename F>
void parallel_items(int64_t items, int64_t entries_per_item, const F& f) {
  constexpr int64_t kEntriesPerThread = 1 << 15;
  const int64_t grain = kEntriesPerThread / std::max<int64_t>(entries_per_item, 1);
  torch::stable::parallel_for(0, items, std::max<int64_t>(grain, 1),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t item = begin; item < end; ++item) f(item);
                              });
}

}  // namespace torch_kronlik
