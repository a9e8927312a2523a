// Late mode's part of the boxed kernel, included by boxed_kernel.cpp alone: an operator becomes an
// item of its stream, and its results are tensors whose shapes come from the schema (results that
// are arguments) or from the operator's Meta kernel. What has neither lets the device run on and
// runs at once; what gives a shape or a number to the host also makes the host wait.
#pragma once

struct LateSchema {
  std::string name;
  bool view = true;        // touches no elements
  bool writes = false;     // to an argument
  bool out = false;        // which may be resized
  bool waits = false;      // the host gets a number, or a shape that depends on elements
  bool runs_now = false;   // behind its stream
  bool has_meta = true;
  std::vector<int> given;  // for each result the argument that it is; empty: not all are
};

// That schema, and not the one of the operator's CPU kernel, says whether elements are needed.
LateSchema read_schema(const c10::FunctionSchema &schema) {
  static const std::set<std::string> metadata = {
      "t_", "transpose_", "squeeze_", "unsqueeze_", "swapdims_", "swapaxes_", "detach_"};
  static const std::set<std::string> waiting = {
      "_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "equal", "_unique",
      "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "is_nonzero",
      "bincount", "repeat_interleave", "histc", "_linalg_check_errors"};
  // Declared as views, and may copy.
  static const std::set<std::string> maybe_views = {
      "contiguous", "reshape", "reshape_as", "flatten", "ravel", "to", "type_as", "resolve_conj",
      "resolve_neg", "matrix_H", "movedim", "unflatten", "pin_memory"};
  // Their Meta kernels give other shapes or strides than the CPU's, a result moves in place, or (of
  // dropout in training) late results were wrong for a reason that is not known yet.
  static const std::set<std::string> other_shapes = {
      "addbmm_", "dropout", "native_dropout", "_npu_dropout", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_batch_norm_with_update", "_batch_norm_no_update", "_embedding_bag",
      "_embedding_bag_forward_only", "_fft_r2c", "_fft_c2c", "_fft_c2r", "_linalg_svd", "linalg_eig",
      "_linalg_eigh"};
  LateSchema found;
  found.name = c10::toString(schema.operator_name());
  const std::string base = schema.name().substr(schema.name().find("::") + 2);
  found.waits = waiting.count(base) > 0;
  found.runs_now = other_shapes.count(base) > 0;
  for (const auto &argument : schema.arguments()) {
    found.writes = found.writes || (argument.alias_info() && argument.alias_info()->isWrite());
    found.out = found.out || argument.is_out();
  }
  found.view = !schema.returns().empty();
  bool all_given = true;
  for (const auto &result : schema.returns()) {
    const auto *alias = result.alias_info();
    found.view = found.view && alias && !alias->isWrite();
    int from = -1;
    for (size_t i = 0; alias && alias->isWrite() && i < schema.arguments().size(); i++) {
      const auto *other = schema.arguments()[i].alias_info();
      if (other && other->isWrite() && other->beforeSets() == alias->beforeSets())
        from = static_cast<int>(i);
    }
    all_given = all_given && from >= 0;
    found.given.push_back(from);
  }
  if (!all_given) found.given.clear();
  if (maybe_views.count(base)) found.view = false;
  if (metadata.count(base)) found.view = true;
  return found;
}

LateSchema &late_schema(const c10::OperatorHandle &op) {
  static std::mutex lock;
  static auto *known = new std::unordered_map<const c10::FunctionSchema *, LateSchema>;
  std::lock_guard<std::mutex> held(lock);
  auto found = known->find(&op.schema());
  if (found == known->end()) found = known->emplace(&op.schema(), read_schema(op.schema())).first;
  return found->second;
}

void wait_for_stream(void *stream) {
  const int code = softnpu_wait(stream);
  TORCH_CHECK(code == 0, "software NPU: an operator failed on the device (error ", code,
              "); its sentence is on stderr");
}

