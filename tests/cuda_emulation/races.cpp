// Two threads race for memory where one writes, the other reads or writes, and no barrier is
// between the two. Code compiled with -fsanitize=thread tells each access to the functions below.

#include "races.h"

#include <unordered_map>

namespace emulation {
namespace {

struct History {
  Moment write, read, read_by_another;  // the last two readers are different threads
};

// Of 4 bytes each.
std::unordered_map<uintptr_t, History> shared_memory, global_memory;

bool same_thread(const Moment& a, const Moment& b) {
  return a.block == b.block && a.thread == b.thread;
}

bool ordered(const Moment& before, const Moment& now) {
  if (before.block < 0 || same_thread(before, now)) return true;
  if (before.block != now.block) return false;
  const bool same_warp = before.thread / 32 == now.thread / 32;
  return before.block_step < now.block_step || (same_warp && before.warp_step < now.warp_step);
}

const Moment* unordered(const History& h, const Moment& now, bool write) {
  if (!ordered(h.write, now)) return &h.write;
  if (write && !ordered(h.read, now)) return &h.read;
  if (write && !ordered(h.read_by_another, now)) return &h.read_by_another;
  return nullptr;
}

void remember(History* h, const Moment& now, bool write) {
  if (write) {
    h->write = now;
    return;
  }
  if (!same_thread(h->read, now)) h->read_by_another = h->read;
  h->read = now;
}

}  // namespace

void forget_shared_accesses() { shared_memory.clear(); }

void forget_all_accesses() {
  shared_memory.clear();
  global_memory.clear();
}

int64_t racing_thread(const Moment& now, const void* address, size_t bytes, bool shared,
                      bool write) {
  auto& histories = shared ? shared_memory : global_memory;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin / 4; at <= (begin + bytes - 1) / 4; ++at) {
    History& h = histories[at];
    if (const Moment* other = unordered(h, now, write)) return other->thread;
    remember(&h, now, write);
  }
  return -1;
}

}  // namespace emulation

extern "C" {

#define EMULATION_ACCESS(bytes)                                                        \
  void __tsan_read##bytes(void* p) { emulation::accessed(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { emulation::accessed(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulation::accessed(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { emulation::accessed(p, bytes, true); }
EMULATION_ACCESS(1)
EMULATION_ACCESS(2)
EMULATION_ACCESS(4)
EMULATION_ACCESS(8)
EMULATION_ACCESS(16)

void __tsan_read_range(void* p, size_t bytes) { emulation::accessed(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulation::accessed(p, bytes, true); }

// What host code has besides.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
}
