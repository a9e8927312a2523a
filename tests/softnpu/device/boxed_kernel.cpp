// libsoftnpu.so: one kernel, registered for every operator of PrivateUse1 (torch_npu's key), which
// runs the operator's CPU kernel over the same memory.
//
// A call: each npu argument becomes a CPU tensor that aliases its storage; the operator is
// dispatched again with the CPU's key; results go back as npu tensors: the argument itself, where
// the CPU kernel returned its alias; a view of an argument's storage, where the result lies in it;
// a new npu tensor otherwise. Arguments that were resized or whose metadata was changed in place
// get that too.
//
// Operators of npu::, atb:: and _C_ascend have CPU kernels in Python (kernels/npu_ops and
// python/softnpu/operators). One that has none is refused by name.
//
// What makes, describes and views memory stays with torch_npu (`kept` below).
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_to_copy_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>

#include "runtime.h"

extern "C" int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind,
                                void *stream);

namespace {

using at::Tensor;
using c10::IValue;

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr auto kKey = c10::DispatchKey::PrivateUse1;
const c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

// A fault for tests, which have to be able to fail: SOFTNPU_DEFECT names it.
bool defect(const char *name) {
  static const char *chosen = std::getenv("SOFTNPU_DEFECT");
  return chosen && std::strcmp(chosen, name) == 0;
}

// --- trace: which operators were called, and how often -----------------------------------------

// SOFTNPU_TRACE names a folder; each process keeps operators-<pid>.txt there, a line for each
// operator: how often, and its name. Written every second and at the end, because servers end
// their processes without ceremony.
class Trace {
 public:
  static Trace &instance() {
    static Trace *one = new Trace;  // never destroyed: operators run until the process ends
    return *one;
  }
  void count(const c10::OperatorHandle &op) {
    if (on_) count(c10::toString(op.operator_name()));
  }
  void count(const std::string &name) {
    if (!on_) return;
    std::lock_guard<std::mutex> held(lock_);
    counts_[name]++;
    auto now = std::chrono::steady_clock::now();
    if (folder_ && now - written_ > std::chrono::seconds(1)) write(now);
  }
  void flush() {
    std::lock_guard<std::mutex> held(lock_);
    if (folder_ && !counts_.empty()) write(std::chrono::steady_clock::now());
  }
  void enable(bool on) { on_ = on || folder_; }
  std::string take() {
    std::lock_guard<std::mutex> held(lock_);
    std::string text = lines();
    counts_.clear();
    return text;
  }

 private:
  Trace() : folder_(std::getenv("SOFTNPU_TRACE")), on_(folder_ && *folder_) {
    if (folder_ && !*folder_) folder_ = nullptr;
    if (folder_) std::atexit([] { instance().flush(); });
  }
  std::string lines() const {
    std::string text;
    for (const auto &[name, count] : counts_) text += std::to_string(count) + " " + name + "\n";
    return text;
  }
  void write(std::chrono::steady_clock::time_point now) {
    written_ = now;
    std::string path = std::string(folder_) + "/operators-" + std::to_string(getpid()) + ".txt";
    std::string part = path + ".part";
    std::FILE *file = std::fopen(part.c_str(), "w");
    if (!file) {
      std::fprintf(stderr, "software NPU: SOFTNPU_TRACE: %s cannot be written\n", part.c_str());
      folder_ = nullptr;
      return;
    }
    std::string text = lines();
    std::fwrite(text.data(), 1, text.size(), file);
    std::fclose(file);
    std::rename(part.c_str(), path.c_str());
  }

