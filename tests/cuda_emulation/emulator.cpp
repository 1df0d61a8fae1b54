// Runs kernels block by block, the threads of a block as fibers: each runs until it has to wait
// for others, and all of them before any goes on. So a thread that goes on too early, for lack of a
// barrier, sees in one of the two orders, forward or backward, what it should not; and every access
// to memory is looked at for races, see races.cpp.

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"
#include "races.h"

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {
namespace {

enum class Wait { Nothing, Lanes, Block, Returned };

struct Fiber {
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::Returned;
  Site site{};
  unsigned mask = 0;
  bool orders_memory = false;  // a shuffle or a vote does not
  uint64_t offered = 0, received[32] = {};
};

constexpr size_t kStack = 256 * 1024;
std::mutex mutex;
bool backward = false;
std::string error;
std::deque<Fiber> fibers;  // that have been started, thread by thread
Fiber* current = nullptr;
const std::function<void()>* kernel = nullptr;
jmp_buf scheduler;
unsigned block_step = 0, warp_steps[32] = {};  // barriers passed in this block, by each warp

// --- fibers: set up by ucontext once, changed by longjmp, which makes no system call -------------

void pause_fiber() {
  if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    pause_fiber();
    (*kernel)();
    current->wait = Wait::Returned;
  }
}

void start_fiber() {
  current = &fibers.emplace_back();
  current->stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = current->stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  if (_setjmp(scheduler) == 0) setcontext(&context);
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) == 0) _longjmp(fiber.here, 1);
}

// --- shared memory -------------------------------------------------------------------------------

thread_local volatile char anchor;  // touched so that this library has its thread-local memory

struct Memory {
  char* begin = nullptr;
  size_t size = 0;

  bool has(const void* p) const {
    return static_cast<const char*>(p) >= begin && static_cast<const char*>(p) < begin + size;
  }
} shared_memory;

int find_own(dl_phdr_info* info, size_t, void* own_base) {
  if (reinterpret_cast<void*>(info->dlpi_addr) != own_base) return 0;
  for (int k = 0; k < info->dlpi_phnum; ++k) {
    const auto& header = info->dlpi_phdr[k];
    if (header.p_type == PT_TLS) {
      shared_memory = {static_cast<char*>(info->dlpi_tls_data), header.p_memsz};
    }
  }
  return 1;
}

void find_shared_memory() {
  anchor = 1;
  Dl_info own;
  dladdr(reinterpret_cast<void*>(&find_shared_memory), &own);
  dl_iterate_phdr(find_own, own.dli_fbase);
}

// --- who may go on -------------------------------------------------------------------------------

std::string place(Site site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

bool same_wait(const Fiber& a, const Fiber& b) {
  return a.wait == b.wait && a.site.line == b.site.line && !std::strcmp(a.site.file, b.site.file) &&
         (a.wait != Wait::Lanes || a.mask == b.mask);
}

template <typename F>
void for_lanes(size_t warp, unsigned mask, size_t threads, F&& f) {
  for (size_t lane = 0; lane < 32 && 32 * warp + lane < threads; ++lane) {
    if (mask >> lane & 1) f(lane, fibers[32 * warp + lane]);
  }
}

// Lets the lanes that wait for each other in one warp go on.
bool release_lanes(size_t warp, size_t threads) {
  bool released = false;
  for_lanes(warp, ~0u, threads, [&](size_t, Fiber& first) {
    if (first.wait != Wait::Lanes) return;
    bool all = true;
    uint64_t offered[32] = {};
    for_lanes(warp, first.mask, threads, [&](size_t lane, Fiber& other) {
      all = all && same_wait(first, other);
      offered[lane] = other.offered;
    });
    if (!all) return;
    released = true;
    warp_steps[warp] += first.orders_memory;
    for_lanes(warp, first.mask, threads, [&](size_t, Fiber& other) {
      std::memcpy(other.received, offered, sizeof(offered));
      other.wait = Wait::Nothing;
    });
  });
  return released;
}

std::string description(const Fiber& fiber, size_t thread) {
  const std::string who = "thread " + std::to_string(thread);
  if (fiber.wait == Wait::Returned) return who + " has returned";
  return who + " waits at " + place(fiber.site);
}

void release_block(size_t threads) {
  for (size_t t = 1; t < threads; ++t) {
    if (same_wait(fibers[0], fibers[t])) continue;
    error = description(fibers[0], 0) + ", but " + description(fibers[t], t);
    return;
  }
  ++block_step;
  for (size_t t = 0; t < threads; ++t) fibers[t].wait = Wait::Nothing;
}

void release(size_t threads) {
  bool released = false;
  for (size_t warp = 0; 32 * warp < threads; ++warp) {
    released = release_lanes(warp, threads) || released;
  }
  if (!released) release_block(threads);
}

bool all_returned(size_t threads) {
  return std::all_of(fibers.begin(), fibers.begin() + threads,
                     [](const Fiber& f) { return f.wait == Wait::Returned; });
}

void run_block(size_t threads) {
  // Every number is then a NaN, every index far outside.
  std::memset(shared_memory.begin, 0xff, shared_memory.size);
  forget_shared_accesses();
  block_step = 0;
  std::fill(warp_steps, warp_steps + 32, 0);
  for (size_t t = 0; t < threads; ++t) {
    fibers[t].wait = Wait::Nothing;
    fibers[t].site = {"start", 0};
  }
  for (;;) {
    for (size_t k = 0; k < threads; ++k) {
      const size_t t = backward ? threads - 1 - k : k;
      if (fibers[t].wait != Wait::Nothing) continue;
      threadIdx = dim3(static_cast<unsigned>(t), 0, 0);
      resume(fibers[t]);
      if (!error.empty()) return;
    }
    if (all_returned(threads)) return;
    release(threads);
    if (!error.empty()) return;
  }
}

}  // namespace

