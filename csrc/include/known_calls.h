// Was a call like this one made before? Then it needs no check, no plan and no launch choice, only the
// launch, on the memory of this call.
//
// A decode step makes the same calls over and over: other numbers, maybe in other memory. What the
// checks, the plan and the launch choice go by is what the exchange says of the tensors and the plain
// arguments, so a call that agrees in all of that with one that passed ends in the same launch. Of where
// the tensors lie, they go by two things: the position relative to the widest load and store, in which
// calls have to agree, and whether an output shares memory with another tensor, which is asked at every
// call. Plain arguments are compared as Python objects, exact ints by value, all else by identity: True
// is not 1. So is the type of the logits, by which a caller knows a tracer. What the exchange does not
// tell, whether the logits are negated and which stream is current, is left to the caller to ask at
// every call.
//
// A call that was given no outputs is known with the allocator and the layouts that its own came from.
//
// The table is direct-mapped: a call that lands on another's place takes it over. Rejected: a hash map
// with an order of use, which costs every call more than it saves the rare one that is pushed out; and
// knowing calls by the addresses of their tensors, which saves 25 comparisons and makes a new call of
// every one that allocates.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <utility>

#include "fused_topk_moe_sorting_api.h"
#include "pybind_args.h"

namespace aiter {

// What the exchange said of a tensor, but for its address. An absent one, None in Python, has the rank
// -1.
struct KnownTensor {
  static constexpr int kMostDims = 2;       // of what passes the checks
  static constexpr uintptr_t kWidest = 16;  // bytes that are loaded or stored at once

  int32_t device_type = 0, device_index = 0;
  uint32_t dtype = 0;
  int32_t ndim = -1;
  uintptr_t position = 0;  // the address modulo the widest access
  bool has_memory = false;
  int64_t extent_bytes = 0;
  int64_t shape[kMostDims] = {};
  int64_t stride[kMostDims] = {};

  // Of a view that passed the checks; nothing if it was read from attributes.
  static std::optional<KnownTensor> of(const TensorView& view) {
    if (view.exchange_device_type == 0 || view.ndim > kMostDims) return std::nullopt;
    KnownTensor known;
    known.device_type = view.exchange_device_type;
    known.device_index = view.device_index;
    known.dtype = view.exchange_dtype;
    known.ndim = view.ndim;
    known.position = reinterpret_cast<uintptr_t>(view.data) % kWidest;
    known.has_memory = view.data != nullptr;
    known.extent_bytes = view.extent_bytes();
    std::copy_n(view.shape, view.ndim, known.shape);
    std::copy_n(view.stride, view.ndim, known.stride);
    return known;
  }

  bool is_absent() const { return ndim < 0; }

  // Whether `object` is like this; sets where it lies.
  bool is(py::handle object, void*& address) const {
    if (is_absent() || object.is_none()) {
      address = nullptr;
      return is_absent() && object.is_none();
    }
    dlpack::Tensor t;
    return detail::exchange(object, t) && is(t, address);
  }

  bool is(const dlpack::Tensor& t, void*& address) const {
    address = dlpack::address_of(t);
    if (t.device.device_type != device_type || t.device.device_id != device_index ||
        dlpack::packed(t.dtype) != dtype || t.ndim != ndim ||
        reinterpret_cast<uintptr_t>(address) % kWidest != position ||
        (address != nullptr) != has_memory) {
      return false;
    }
    for (int d = 0; d < ndim; ++d) {
      if (t.shape[d] != shape[d] || t.strides[d] != stride[d]) return false;
    }
    return true;
  }
};

// What a call is known by, besides its tensors: the plain arguments, and whether it allocates.
struct CallKey {
  static constexpr size_t kNumPlain = 9;
  using Plain = std::array<py::handle, kNumPlain>;

  std::array<int64_t, kNumPlain> value;  // of an int, or the address of what is none
  uint32_t ints = 0;                     // bit i: plain argument i is an int
  bool allocates = false;

  // Nothing if an argument is an int that may be anything when it is asked, or too large.
  static std::optional<CallKey> of(const Plain& plain, bool allocates) {
    CallKey key;
    key.allocates = allocates;
    for (size_t i = 0; i < kNumPlain; ++i) {
      PyObject* const object = plain[i].ptr();
      if (!PyLong_Check(object) || PyBool_Check(object)) {
        key.value[i] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(object));
        continue;
      }
      int overflow = 0;
      key.value[i] =
          PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
      if (!PyLong_CheckExact(object) || overflow != 0) return std::nullopt;
      key.ints |= 1u << i;
    }
    return key;
  }

  bool operator==(const CallKey& other) const {
    return value == other.value && ints == other.ints && allocates == other.allocates;
  }
};

// A call that passed the checks.
struct KnownCall {
  CallKey key;
  py::tuple plain;         // keeps alive what the key knows by its address
  py::object gating_type;  // of Python; a tracer's tensors are of types of their own
  std::array<KnownTensor, kNumFusedTensors> tensors;
  py::tuple layouts;  // an aiter.routing.buffers.Layouts, of a call that allocates
  std::shared_ptr<const FusedLaunch> launch;