template <typename Function>
IValue map_tensors(const IValue &value, Function function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor &t : value.toTensorVector()) made.push_back(function(t));
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> made;
    for (const std::optional<Tensor> &t : value.toOptionalTensorVector())
      made.push_back(t ? std::optional<Tensor>(function(*t)) : std::nullopt);
    return made;
  }
  return value;
}

bool is_number(const Tensor &t) {
  return t.device().type() == c10::kCPU && t.unsafeGetTensorImpl()->is_wrapped_number();
}

// The tensors of one call as Meta tensors that share storages as they do.
class MetaArguments {
 public:
  struct Pair {
    Tensor real, meta;
  };

  Tensor to_meta(const Tensor &real) {
    if (!real.defined() || is_number(real)) return real;
    for (const Pair &pair : pairs)
      if (pair.real.is_same(real)) return pair.meta;
    c10::Storage &storage = storages_[real.storage().unsafeGetStorageImpl()];
    if (!storage)
      storage = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), real.storage().nbytes(),
          c10::DataPtr(nullptr, c10::Device(c10::kMeta)), c10::GetAllocator(c10::kMeta),
          /*resizable=*/true));
    Tensor meta = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::Meta), real.dtype());
    meta.unsafeGetTensorImpl()->set_sizes_and_strides(real.sizes(), real.strides(),
                                                      real.storage_offset());
    copy_flags(real, meta);
    pairs.push_back({real, meta});
    return meta;
  }

  // The argument that a result is, or whose storage it views.
  std::optional<Tensor> argument_of(const Tensor &meta) const {
    for (const Pair &pair : pairs)
      if (pair.meta.is_same(meta)) return pair.real;
    for (const Pair &pair : pairs) {
      if (pair.meta.storage().unsafeGetStorageImpl() != meta.storage().unsafeGetStorageImpl() ||
          pair.real.device().type() != kDevice)
        continue;
      Tensor view = at::as_strided(pair.real, meta.sizes(), meta.strides(), meta.storage_offset());
      view._set_conj(meta.is_conj());
      view._set_neg(meta.is_neg());
      return view;
    }
    return std::nullopt;
  }

  std::vector<Pair> pairs;

 private:
  std::unordered_map<c10::StorageImpl *, c10::Storage> storages_;
};

// What the Meta kernel returns; empty where there is none, or it refuses.
std::optional<torch::jit::Stack> run_on_meta(const c10::OperatorHandle &op, LateSchema &known,
                                             const IValue *arguments, MetaArguments &metas) {
  if (!known.has_meta) return std::nullopt;
  torch::jit::Stack stack;
  for (size_t i = 0; i < op.schema().arguments().size(); i++) {
    IValue value = map_tensors(arguments[i], [&](const Tensor &t) { return metas.to_meta(t); });
    if (value.isDevice()) value = c10::Device(c10::kMeta);
    if (value.isGenerator()) value = IValue();
    if (value.isBool() && op.schema().arguments()[i].name() == "pin_memory") value = false;
    stack.push_back(std::move(value));
  }
  try {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  } catch (const c10::NotImplementedError &) {
    known.has_meta = false;
    return std::nullopt;
  } catch (const std::exception &) {
    // Of these arguments; running it says what is wrong with them, or that nothing is.
    return std::nullopt;
  }
  return stack;
}

struct LateCall {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;
  std::vector<Tensor> results;  // CPU tensors over where they go; undefined for arguments
  at::ThreadLocalState state;
};

