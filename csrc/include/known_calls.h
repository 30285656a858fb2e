// Was a call like this one made before? Then it needs no check, no plan and no launch choice, only the
// launch, on the memory of this call.
//
// A decode step makes the same calls over and over: other numbers, maybe in other memory. What the
// checks, the plan and the launch choice go by is what the exchange says of the tensors and the plain
// arguments, so a call that agrees in all of that with one that passed ends in the same launch. Of where
// the tensors lie, they go by two things: the position relative to the widest load and store, in which
// calls have to agree, and whether an output shares memory with another tensor, which is asked at every
// call. Plain arguments are compared as Python objects, exact ints by value, all else by identity: True
// is not 1. So is the type of the first input (logits or hidden states), by which a caller knows a tracer.
// What the exchange does not tell, whether an input is negated and which stream is current, is left to the
// caller to ask at every call.
//
// Outputs come in groups, each of which a call is given or allocates. A call that allocates is known with
// the allocator and the layouts that its own came from.
//
// A `Kind` is what the calls of one op have in common: the type of their prepared `Launch`; kNumPlain,
// their plain arguments; kNumTensors and kNumOutputs, their tensors, outputs first; kNumGroups, of outputs.
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

// What a call is known by, besides its tensors: the plain arguments, and what it allocates.
template <size_t kNumPlain>
struct CallKey {
  using Plain = std::array<py::handle, kNumPlain>;

  std::array<int64_t, kNumPlain> value;  // of an int, or the address of what is none
  uint32_t ints = 0;                     // bit i: plain argument i is an int
  uint32_t allocated = 0;                // bit g: group g of the outputs

  // Nothing if an argument is an int that may be anything when it is asked, or too large.
  static std::optional<CallKey> of(const Plain& plain, uint32_t allocated) {
    CallKey key;
    key.allocated = allocated;
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
    return value == other.value && ints == other.ints && allocated == other.allocated;
  }
};

// A call that passed the checks.
template <typename Kind>
struct KnownCall {
  using Memory = std::array<void*, Kind::kNumTensors>;  // where each lies; null for an absent one

  CallKey<Kind::kNumPlain> key;
  py::tuple plain;  // keeps alive what the key knows by its address
  py::object
      first_type;  // of Python, of the first input; a tracer's tensors are of types of their own
  std::array<KnownTensor, Kind::kNumTensors> tensors;
  std::array<py::object, Kind::kNumGroups>
      layouts;  // an aiter.routing.buffers.Layouts, if allocated
  std::shared_ptr<const typename Kind::Launch> launch;

  // Whether the tensors from `first` to `last`, a tuple of them or None, are like those of the call that
  // is known; sets where they lie.
  bool takes(py::handle tuple, int first, int last, Memory& memory) const {
    if (tuple.is_none()) {
      std::fill(memory.begin() + first, memory.begin() + last, nullptr);
      return tensors[first].is_absent();
    }
    if (tensors[first].is_absent() || !is_tuple_of(last - first, tuple)) return false;
    for (int i = first; i < last; ++i) {
      if (!tensors[i].is(PyTuple_GET_ITEM(tuple.ptr(), i - first), memory[i])) return false;
    }
    return true;
  }

  // Whether an output shares memory with another tensor.
  bool overlaps(const Memory& memory) const {
    MemoryRange ranges[Kind::kNumTensors];
    for (int i = 0; i < Kind::kNumTensors; ++i) {
      ranges[i] = MemoryRange::of(memory[i], tensors[i].extent_bytes);
    }
    return find_overlap(ranges, Kind::kNumTensors, Kind::kNumOutputs).has_value();
  }
};

// To be used with the GIL held.
template <typename Kind>
class KnownCalls {
 public:
  using Call = KnownCall<Kind>;
  using Key = CallKey<Kind::kNumPlain>;
  static constexpr int kNumInputs = Kind::kNumTensors - Kind::kNumOutputs;