  // Whether the outputs are like those of the call that is known; sets where they lie. `topk_out` is a
  // tuple of two or None.
  bool takes(py::handle sorted, py::handle topk_out, FusedMemory& memory) const {
    const auto all = [&](py::handle tuple, int first, int last) {
      if (!is_tuple_of(last - first, tuple)) return false;
      for (int i = first; i < last; ++i) {
        if (!tensors[i].is(PyTuple_GET_ITEM(tuple.ptr(), i - first), memory[i])) return false;
      }
      return true;
    };
    if (!all(sorted, 0, kNumSortedBuffers)) return false;
    if (!topk_out.is_none()) return all(topk_out, kNumSortedBuffers, kNumFusedOutputs);
    memory[kTopkWeights] = memory[kTopkIds] = nullptr;
    return tensors[kTopkWeights].is_absent();
  }

  // Whether an output shares memory with another tensor.
  bool overlaps(const FusedMemory& memory) const {
    MemoryRange ranges[kNumFusedTensors];
    for (int i = 0; i < kNumFusedTensors; ++i) {
      ranges[i] = MemoryRange::of(memory[i], tensors[i].extent_bytes);
    }
    return find_overlap(ranges, kNumFusedTensors, kNumFusedOutputs).has_value();
  }
};

// To be used with the GIL held.
class KnownCalls {
 public:
  // A known call like this one, as far as its outputs are not concerned, or null; sets where the other
  // tensors lie.
  std::shared_ptr<const KnownCall> find(const CallKey& key, py::handle gating_output,
                                        py::handle expert_mask, py::handle num_local_tokens,
                                        py::handle correction_bias, FusedMemory& memory) const {
    dlpack::Tensor gating;
    if (!detail::exchange(gating_output, gating) || gating.ndim != 2) return nullptr;
    // NOTE: held, as reading the tensors below may run Python code, which may forget the call.
    const std::shared_ptr<const KnownCall> call =
        calls_[place_of(key, {gating.shape[0], gating.strides[0], dlpack::packed(gating.dtype),
                              gating.device.device_id})];
    if (call == nullptr || !(call->key == key) ||
        type_of(gating_output) != call->gating_type.ptr() ||
        !call->tensors[kGatingOutput].is(gating, memory[kGatingOutput]) ||
        !call->tensors[kExpertMask].is(expert_mask, memory[kExpertMask]) ||
        !call->tensors[kNumLocalTokens].is(num_local_tokens, memory[kNumLocalTokens]) ||
        !call->tensors[kCorrectionBias].is(correction_bias, memory[kCorrectionBias])) {
      return nullptr;
    }
    return call;
  }

  // How often everything was forgotten, which a call is to ask for before it is made.
  uint64_t generation() const { return generation_; }

  // Remembers a call that passed the checks, unless something forgot all calls since it had begun.
  // `layouts` are those of one that allocated, else None. Left out is what could not be told from
  // others, or has no quick allocator.
  void remember(uint64_t generation, const FusedTopkMoeSortingArgs& args, py::handle gating_output,
                py::tuple plain, py::handle layouts, std::shared_ptr<const FusedLaunch> launch) {
    if (plain.size() != CallKey::kNumPlain) {
      throw py::type_error("plain arguments: expected " + std::to_string(CallKey::kNumPlain) +
                           ", got " + std::to_string(plain.size()));
    }
    if (generation != generation_) return;
    const bool allocates = !layouts.is_none();
    if (allocates && PyTuple_GET_ITEM(layouts.ptr(), 0) == Py_None) return;
    CallKey::Plain objects;
    std::copy_n(plain.begin(), objects.size(), objects.begin());
    const auto key = CallKey::of(objects, allocates);
    if (!key) return;
    auto call = std::make_shared<KnownCall>();
    const auto views = tensors_of(args);
    for (size_t i = 0; i < views.size(); ++i) {
      if (views[i] == nullptr) continue;
      const auto known = KnownTensor::of(*views[i]);
      if (!known) return;
      call->tensors[i] = *known;
    }
    call->key = *key;
    call->plain = std::move(plain);
    call->gating_type = py::reinterpret_borrow<py::object>(type_of(gating_output));
    if (allocates) call->layouts = py::reinterpret_borrow<py::tuple>(layouts);
    call->launch = std::move(launch);
    const KnownTensor& gating = call->tensors[kGatingOutput];
    const size_t place =
        place_of(*key, {gating.shape[0], gating.stride[0], gating.dtype, gating.device_index});
    std::shared_ptr<const KnownCall> replaced = std::move(call);
    calls_[place].swap(replaced);
  }

  void forget() {
    ++generation_;
    // NOTE: taken out of the table first, as what a call holds may run Python code when it goes.
    const auto forgotten = std::make_unique<Table>();
    forgotten->swap(calls_);
  }

 private:
  static constexpr int kPlaceBits = 10;

  // By what calls of one process differ in: the plain arguments, and shape, row stride, dtype and device
  // of the logits. A product spreads it over the high bits.
  static size_t place_of(const CallKey& key, const std::array<int64_t, 4>& gating) {
    uint64_t mixed = key.allocates ? 1 : 0;
    const auto mix = [&mixed](int64_t value) {
      mixed = (mixed ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
      mixed ^= mixed >> 32;
    };
    for (const int64_t value : key.value) mix(value);
    for (const int64_t value : gating) mix(value);
    return mixed * 0x9e3779b97f4a7c15u >> (64 - kPlaceBits);
  }

  static PyObject* type_of(py::handle object) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  }

  using Table = std::array<std::shared_ptr<const KnownCall>, size_t{1} << kPlaceBits>;

  Table calls_;
  uint64_t generation_ = 0;
};

}  // namespace aiter
