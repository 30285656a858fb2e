// Was exactly this call made before? Then it needs no check, no plan and no launch choice, only its
// launch once more.
//
// A decode step makes the same calls over and over: new numbers in the same memory. What the checks,
// the plan and the launch choice go by is what the exchange says of the tensors and the plain
// arguments, so a call that agrees in all of that with one that passed ends in the same launch. Tensors
// are compared by what the exchange says of them now, never by identity, as one can be resized or given
// other memory in place. The plain arguments are compared as Python objects, exact ints by value, all
// else by identity: True is not 1. So is the type of the logits, by which a caller knows a tracer. What
// the exchange does not tell, whether the logits are negated and which stream is current, is left to the
// caller to ask at every call.
//
// The table is direct-mapped: a call that lands on another's place takes it over. Rejected: a hash map
// with an order of use, which costs every call more than it saves the rare one that is pushed out.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <utility>

#include "fused_topk_moe_sorting_api.h"
#include "pybind_args.h"

namespace aiter {

// What the exchange said of a tensor. An absent one, None in Python, has the rank -1.
struct KnownTensor {
  static constexpr int kMostDims = 2;  // of what passes the checks

  void* data = nullptr;
  int32_t device_type = 0, device_index = 0;
  uint32_t dtype = 0;
  int32_t ndim = -1;
  int64_t shape[kMostDims] = {};
  int64_t stride[kMostDims] = {};

  // Of a view that passed the checks; nothing if it was read from attributes.
  static std::optional<KnownTensor> of(const TensorView& view) {
    if (view.exchange_device_type == 0 || view.ndim > kMostDims) return std::nullopt;
    KnownTensor known{view.data, view.exchange_device_type, view.device_index, view.exchange_dtype,
                      view.ndim};
    std::copy_n(view.shape, view.ndim, known.shape);
    std::copy_n(view.stride, view.ndim, known.stride);
    return known;
  }

  bool is_absent() const { return ndim < 0; }

  bool is(const dlpack::Tensor& t) const {
    if (static_cast<char*>(t.data) + t.byte_offset != data || t.device.device_type != device_type ||
        t.device.device_id != device_index || dlpack::packed(t.dtype) != dtype || t.ndim != ndim) {
      return false;
    }
    for (int d = 0; d < ndim; ++d) {
      if (t.shape[d] != shape[d] || t.strides[d] != stride[d]) return false;
    }
    return true;
  }
};

// Remembered calls of the fused launch. To be used with the GIL held.
class RepeatedCalls {
 public:
  static constexpr size_t kNumTensors = 8;  // logits, the five outputs, mask, num_local_tokens
  static constexpr size_t kNumPlain = 8;    // arguments that are no tensors
  using Tensors = std::array<py::handle, kNumTensors>;
  using Plain = std::array<py::handle, kNumPlain>;

  struct Call {
    py::object gating_type;  // of Python; a tracer's tensors are of types of their own
    std::array<KnownTensor, kNumTensors> tensors;
    py::tuple plain;
    std::shared_ptr<const FusedLaunch> launch;  // shared with those that make it without the GIL
  };

  // The remembered call with these arguments, or null. It lasts until other Python code may run.
  const Call* find(const Tensors& tensors, const Plain& plain) const {
    dlpack::Tensor gating, ids;
    if (!detail::exchange(tensors[0], gating) || gating.ndim != 2 ||
        !detail::exchange(tensors[1], ids)) {
      return nullptr;
    }
    const Call* call =
        calls_[place_of(static_cast<char*>(gating.data) + gating.byte_offset,
                        static_cast<char*>(ids.data) + ids.byte_offset, gating.shape[0])]
            .get();
    if (call == nullptr || !call->tensors[0].is(gating) || !call->tensors[1].is(ids) ||
        type_of(tensors[0]) != call->gating_type.ptr()) {
      return nullptr;
    }
    for (size_t i = 0; i < kNumPlain; ++i) {
      if (!same(plain[i].ptr(), PyTuple_GET_ITEM(call->plain.ptr(), i))) return nullptr;
    }
    for (size_t i = 2; i < kNumTensors; ++i) {
      const KnownTensor& known = call->tensors[i];
      dlpack::Tensor t;
      const bool is_known =
          tensors[i].is_none() ? known.is_absent() : detail::exchange(tensors[i], t) && known.is(t);
      if (!is_known) return nullptr;
    }
    return call;
  }

  // Remembers a call that passed the checks. One that could not be told from others is left out.
  void remember(const FusedTopkMoeSortingArgs& args, py::handle gating_output, py::tuple plain,
                std::shared_ptr<const FusedLaunch> launch) {
    if (plain.size() != kNumPlain) {
      throw py::type_error("plain arguments: expected " + std::to_string(kNumPlain) + ", got " +
                           std::to_string(plain.size()));
    }
    for (const py::handle value : plain) {
      if (PyLong_Check(value.ptr()) && !PyLong_CheckExact(value.ptr()) &&
          !PyBool_Check(value.ptr())) {
        return;
      }
    }
    auto call = std::make_unique<Call>();
    const TensorView* const views[kNumTensors] = {&args.gating_output,
                                                  &args.sort.sorted_ids,
                                                  &args.sort.sorted_weights,
                                                  &args.sort.sorted_expert_ids,
                                                  &args.sort.num_valid_ids,
                                                  &args.sort.moe_buf,
                                                  args.sort.expert_mask_or_null(),
                                                  args.sort.num_local_tokens_or_null()};
    for (size_t i = 0; i < kNumTensors; ++i) {
      if (views[i] == nullptr) continue;
      const auto known = KnownTensor::of(*views[i]);
      if (!known) return;
      call->tensors[i] = *known;
    }
    call->gating_type = py::reinterpret_borrow<py::object>(type_of(gating_output));
    call->plain = std::move(plain);
    call->launch = std::move(launch);
    const auto place =
        place_of(args.gating_output.data, args.sort.sorted_ids.data, args.gating_output.shape[0]);
    calls_[place] = std::move(call);
  }

  void forget() {
    for (auto& call : calls_) call.reset();
  }

 private:
  static constexpr int kPlaceBits = 8;

  // Allocators hand out memory on boundaries, so that the low bits say nothing; a product spreads the
  // others over its high ones.
  static size_t place_of(const void* gating, const void* ids, int64_t num_tokens) {
    const uint64_t mixed = reinterpret_cast<uintptr_t>(gating) * 0x9e3779b97f4a7c15u ^
                           reinterpret_cast<uintptr_t>(ids) * 0xc2b2ae3d27d4eb4fu ^
                           static_cast<uint64_t>(num_tokens) * 0x165667b19e3779f9u;
    return mixed >> (64 - kPlaceBits);
  }

  static PyObject* type_of(py::handle object) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  }

  static bool same(PyObject* value, PyObject* known) {
    if (value == known) return true;
    return PyLong_CheckExact(value) && PyLong_CheckExact(known) &&
           PyObject_RichCompareBool(value, known, Py_EQ) == 1;
  }

  std::array<std::unique_ptr<Call>, size_t{1} << kPlaceBits> calls_;
};

}  // namespace aiter
