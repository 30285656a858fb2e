// The checks of tensor_view.h.
#include "tensor_view.h"

#include "target.h"

namespace aiter {

std::string to_string(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::i32:
      return "int32";
    case DType::other:
      break;
  }
  return "another dtype";
}

std::string dtype_of(const TensorView& t) {
  return t.dtype == DType::other ? t.dtype_name : to_string(t.dtype);
}

std::string shape_of(const TensorView& t) {
  std::string text = "[";
  for (int d = 0; d < t.ndim; ++d) text += (d ? ", " : "") + std::to_string(t.shape[d]);
  return text + "]";
}

std::string device_of(const TensorView& t) {
  switch (t.device_kind) {
    case DeviceKind::cpu:
      return "cpu";
    case DeviceKind::gpu:
      return "cuda:" + std::to_string(t.device_index);
    case DeviceKind::other:
      break;
  }
  return "another device";
}

void fail_argument(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

void check_dtype(const TensorView& t, std::initializer_list<DType> allowed) {
  for (const DType dtype : allowed) {
    if (t.dtype == dtype) return;
  }
  std::string names;
  for (const DType dtype : allowed) names += (names.empty() ? "" : " or ") + to_string(dtype);
  fail_argument(t.name, "dtype " + names, dtype_of(t) + " (shape " + shape_of(t) + ")");
}

void check_rank(const TensorView& t, int ndim) {
  if (t.ndim != ndim) {
    fail_argument(t.name, "a tensor of rank " + std::to_string(ndim),
                  "rank " + std::to_string(t.ndim) + " (shape " + shape_of(t) + ")");
  }
}

void check_contiguous(const TensorView& t) {
  if (t.is_contiguous()) return;
  std::string strides;
  for (int d = 0; d < t.ndim; ++d) strides += (d ? ", " : "") + std::to_string(t.stride[d]);
  fail_argument(t.name, "a contiguous tensor",
                "shape " + shape_of(t) + " with strides [" + strides + "]");
}

void check_shape(const TensorView& t, std::initializer_list<int64_t> shape) {
  const auto fits = [&] {
    if (static_cast<int>(shape.size()) != t.ndim) return false;
    for (int d = 0; d < t.ndim; ++d) {
      const int64_t size = shape.begin()[d];
      if (size >= 0 && t.shape[d] != size) return false;
    }
    return true;
  };
  if (fits()) return;
  std::string wanted;
  for (const int64_t size : shape) {
    wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  fail_argument(t.name, "shape [" + wanted + "]", shape_of(t));
}

void check_min_numel(const TensorView& t, int64_t numel, const char* why) {
  if (t.numel() < numel) {
    fail_argument(t.name, "at least " + std::to_string(numel) + " elements (" + why + ")",
                  std::to_string(t.numel()) + " (shape " + shape_of(t) + ")");
  }
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    fail_argument(name, "a value from " + std::to_string(low) + " to " + std::to_string(high),
                  std::to_string(value));
  }
}

void check_same_device(std::initializer_list<const TensorView*> tensors) {
  constexpr DeviceKind kExpected = kTargetIsGpu ? DeviceKind::gpu : DeviceKind::cpu;
  const TensorView* first = nullptr;
  for (const TensorView* t : tensors) {
    if (t == nullptr) continue;
    if (first == nullptr) {
      first = t;
      if (t->device_kind != kExpected) {
        fail_argument(t->name,
                      std::string("a tensor on a device of the ") + kTargetName + " target",
                      device_of(*t));
      }
    } else if (t->device_kind != first->device_kind || t->device_index != first->device_index) {
      fail_argument(t->name, "device " + device_of(*first) + ", as " + first->name, device_of(*t));
    }
  }
}

void check_no_overlap(std::initializer_list<const TensorView*> outputs,
                      std::initializer_list<const TensorView*> inputs,
                      std::initializer_list<const TensorView*> more_inputs) {
  constexpr size_t kMaxTensors = 16;
  const TensorView* named[kMaxTensors];
  MemoryRange ranges[kMaxTensors];
  size_t num_ranges = 0;
  size_t num_outputs = 0;
  for (const auto* tensors : {&outputs, &inputs, &more_inputs}) {
    for (const TensorView* t : *tensors) {
      if (t == nullptr) continue;
      if (num_ranges == kMaxTensors) throw std::logic_error("check_no_overlap: too many tensors");
      named[num_ranges] = t;
      ranges[num_ranges++] = MemoryRange::of(t->data, t->extent_bytes());
    }
    if (tensors == &outputs) num_outputs = num_ranges;
  }
  if (const auto found = find_overlap(ranges, num_ranges, num_outputs)) {
    fail_argument(named[found->first]->name, "memory of its own",
                  std::string("memory that overlaps with ") + named[found->second]->name);
  }
}

}  // namespace aiter
