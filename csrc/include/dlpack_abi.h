// The part of the DLPack 1.x C ABI that reads a tensor without owning it. Layout and values are
// DLPack's (github.com/dmlc/dlpack); only what is used is declared, so that no framework header is
// needed to take a tensor.
#pragma once

#include <cstdint>

namespace aiter::dlpack {

enum DeviceType : int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,
  kRocm = 10,
  kRocmHost = 11,
  kCudaManaged = 13,
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t device_type;
  int32_t device_id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// A data type as one number, never 0.
constexpr uint32_t packed(DataType type) {
  return uint32_t{type.code} << 24 | uint32_t{type.bits} << 16 | type.lanes;
}

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in items
  uint64_t byte_offset;
};

// Where the first item lies.
inline void* address_of(const Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

// What type(tensor).__dlpack_c_exchange_api__ points to.
struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);  // may be null
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

constexpr const char* kExchangeCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;

}  // namespace aiter::dlpack