void run_late_call(void *data) {
  auto &call = *static_cast<LateCall *>(data);
  at::ThreadLocalStateGuard state(call.state);
  at::AutoDispatchBelowADInplaceOrView below;
  // A copy: a boxed kernel with two out= returns references to arguments that it has dropped already.
  torch::jit::Stack stack(call.arguments);
  try {
    call.op.redispatchBoxed(kCpu, &stack);
    size_t next = 0;
    for (const IValue &value : stack)
      each_tensor(value, [&](const Tensor &t) {
        const Tensor &to = call.results.at(next++);
        // An empty result stands for one that was not asked for.
        if (!to.defined() || !t.defined() || to.numel() == 0) return;
        TORCH_CHECK(to.numel() == t.numel() && to.scalar_type() == t.scalar_type(),
                    "its Meta kernel says ", to.sizes(), " of ", to.scalar_type(),
                    ", and its CPU kernel gives ", t.sizes(), " of ", t.scalar_type());
        to.copy_(t.reshape(to.sizes()));
      });
  } catch (const std::exception &error) {
    throw std::runtime_error(c10::toString(call.op.operator_name()) + ": " + error.what());
  }
}

bool has_boolean(const IValue &indices) {
  bool found = false;
  map_tensors(indices, [&](const Tensor &t) {
    if (t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte)) found = true;
    return t;
  });
  return found;
}

// Makes a call an item of its stream and puts its results on the stack; false: it has to run now,
// and what it needs has run.
bool run_late(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  LateSchema &known = late_schema(op);
  if (known.view || softnpu_is_running_item()) return false;
  const bool updating = softnpu_is_updating();
  if (softnpu_is_capturing() && !updating) return false;
  const auto &schema = op.schema();
  const size_t count = schema.arguments().size(), base = stack->size() - count;
  const IValue *arguments = stack->data() + base;

  Aliases seen;
  for (size_t i = 0; i < count; i++) {
    const IValue &value = arguments[i];
    if (value.isDevice() && value.toDevice().type() == kDevice)
      seen.device = value.toDevice().has_index() ? value.toDevice() : current_device();
    map_tensors(value, [&](const Tensor &t) {
      seen.see(t);
      return t;
    });
  }
  const c10::Device where = seen.device ? *seen.device : current_device();
  void *stream = acl_stream(where);
  if (known.waits || (known.name == "aten::index.Tensor" && has_boolean(arguments[1]))) {
    if (!updating) wait_for_stream(stream);
    return false;
  }
  check_devices(op, seen);
  if (seen.other || known.runs_now) {  // a copy is ordered on both devices
    if (!updating) softnpu_progress(stream);
    if (seen.other) softnpu_progress(acl_stream(*seen.other));
    return false;
  }

  MetaArguments metas;
  std::optional<torch::jit::Stack> meta;
  if ((known.given.empty() && !schema.returns().empty()) || (known.out && !updating)) {
    meta = run_on_meta(op, known, arguments, metas);
    if (!meta) {
      if (!updating) softnpu_progress(stream);
      return false;
    }
    for (const auto &pair : metas.pairs)
      if (pair.real.device().type() == kDevice && pair.real.sizes() != pair.meta.sizes())
        pair.real.resize_(pair.meta.sizes());
  }

  // The arguments as the device sees them: npu memory as it will be, numbers of the host as they are.
  Aliases aliases;
  std::vector<IValue> given;
  for (size_t i = 0; i < count; i++) {
    IValue value = argument_to_cpu(aliases, map_tensors(arguments[i], [](const Tensor &t) {
      if (!t.defined() || t.device().type() != c10::kCPU || is_number(t)) return t;
      return t.clone();
    }));
    if (value.isBool() && schema.arguments()[i].name() == "pin_memory") value = false;
    if (value.isNone() && seen.device && schema.arguments()[i].name() == "generator")
      value = cpu_generator(default_generator(where));
    given.push_back(std::move(value));
  }

  std::vector<IValue> results;
  std::vector<Tensor> go_to;
  bool any_new = false;
  if (known.given.empty() && meta) {
    for (const IValue &value : *meta)
      results.push_back(map_tensors(value, [&](const Tensor &t) -> Tensor {
        go_to.emplace_back();
        if (!t.defined()) return t;
        if (auto argument = metas.argument_of(t)) return *argument;
        Tensor made = at::empty_strided(t.sizes(), t.strides(), t.options().device(where));
        go_to.back() = Aliases().to_cpu(made);
        any_new = true;
        return made;
      }));
  } else {
    for (int argument : known.given) {
      results.push_back(arguments[argument]);
      each_tensor(results.back(), [&](const Tensor &) { go_to.emplace_back(); });
    }
  }
  torch::jit::drop(*stack, count);
  for (IValue &value : results) stack->push_back(std::move(value));

  if (updating) {
    auto *kept = new Recorded{op, std::move(given), {}};
    kept->results.resize(go_to.size(), {nullptr, 0});
    softnpu_record(replay, [](void *data) { delete static_cast<Recorded *>(data); }, kept);
  } else if (any_new || known.writes || schema.returns().empty()) {
    softnpu_put(stream, run_late_call, [](void *data) { delete static_cast<LateCall *>(data); },
                new LateCall{op, std::move(given), std::move(go_to), at::ThreadLocalState()});
  }
  return true;
}

