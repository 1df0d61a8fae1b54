// A device "emulated" for PyTorch, with rules like CUDA's: its tensors and generators do not mix
// with the CPU's, and its new memory is full of NaN. It computes with PyTorch's CPU kernels, on
// copies, and for torch_kronlik's own operators with the emulated CUDA kernels.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::SymIntArrayRef;

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
const c10::Device kDevice(kType, 0);

// --- memory, the one device, its one stream ------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    if (bytes != 0) std::memset(data, 0xff, bytes);
    return {data, data, &c10::free_cpu, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(kType, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- random numbers ------------------------------------------------------------------------------

struct Generator final : at::CPUGeneratorImpl {
  Generator() { device_ = kDevice; }
  void pose_as(c10::Device device) { device_ = device; }
};

// While it lives, the CPU's kernels take the device's generator among their arguments for one of
// their own. The CPU's generators are refused, as by CUDA.
class Generators {
 public:
  explicit Generators(const torch::jit::Stack& stack, size_t count) {
    for (size_t k = stack.size() - count; k < stack.size(); ++k) {
      if (!stack[k].isGenerator()) continue;
      const at::Generator generator = stack[k].toGenerator();
      TORCH_CHECK(generator.device() == kDevice, "a generator of the CPU on the emulated device");
      used_.push_back(generator);
      pose_as(generator, c10::Device(c10::kCPU));
    }
  }
  ~Generators() {
    for (const auto& generator : used_) pose_as(generator, kDevice);
  }

 private:
  static void pose_as(const at::Generator& generator, c10::Device device) {
    static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->pose_as(device);
  }
  std::vector<at::Generator> used_;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_nocuda(storage, bytes);
  }
};

// --- waiting -------------------------------------------------------------------------------------

// How often the host has waited, were this a GPU: for a copy from or to its own memory, and in
// operators that make of values a shape, a number or an error.
std::atomic<int64_t> waits = 0;
const std::set<std::string> kWaiting = {"aten::nonzero",  "aten::masked_select",
                                        "aten::_unique2", "aten::repeat_interleave",
                                        "aten::equal",    "aten::_linalg_eigh"};
// Copies between the devices are then the emulation's own. Autograd has a thread for each device.
thread_local int computing = 0;

struct Computing {
  Computing() { ++computing; }
  ~Computing() { --computing; }
};

// --- operators -----------------------------------------------------------------------------------

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, kKeys,
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), &memory, kKeys,
                                           c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& x) {
  if (x.is_cpu()) return x;
  c10::DataPtr data(x.storage().mutable_data(), c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), x.storage().nbytes(), std::move(data),
                       nullptr, false);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return result;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  waits += to.is_cpu() != from.is_cpu() && computing == 0;
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& x) {
  ++waits;
  return at::native::_local_scalar_dense_cpu(on_cpu(x));
}

const Tensor& resize(const Tensor& x, SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor view(const Tensor& x, SymIntArrayRef size) {
  return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& x, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& x, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / x.dtype().itemsize());
  return at::cpu::set_(x, source, 0, {size}, {1});
}

void refuse_other_devices(const Tensor& x) {
  const bool number = x.defined() && x.is_cpu() && x.dim() == 0;
  TORCH_CHECK(!x.defined() || number || x.device() == kDevice,
              "Expected all tensors to be on the same device, but found at least two devices, ",
              kDevice, " and ", x.device());
}

// As CUDA does. Indices may be the CPU's: they come as lists of tensors or nothing.
void refuse_other_devices(const torch::jit::Stack& stack, size_t count) {
  for (size_t k = stack.size() - count; k < stack.size(); ++k) {
    if (stack[k].isTensor()) refuse_other_devices(stack[k].toTensor());
    if (!stack[k].isTensorList()) continue;
    for (const Tensor& x : stack[k].toTensorVector()) refuse_other_devices(x);
  }
}

void compute_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  refuse_other_devices(*stack, op.schema().arguments().size());
  const Generators generators(*stack, op.schema().arguments().size());
  waits += kWaiting.count(op.schema().name());
  const Computing now;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", at::cpu::set__symint);
  m.impl("as_strided", at::cpu::as_strided_symint);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
}

// Copying results back into an argument begins with a tensor of the CPU.
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("_copy_from_and_resize", copy_from_and_resize); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

// Autocast casts nothing.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t emulated_device_waits() { return waits; }