  const char *folder_;
  std::atomic<bool> on_;
  std::mutex lock_;
  std::map<std::string, int64_t> counts_;
  std::chrono::steady_clock::time_point written_{};
};

// The stream that a device's calls go to now, as the runtime knows it.
void *acl_stream(c10::Device device) {
  // NPUStream holds a c10::Stream and nothing else; `false`: without torch_npu's own queue.
  using Get = void *(*)(const c10::Stream *, bool);
  static Get get = [] {
    void *library = dlopen("libtorch_npu.so", RTLD_NOLOAD | RTLD_LAZY);
    return library
               ? reinterpret_cast<Get>(dlsym(library, "_ZNK7c10_npu9NPUStream6streamEb"))
               : nullptr;
  }();
  TORCH_CHECK(get, "software NPU: this torch_npu has no NPUStream::stream(bool)");
  c10::Stream stream = c10::impl::VirtualGuardImpl(kDevice).getStream(device);
  return get(&stream, false);
}

// --- aliases -------------------------------------------------------------------------------------

size_t bytes_spanned(const Tensor &t) {
  if (t.numel() == 0) return 0;
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize());
}

// The conjugate and negative bits of a tensor, and whether it came from a Python number.
void copy_flags(const Tensor &from, const Tensor &to) {
  if (from.is_conj()) to._set_conj(true);
  if (from.is_neg()) to._set_neg(true);
  if (from.unsafeGetTensorImpl()->is_wrapped_number())
    to.unsafeGetTensorImpl()->set_wrapped_number(true);
}

// The tensors of one call on both sides.
class Aliases {
 public:
  std::optional<c10::Device> device;  // of the first npu argument
  std::optional<c10::Device> other;   // of one that is on another npu
  std::optional<c10::Device> host;    // of one that is on no npu, and more than a number

  // Notes where a tensor is.
  void see(const Tensor &t) {
    if (!t.defined()) return;
    if (t.device().type() != kDevice) {
      if (t.dim() > 0) host = t.device();
      return;
    }
    if (!device) device = t.device();
    if (*device != t.device()) other = t.device();
  }

  Tensor to_cpu(const Tensor &npu) {
    see(npu);
    if (!npu.defined() || npu.device().type() != kDevice) return npu;
    for (const Pair &pair : pairs_)
      if (pair.npu.is_same(npu)) return pair.cpu;
    Tensor cpu = at::detail::make_tensor<c10::TensorImpl>(cpu_storage(npu), kCpu, npu.dtype());
    cpu.unsafeGetTensorImpl()->set_sizes_and_strides(npu.sizes(), npu.strides(),
                                                     npu.storage_offset());
    copy_flags(npu, cpu);
    pairs_.push_back({npu, cpu});
    return cpu;
  }

  Tensor to_npu(const Tensor &cpu, c10::Device where) {
    if (!cpu.defined() || cpu.device().type() != c10::kCPU || cpu.layout() != c10::kStrided)
      return cpu;
    for (const Pair &pair : pairs_)
      if (pair.cpu.is_same(cpu)) return pair.npu;
    for (const Pair &pair : pairs_)
      if (pair.cpu.storage().unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl())
        return view_of(pair.npu, cpu);
    Tensor npu = at::empty_strided(cpu.sizes(), cpu.strides(), cpu.options().device(where));
    if (size_t bytes = bytes_spanned(cpu))
      std::memcpy(npu.mutable_data_ptr(), cpu.const_data_ptr(), bytes);
    copy_flags(cpu, npu);
    return npu;
  }

  bool is_new(const Tensor &cpu) const {
    for (const Pair &pair : pairs_)
      if (pair.cpu.storage().unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl())
        return false;
    return true;
  }