void run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  error.clear();
  find_shared_memory();
  forget_all_accesses();
  kernel = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const bool sizes_fit = gridDim.y * gridDim.z * blockDim.y * blockDim.z == 1 && gridDim.x >= 1 &&
                         blockDim.x >= 1 && blockDim.x <= 1024;
  if (!sizes_fit) error = "the sizes of the launch";
  while (fibers.size() < blockDim.x && error.empty()) start_fiber();
  for (unsigned b = 0; b < gridDim.x && error.empty(); ++b) {
    blockIdx = dim3(backward ? gridDim.x - 1 - b : b, 0, 0);
    run_block(blockDim.x);
  }
  current = nullptr;
  if (error.empty()) return;
  error += " (block " + std::to_string(blockIdx.x) + ")";
  fibers.clear();  // some are in the middle of a kernel
}

void barrier(Site site) {
  current->wait = Wait::Block;
  current->site = site;
  pause_fiber();
}

const uint64_t* gather(unsigned mask, uint64_t offered, Site site, bool orders_memory) {
  if (!(mask >> lane() & 1)) fail("a lane is not in its own mask", site);
  current->wait = Wait::Lanes;
  current->site = site;
  current->mask = mask;
  current->offered = offered;
  current->orders_memory = orders_memory;
  pause_fiber();
  return current->received;
}

void accessed(const void* address, size_t bytes, bool write) {
  if (current == nullptr || Memory{current->stack.get(), kStack}.has(address)) return;
  const unsigned t = threadIdx.x;
  const bool shared = shared_memory.has(address);
  const int64_t other =
      racing_thread({blockIdx.x, t, block_step, warp_steps[t / 32]}, address, bytes, shared, write);
  if (other < 0) return;
  const std::string where = shared ? "shared memory" : "global memory";
  fail("a race with thread " + std::to_string(other) + " for " + where + ", after the barrier",
       current->site);
}

int lane() { return static_cast<int>(threadIdx.x % 32); }

void fail(const std::string& what, Site site) {
  const std::string message =
      what + (" at " + place(site)) + ", thread " + std::to_string(threadIdx.x);
  if (current == nullptr) throw std::runtime_error(message);
  error = message;
  _longjmp(scheduler, 1);
}

}  // namespace emulation

cudaError_t cudaGetLastError() {
  return emulation::error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* cudaGetErrorString(cudaError_t) { return emulation::error.c_str(); }

// --- what the libraries around the kernels call --------------------------------------------------

extern "C" {

__attribute__((visibility("default"))) void emulation_set_backward(int value) {
  emulation::backward = value != 0;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

// Called by code compiled with -fsanitize=alignment,bounds; the data begin with the place.
void __ubsan_handle_type_mismatch_v1(emulation::Site* site, void*) {
  emulation::fail("an address that is not aligned", *site);
}
void __ubsan_handle_out_of_bounds(emulation::Site* site, void*) {
  emulation::fail("an index out of bounds", *site);
}
}
