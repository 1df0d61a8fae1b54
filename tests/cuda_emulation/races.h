#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

// A thread of a block, and how many barriers its block and its warp had passed.
struct Moment {
  int64_t block = -1;
  unsigned thread = 0, block_step = 0, warp_step = 0;
};

void forget_shared_accesses();
void forget_all_accesses();
// The thread whose earlier access this one races with, or -1.
int64_t racing_thread(const Moment& now, const void* address, size_t bytes, bool shared,
                      bool write);
// Called before each access to memory.
void accessed(const void* address, size_t bytes, bool write);

}  // namespace emulation