  // Brings to the npu arguments what the CPU kernel did to its aliases beside their elements.
  void settle() {
    static const bool late = softnpu_is_late();
    for (const Pair &pair : pairs_) {
      const bool moved = pair.cpu.storage().data() != pair.npu.storage().data();
      const bool same = pair.cpu.sizes() == pair.npu.sizes() &&
                        pair.cpu.strides() == pair.npu.strides() &&
                        pair.cpu.storage_offset() == pair.npu.storage_offset();
      auto *impl = pair.npu.unsafeGetTensorImpl();
      if (defect("lost_resize") || defect("copied_argument")) continue;
      if (moved) {  // resized past its storage
        pair.npu.resize_(pair.cpu.sizes());
        // torch_npu copies what was there, on the stream.
        if (late) softnpu_progress(acl_stream(pair.npu.device()));
        impl->set_sizes_and_strides(pair.cpu.sizes(), pair.cpu.strides(),
                                    pair.npu.storage_offset());
        if (size_t bytes = bytes_spanned(pair.cpu))
          std::memcpy(pair.npu.mutable_data_ptr(), pair.cpu.const_data_ptr(), bytes);
      } else if (!same) {
        impl->set_sizes_and_strides(pair.cpu.sizes(), pair.cpu.strides(),
                                    pair.cpu.storage_offset());
      }
    }
  }

 private:
  struct Pair {
    Tensor npu, cpu;
  };

  c10::Storage cpu_storage(const Tensor &npu) {
    auto *from = npu.storage().unsafeGetStorageImpl();
    c10::Storage &made = storages_[from];
    if (!made && defect("copied_argument")) {
      made = c10::Storage(c10::Storage::use_byte_size_t(), from->nbytes(), c10::GetCPUAllocator(),
                          /*resizable=*/true);
      std::memcpy(made.mutable_data(), from->data(), from->nbytes());
    }
    if (!made)
      // Owns nothing. A kernel that resizes it gets memory of the CPU, which `settle` sees.
      made = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), from->nbytes(),
          c10::DataPtr(from->mutable_data(), c10::Device(c10::kCPU)), c10::GetCPUAllocator(),
          /*resizable=*/true));
    return made;
  }

  static Tensor view_of(const Tensor &base, const Tensor &cpu) {
    Tensor typed = base.scalar_type() == cpu.scalar_type() ? base : base.view(cpu.scalar_type());
    Tensor view = at::as_strided(typed, cpu.sizes(), cpu.strides(), cpu.storage_offset());
    // A view takes its base's flags; the CPU kernel may have changed them.
    view._set_conj(cpu.is_conj());
    view._set_neg(cpu.is_neg());
    return view;
  }

  std::vector<Pair> pairs_;
  std::unordered_map<c10::StorageImpl *, c10::Storage> storages_;  // npu to CPU
};

// --- random numbers ------------------------------------------------------------------------------

constexpr uint64_t kMix = 0x9E3779B97F4A7C15ull;  // spreads small numbers over all bits

// A generator of the CPU for one call. What it gives depends on the npu generator's seed and offset
// alone, so that saving and restoring its state repeats numbers; right after seeding they are those
// of a CPU generator with the same seed.
//
// In a graph the npu generator may not be asked; there a generator of the CPU is kept with the call,
// so replays differ from each other, and seeding does not repeat them.
at::Generator cpu_generator(at::Generator npu) {
  static std::atomic<uint64_t> captured{0};
  if (softnpu_is_capturing()) return at::detail::createCPUGenerator(++captured * kMix);
  std::lock_guard<std::mutex> held(npu.mutex());
  const uint64_t seed = npu.current_seed(), offset = npu.get_offset();
  npu.set_offset(offset + 4);  // a multiple of 4, as for philox
  return at::detail::createCPUGenerator(offset ? seed ^ (offset * kMix) : seed);
}

// torch_npu's own default generator; its PrivateUse1 hooks do not hand it out.
at::Generator default_generator(c10::Device where) {
  using Get = const at::Generator &(*)(c10::DeviceIndex);
  static Get get = [] {
    void *library = dlopen("libtorch_npu.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Get>(
                         dlsym(library, "_ZN6at_npu6detail22getDefaultNPUGeneratorEa"))
                   : nullptr;
  }();
  TORCH_CHECK(get, "software NPU: this torch_npu has no getDefaultNPUGenerator");
  return get(where.index());
}

c10::Device current_device() { return c10::impl::VirtualGuardImpl(kDevice).getDevice(); }

