// Tensors as the launchers see them, and the checks that every argument passes before a launch.
//
// A TensorView is what a binding reads off a Python tensor: pointer, dtype, shape, strides, device.
// No framework header is needed to make or to use one. Checks throw std::invalid_argument (Python:
// ValueError) with a sentence that names the argument, what was expected and what came; the text is
// made when a check fails, so that a good call formats nothing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace aiter {

enum class DType { f32, f16, bf16, i32, other };

enum class DeviceKind { cpu, gpu, other };

constexpr int kMaxDims = 8;

struct TensorView {
  const char* name = "";  // of the argument
  void* data = nullptr;
  DType dtype = DType::other;
  std::string dtype_name;  // for DType::other
  int itemsize = 0;        // bytes
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in items
  DeviceKind device_kind = DeviceKind::other;
  int device_index = 0;
  int exchange_device_type = 0;  // DLPack's code of the device; 0 if read from attributes
  uint32_t exchange_dtype = 0;   // DLPack's, packed; likewise

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (shape[d] != 1 && stride[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  // Bytes between the first and behind the last item.
  int64_t extent_bytes() const {
    int64_t last = 0;
    for (int d = 0; d < ndim; ++d) {
      if (shape[d] == 0) return 0;
      last += (shape[d] - 1) * stride[d];
    }
    return (last + 1) * itemsize;
  }
};

struct MemoryRange {
  uintptr_t begin, end;

  static MemoryRange of(const void* data, int64_t num_bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    return {begin, begin + static_cast<uintptr_t>(num_bytes)};
  }
  bool overlaps(const MemoryRange& other) const {
    return std::max(begin, other.begin) < std::min(end, other.end);
  }
};

// The first of the outputs, which are the first `num_outputs` ranges, that shares bytes with a later
// range, and that range, by index.
inline std::optional<std::pair<size_t, size_t>> find_overlap(const MemoryRange* ranges,
                                                             size_t num_ranges,
                                                             size_t num_outputs) {
  for (size_t output = 0; output < num_outputs; ++output) {
    for (size_t other = output + 1; other < num_ranges; ++other) {
      if (ranges[output].overlaps(ranges[other])) return std::pair(output, other);
    }
  }
  return std::nullopt;
}

std::string to_string(DType dtype);
std::string dtype_of(const TensorView& t);
std::string shape_of(const TensorView& t);
std::string device_of(const TensorView& t);

[[noreturn]] void fail_argument(const std::string& name, const std::string& expected,
                                const std::string& got);

void check_dtype(const TensorView& t, std::initializer_list<DType> allowed);
void check_rank(const TensorView& t, int ndim);
void check_contiguous(const TensorView& t);
// Exactly this shape; -1 stands for any size.
void check_shape(const TensorView& t, std::initializer_list<int64_t> shape);
// At least `numel` items; `why` is the formula behind the number.
void check_min_numel(const TensorView& t, int64_t numel, const char* why);
void check_range(const char* name, int64_t value, int64_t low, int64_t high);
// All on the device of the first, and that device one of this target's.
void check_same_device(std::initializer_list<const TensorView*> tensors);
// No output shares memory with another output or with an input. Null pointers are skipped.
void check_no_overlap(std::initializer_list<const TensorView*> outputs,
                      std::initializer_list<const TensorView*> inputs,
                      std::initializer_list<const TensorView*> more_inputs = {});

}  // namespace aiter