  // A known call like this one, as far as its outputs are not concerned, or null; sets where the inputs
  // lie.
  std::shared_ptr<const Call> find(const Key& key, const std::array<py::handle, kNumInputs>& inputs,
                                   typename Call::Memory& memory) const {
    dlpack::Tensor first;
    if (!detail::exchange(inputs[0], first) || first.ndim != 2) return nullptr;
    // NOTE: held, as reading the tensors below may run Python code, which may forget the call.
    const std::shared_ptr<const Call> call =
        calls_[place_of(key, {first.shape[0], first.strides[0], dlpack::packed(first.dtype),
                              first.device.device_id})];
    constexpr int kFirst = Kind::kNumOutputs;
    if (call == nullptr || !(call->key == key) || type_of(inputs[0]) != call->first_type.ptr() ||
        !call->tensors[kFirst].is(first, memory[kFirst])) {
      return nullptr;
    }
    for (int i = 1; i < kNumInputs; ++i) {
      if (!call->tensors[kFirst + i].is(inputs[i], memory[kFirst + i])) return nullptr;
    }
    return call;
  }

  // How often everything was forgotten, which a call is to ask for before it is made.
  uint64_t generation() const { return generation_; }

  // Remembers a call that passed the checks, unless something forgot all calls since it had begun.
  // `views` are its tensors, null for an absent one; `layouts` those of the groups that it allocated, else
  // None. Left out is what could not be told from others, or has no quick allocator.
  void remember(uint64_t generation, const std::array<const TensorView*, Kind::kNumTensors>& views,
                py::handle first_input, py::tuple plain,
                const std::array<py::handle, Kind::kNumGroups>& layouts,
                std::shared_ptr<const typename Kind::Launch> launch) {
    if (plain.size() != Kind::kNumPlain) {
      throw py::type_error("plain arguments: expected " + std::to_string(Kind::kNumPlain) +
                           ", got " + std::to_string(plain.size()));
    }
    if (generation != generation_) return;
    auto call = std::make_shared<Call>();
    uint32_t allocated = 0;
    for (size_t group = 0; group < layouts.size(); ++group) {
      if (layouts[group].is_none()) continue;
      if (PyTuple_GET_ITEM(layouts[group].ptr(), 0) == Py_None) return;
      allocated |= 1u << group;
      call->layouts[group] = py::reinterpret_borrow<py::object>(layouts[group]);
    }
    typename Key::Plain objects;
    std::copy_n(plain.begin(), objects.size(), objects.begin());
    const auto key = Key::of(objects, allocated);
    if (!key) return;
    for (size_t i = 0; i < views.size(); ++i) {
      if (views[i] == nullptr) continue;
      const auto known = KnownTensor::of(*views[i]);
      if (!known) return;
      call->tensors[i] = *known;
    }
    call->key = *key;
    call->plain = std::move(plain);
    call->first_type = py::reinterpret_borrow<py::object>(type_of(first_input));
    call->launch = std::move(launch);
    const KnownTensor& first = call->tensors[Kind::kNumOutputs];
    const size_t place =
        place_of(*key, {first.shape[0], first.stride[0], first.dtype, first.device_index});
    std::shared_ptr<const Call> replaced = std::move(call);
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
  // of the first input. A product spreads it over the high bits.
  static size_t place_of(const Key& key, const std::array<int64_t, 4>& first) {
    uint64_t mixed = key.allocated;
    const auto mix = [&mixed](int64_t value) {
      mixed = (mixed ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
      mixed ^= mixed >> 32;
    };
    for (const int64_t value : key.value) mix(value);
    for (const int64_t value : first) mix(value);
    return mixed * 0x9e3779b97f4a7c15u >> (64 - kPlaceBits);
  }

  static PyObject* type_of(py::handle object) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  }

  using Table = std::array<std::shared_ptr<const Call>, size_t{1} << kPlaceBits>;

  Table calls_;
  uint64_t generation_ = 0;
};

}  // namespace aiter