// --- captured calls ------------------------------------------------------------------------------

// A call in a graph: the CPU side of its arguments, which aliases memory that a graph keeps, and
// where results that were new tensors have to go.
struct Recorded {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;
  std::vector<std::pair<void *, size_t>> results;  // {nullptr, 0} for those that alias arguments
};

template <typename Function>
void each_tensor(const IValue &value, Function function) {
  if (value.isTensor())
    function(value.toTensor());
  else if (value.isTensorList())
    for (const Tensor &t : value.toTensorVector()) function(t);
}

void replay(void *data) {
  const auto &call = *static_cast<Recorded *>(data);
  at::AutoDispatchBelowADInplaceOrView below;
  torch::jit::Stack stack(call.arguments);
  Trace::instance().count(call.op);
  call.op.redispatchBoxed(kCpu, &stack);
  size_t next = 0;
  for (const IValue &value : stack)
    each_tensor(value, [&](const Tensor &t) {
      auto [to, bytes] = call.results.at(next++);
      if (bytes) std::memcpy(to, t.const_data_ptr(), bytes);
    });
}

// --- the kernel ------------------------------------------------------------------------------------

bool has_cpu_semantics(const c10::OperatorHandle &op) {
  using Key = c10::DispatchKey;
  for (Key key : {Key::CPU, Key::CompositeImplicitAutograd, Key::CompositeExplicitAutograd,
                  Key::CompositeExplicitAutogradNonFunctional})
    if (op.hasKernelForDispatchKey(key)) return true;
  return false;
}

IValue argument_to_cpu(Aliases &aliases, IValue value) {
  if (value.isTensor()) return aliases.to_cpu(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor &t : value.toTensorVector()) made.push_back(aliases.to_cpu(t));
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> made;
    for (const std::optional<Tensor> &t : value.toOptionalTensorVector())
      made.push_back(t ? std::optional<Tensor>(aliases.to_cpu(*t)) : std::nullopt);
    return made;
  }
  if (value.isDevice() && value.toDevice().type() == kDevice) {
    aliases.device = value.toDevice().has_index() ? value.toDevice() : current_device();
    return c10::Device(c10::kCPU);
  }
  if (value.isGenerator() && value.toGenerator().defined() &&
      value.toGenerator().device().type() == kDevice)
    return cpu_generator(value.toGenerator());
  return value;
}

// On the CPU every tensor can meet every other, which on an NPU is an error. Operators of npu:: and
// atb:: take lengths and tables on the host, and check that themselves.
void check_devices(const c10::OperatorHandle &op, const Aliases &aliases) {
  if (!aliases.device || (!aliases.other && !aliases.host)) return;
  static const std::set<std::string> mixed = {
      "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::_to_copy",
      // Indices may be the host's, as for CUDA; so may sizes.
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
      "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::tensor_split",
      "aten::_pack_padded_sequence", "aten::_pad_packed_sequence",
  };
  const std::string &name = op.operator_name().name;
  if (name.rfind("aten::", 0) != 0 || mixed.count(name)) return;
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", op.operator_name(),
              " got ", *aliases.device, " and ",
              aliases.other ? *aliases.other : *aliases.host, " (software NPU)");
}

void run_on_cpu(const c10::OperatorHandle &op, c10::DispatchKeySet, torch::jit::Stack *stack);

#include "late_kernel.h"