// --- copies between host and device -----------------------------------------------------------------
// In the order of torch_npu's copy_, which is not exported: a copy with non_blocking from or to pinned
// memory is an item; one of other host memory makes the host wait, and so does a blocking one.

void copy_bytes(const Tensor &to, const Tensor &from, bool non_blocking) {
  const bool to_device = to.device().type() == kDevice;
  const Tensor &host = to_device ? from : to;
  void *stream = acl_stream(to_device ? to.device() : from.device());
  const size_t bytes = to.numel() * to.itemsize();
  if (!non_blocking) {
    wait_for_stream(stream);
    std::memmove(to.mutable_data_ptr(), from.const_data_ptr(), bytes);
    return;
  }
  const int kind = to_device ? 1 : 2;  // ACL_MEMCPY_HOST_TO_DEVICE, ACL_MEMCPY_DEVICE_TO_HOST
  const int code = aclrtMemcpyAsync(to.mutable_data_ptr(), bytes, from.const_data_ptr(), bytes, kind,
                                    stream);
  TORCH_CHECK(code == 0, "software NPU: a copy was refused (error ", code, ")");
  if (!host.is_pinned()) return wait_for_stream(stream);
  c10::impl::VirtualGuardImpl guard(kDevice);
  // The allocator keeps the memory until the copy has run.
  at::getHostAllocator(kDevice)->record_event(host.storage().mutable_data(),
                                              host.storage().data_ptr().get_context(),
                                              guard.getStream(guard.getDevice()));
}

Tensor &copy_late(Tensor &self, const Tensor &from, bool non_blocking) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  const bool to_device = self.device().type() == kDevice;
  if (from._is_zerotensor() || (to_device && from.device().type() == kDevice)) {
    torch::jit::Stack stack{self, from, non_blocking};
    run_on_cpu(op, c10::DispatchKeySet(kKey), &stack);
    return self;
  }
  Trace::instance().count(op);
  if (self.numel() == 0) return self;
  c10::OptionalDeviceGuard guard(to_device ? self.device() : from.device());
  const bool same_type = self.scalar_type() == from.scalar_type();
  if (same_type && self.is_contiguous() && from.is_contiguous() && self.sizes() == from.sizes() &&
      self.is_conj() == from.is_conj() && self.is_neg() == from.is_neg()) {
    copy_bytes(self, from, non_blocking);
    return self;
  }
  // Elements are converted on the host, but for a copy that does not block: on the device.
  const bool convert_first = !same_type && (to_device != non_blocking);
  Tensor dense = convert_first ? from.to(self.scalar_type()) : from;
  dense = dense.expand_as(self).contiguous().resolve_conj().resolve_neg();
  const bool direct = self.is_contiguous() && dense.scalar_type() == self.scalar_type() &&
                      !self.is_conj() && !self.is_neg();
  Tensor landed = direct ? self : at::empty(self.sizes(), self.options().dtype(dense.scalar_type()));
  copy_bytes(landed, dense, non_blocking);
  if (!direct) self.copy_(landed);
  return self;
}