void run_on_cpu(const c10::OperatorHandle &op, c10::DispatchKeySet, torch::jit::Stack *stack) {
  const auto &schema = op.schema();
  Trace::instance().count(op);
  TORCH_CHECK_NOT_IMPLEMENTED(has_cpu_semantics(op), "software NPU: ", op.operator_name(),
                              " has no CPU semantics; add them to python/softnpu/operators");
  static const bool late = softnpu_is_late();
  if (!late)
    softnpu_flush();
  else if (run_late(op, stack))
    return;
  const size_t count = schema.arguments().size(), base = stack->size() - count;
  Aliases aliases;
  for (size_t i = 0; i < count; i++) {
    IValue &value = (*stack)[base + i];
    value = argument_to_cpu(aliases, value);
    // Pinning is torch_npu's, and a CPU kernel would ask for CUDA.
    if (value.isBool() && schema.arguments()[i].name() == "pin_memory") value = false;
  }
  check_devices(op, aliases);
  const c10::Device where = aliases.device ? *aliases.device : current_device();
  if (aliases.device)
    for (size_t i = 0; i < count; i++)
      if ((*stack)[base + i].isNone() && schema.arguments()[i].name() == "generator")
        (*stack)[base + i] = cpu_generator(default_generator(where));

  at::AutoDispatchBelowADInplaceOrView below;
  std::unique_ptr<Recorded> recorded;
  if (softnpu_is_capturing())
    recorded.reset(new Recorded{op, {stack->begin() + base, stack->end()}, {}});
  op.redispatchBoxed(kCpu, stack);
  aliases.settle();

  auto give_back = [&](const Tensor &cpu) {
    // What it read may not have been written yet.
    TORCH_CHECK(!late || softnpu_is_capturing() || !late_schema(op).view || !cpu.defined() ||
                    cpu.numel() == 0 || !aliases.is_new(cpu),
                "software NPU: ", op.operator_name(),
                " is declared as a view and made a copy; late mode has to know it");
    Tensor npu = aliases.to_npu(cpu, where);
    if (recorded) {
      const bool copied = npu.defined() && npu.device().type() == kDevice && aliases.is_new(cpu);
      recorded->results.emplace_back(copied ? npu.mutable_data_ptr() : nullptr,
                                     copied ? bytes_spanned(cpu) : 0);
    }
    return npu;
  };
  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (size_t i = 0; i < results; i++) {
    IValue &value = (*stack)[first + i];
    if (value.isTensor()) {
      value = give_back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor &t : value.toTensorVector()) made.push_back(give_back(t));
      value = made;
    }
  }
  if (recorded)
    softnpu_record(replay, [](void *data) { delete static_cast<Recorded *>(data); },
                   recorded.release());
}

// --- operators that are neither torch_npu's nor boxed -----------------------------------------------

// torch_npu's goes to its own formats; PyTorch's ends in copy_, which is boxed or torch_npu's.
Tensor to_copy(const Tensor &self, std::optional<at::ScalarType> dtype,
               std::optional<at::Layout> layout, std::optional<at::Device> device,
               std::optional<bool> pin, bool non_blocking,
               std::optional<at::MemoryFormat> format) {
  return at::native::_to_copy(self, dtype, layout, device, pin, non_blocking, format);
}

// For operators that PyTorch composes of others and torch_npu has a kernel of its own for under the
// autograd key, past any that is boxed: PyTorch's composition, which is what the CPU's key has.
void run_composition(const c10::OperatorHandle &op, c10::DispatchKeySet,
                     torch::jit::Stack *stack) {
  op.redispatchBoxed(kCpu, stack);
}

// PyTorch's composition would ask torch_npu which fused kernel to take.
Tensor attention(const Tensor &query, const Tensor &key, const Tensor &value,
                 const std::optional<Tensor> &mask, double dropout, bool causal,
                 std::optional<double> scale, bool grouped) {
  std::optional<Tensor> added = mask;  // to the scores, which a mask of booleans is not
  if (mask && mask->defined() && mask->scalar_type() == at::kBool)
    added = at::zeros_like(*mask, query.options())
                .masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity());
  return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, added, dropout,
                                                            causal, std::nullopt, scale, grouped));
}

// torch_npu's: they make, describe, resize and view memory without computing.
const std::set<std::string> &kept() {
  static const std::set<std::string> names = {
      "aten::empty.memory_format", "aten::empty_strided", "aten::empty_like",
      "aten::new_empty_strided", "aten::resize_", "aten::resize_as_", "aten::set_",
      "aten::set_.source_Storage", "aten::set_.source_Tensor",
      "aten::set_.source_Storage_storage_offset", "aten::as_strided", "aten::as_strided_",
      "aten::view", "aten::_reshape_alias", "aten::unfold", "aten::view_as_real",
      "aten::view_as_complex", "aten::squeeze", "aten::squeeze.dim", "aten::unsqueeze",
      "aten::record_stream", "aten::is_pinned", "aten::_pin_memory", "aten::is_set_to",
      "aten::_lazy_clone", "aten::_copy_from_and_resize", "aten::_copy_from",
      "npu::empty_with_format", "npu::empty_with_format.names", "npu::unsafe_empty_with_format",
      "npu::empty_with_swapped_memory", "npu::get_npu_format", "npu::get_storage_size",
      "npu::npu_change_data_ptr", "npu::copy_memory_", "npu::save_npugraph_tensor",
      "npu::save_npugraph_tensor.tensorlist", "npu::_npu_format_cast", "npu::npu_format_cast",
      "npu::npu_format_cast.Tensor", "npu::npu_format_cast_", "npu::npu_format_cast_.acl_format",
      "npu::_npu_format_cast.aclnn", "_C_ascend::weak_ref_tensor",
  };
  return names;
}

std::mutex install_lock;
std::vector<c10::RegistrationHandleRAII> &registrations() {
  static auto *all = new std::vector<c10::RegistrationHandleRAII>;  // kept to the end
  return *all;
}
std::set<std::string> installed;

void put(const c10::OperatorName &name, c10::DispatchKey key, c10::KernelFunction kernel) {
  registrations().push_back(c10::Dispatcher::singleton().registerImpl(
      name, key, std::move(kernel), std::nullopt, nullptr, "software NPU"));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Registers the kernel for every operator that has none of ours yet; again after a library has
// defined more. Returns how many were added.
EXPORT int softnpu_install() {
  std::lock_guard<std::mutex> held(install_lock);
  auto &dispatcher = c10::Dispatcher::singleton();
  int added = 0;
  for (const c10::OperatorName &name : dispatcher.getAllOpNames()) {
    auto space = name.getNamespace();
    if (!space || (*space != "aten" && *space != "npu" && *space != "atb" && *space != "_C_ascend"))
      continue;
    const std::string full = c10::toString(name);
    auto op = dispatcher.findSchema(name);
    if (!op || kept().count(full) || installed.count(full)) continue;
    if (!op->hasKernelForDispatchKey(kKey) && !op->hasKernelForDispatchKey(c10::DispatchKey::CPU))
      continue;
    if (full == "aten::copy_" && softnpu_is_late())
      put(name, kKey, c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(copy_late)));
    else if (full == "aten::_to_copy")
      put(name, kKey, c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(to_copy)));
    else
      put(name, kKey, c10::KernelFunction::makeFromBoxedFunction<&run_on_cpu>());
    const auto autograd = c10::DispatchKey::AutogradPrivateUse1;
    if (full == "aten::scaled_dot_product_attention") {
      for (auto key : {kKey, autograd})
        put(name, key, c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(attention)));
    } else if (*space == "aten" && op->hasKernelForDispatchKey(autograd) &&
               op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
               !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) {
      put(name, autograd, c10::KernelFunction::makeFromBoxedFunction<&run_composition>());
    }
    installed.insert(full);
    added++;
  }
  return added;
}

// Counts what is run past the dispatcher.
EXPORT void softnpu_trace(const char *name) { Trace::instance().count(std::string(name)); }

EXPORT void softnpu_count(int on) { Trace::instance().enable(on != 0); }

// The counts since the last call, as the trace file has them.
EXPORT const char *softnpu_counts() {
  static thread_local std::string text;
  text = Trace::instance().take();
  return text.c_str();
}
