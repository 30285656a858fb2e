// How a binding takes its arguments: Python objects to TensorView, int and bool, by name.
//
// pybind11's own conversions answer a wrong argument with the list of all signatures; these answer
// with a sentence about the one argument (TypeError when the kind of object is wrong, ValueError
// when an int does not fit).
//
// A tensor is read through the C function that its type offers for that (DLPack's exchange API,
// PyTorch 2.10 and later), about 0.1 us; an object without one through its attributes (data_ptr(),
// shape, stride(), dtype, device), about 2 us, and so are dtypes that DLPack has no code for.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <new>
#include <optional>
#include <string>

#include "dlpack_abi.h"
#include "tensor_view.h"

namespace aiter {

namespace py = pybind11;

namespace detail {

// The exchange table of a Python type, or null; remembered for the last type asked about.
inline const dlpack::ExchangeApi* exchange_api(py::handle object) {
  static PyTypeObject* known_type = nullptr;
  static const dlpack::ExchangeApi* known_api = nullptr;
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == known_type) return known_api;
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule != nullptr && PyCapsule_IsValid(capsule, dlpack::kExchangeCapsuleName)) {
    api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsuleName));
    if (api != nullptr && (api->header.version.major != dlpack::kMajorVersion ||
                           api->tensor_from_py_object_no_sync == nullptr)) {
      api = nullptr;
    }
  }
  Py_XDECREF(capsule);
  PyErr_Clear();
  Py_INCREF(type);  // a remembered type must not be freed and its address reused
  Py_XDECREF(known_type);
  known_type = type;
  known_api = api;
  return api;
}

inline std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

inline DType dtype_from_name(const std::string& name) {
  if (name == "torch.float32") return DType::f32;
  if (name == "torch.float16") return DType::f16;
  if (name == "torch.bfloat16") return DType::bf16;
  if (name == "torch.int32") return DType::i32;
  return DType::other;
}

// What the exchange says of a tensor; false if there is none or it cannot say. Shape and strides are
// the tensor's own.
inline bool exchange(py::handle object, dlpack::Tensor& t) {
  const dlpack::ExchangeApi* api = exchange_api(object);
  if (api == nullptr) return false;
  if (api->tensor_from_py_object_no_sync(object.ptr(), &t) != 0) {
    PyErr_Clear();  // what DLPack cannot say, the attributes can
    return false;
  }
  return t.ndim == 0 || t.strides != nullptr;
}

inline bool read_exchange(py::handle object, TensorView& view) {
  dlpack::Tensor t;
  if (!exchange(object, t) || t.ndim > kMaxDims) return false;
  view.data = dlpack::address_of(t);
  view.itemsize = (t.dtype.bits * t.dtype.lanes + 7) / 8;
  if (t.dtype.lanes == 1) {
    if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 32) view.dtype = DType::f32;
    if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 16) view.dtype = DType::f16;
    if (t.dtype.code == dlpack::kBfloat && t.dtype.bits == 16) view.dtype = DType::bf16;
    if (t.dtype.code == dlpack::kInt && t.dtype.bits == 32) view.dtype = DType::i32;
  }
  view.exchange_device_type = t.device.device_type;
  view.exchange_dtype = dlpack::packed(t.dtype);
  switch (t.device.device_type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
    case dlpack::kRocmHost:
      view.device_kind = DeviceKind::cpu;
      break;
    case dlpack::kCuda:
    case dlpack::kRocm:
    case dlpack::kCudaManaged:
      view.device_kind = DeviceKind::gpu;
      view.device_index = t.device.device_id;
      break;
    default:
      view.device_kind = DeviceKind::other;
  }
  view.ndim = t.ndim;
  for (int d = 0; d < t.ndim; ++d) {
    view.shape[d] = t.shape[d];
    view.stride[d] = t.strides[d];
  }
  return true;
}

inline void read_attributes(py::handle object, TensorView& view) {
  if (py::hasattr(object, "layout")) {
    const std::string layout = py::str(object.attr("layout"));
    if (layout != "torch.strided") fail_argument(view.name, "a tensor with strides", layout);
  }
  if (py::hasattr(object, "is_nested") && py::cast<bool>(object.attr("is_nested"))) {
    fail_argument(view.name, "a tensor with strides", "a nested one");
  }
  const py::tuple shape = object.attr("shape");
  const py::tuple stride = object.attr("stride")();
  view.ndim = static_cast<int>(shape.size());
  if (view.ndim > kMaxDims) {
    fail_argument(view.name, "at most " + std::to_string(kMaxDims) + " dimensions",
                  std::to_string(view.ndim));
  }
  for (int d = 0; d < view.ndim; ++d) {
    view.shape[d] = shape[d].cast<int64_t>();
    view.stride[d] = stride[d].cast<int64_t>();
  }
  view.dtype_name = py::str(object.attr("dtype"));
  view.dtype = dtype_from_name(view.dtype_name);
  view.itemsize = object.attr("element_size")().cast<int>();
  const py::object device = object.attr("device");
  const std::string kind = py::str(device.attr("type"));
  view.device_kind = kind == "cpu"    ? DeviceKind::cpu
                     : kind == "cuda" ? DeviceKind::gpu
                                      : DeviceKind::other;
  if (view.device_kind == DeviceKind::other) {
    fail_argument(view.name, "a tensor on a cpu or cuda device", std::string(py::str(device)));
  }
  const py::object index = device.attr("index");
  if (!index.is_none()) view.device_index = index.cast<int>();
  view.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
}

}  // namespace detail

// Reads a tensor by the exchange alone, for a caller that has another way where there is none.
// Nothing is checked.
inline bool read_exchanged(py::handle object, const char* name, TensorView& view) {
  view.name = name;
  if (!detail::read_exchange(object, view)) return false;
  if (view.dtype == DType::other) view.dtype_name = py::str(object.attr("dtype"));
  return true;
}

inline void check_memory(const TensorView& view) {
  // As of a parameter whose memory was given back.
  if (view.data == nullptr && view.numel() != 0) {
    fail_argument(view.name, "a tensor with memory", "shape " + shape_of(view) + " without any");
  }
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  if (view.dtype != DType::other && address % static_cast<uintptr_t>(view.itemsize) != 0) {
    fail_argument(view.name,
                  "memory aligned to the " + std::to_string(view.itemsize) + " bytes of " +
                      to_string(view.dtype),
                  "address " + std::to_string(address));
  }
}

inline TensorView tensor_arg(py::handle object, const char* name) {
  TensorView view;
  if (!read_exchanged(object, name, view)) {
    if (!py::hasattr(object, "data_ptr") || !py::hasattr(object, "stride")) {
      throw py::type_error(std::string(name) + ": expected a tensor, got " +
                           detail::type_name(object));
    }
    detail::read_attributes(object, view);
  }
  check_memory(view);
  return view;
}

// Whether the numbers of a tensor are the negatives of those in its memory. PyTorch can negate one
// without touching its memory, and the exchange does not tell. Other Python threads may run meanwhile.
inline bool is_negated(py::handle tensor) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto negated =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg));
  if (!negated) throw py::error_already_set();
  return negated.ptr() != Py_False;
}

// A tensor whose numbers are read.
inline TensorView input_arg(py::handle object, const char* name) {
  const TensorView view = tensor_arg(object, name);
  if (is_negated(object)) {
    fail_argument(name, "a tensor with its numbers in memory",
                  "one that is negated when it is read; call resolve_neg()");
  }
  return view;
}

inline std::optional<TensorView> optional_tensor_arg(py::handle object, const char* name) {
  if (object.is_none()) return std::nullopt;
  return tensor_arg(object, name);
}

inline std::optional<TensorView> optional_input_arg(py::handle object, const char* name) {
  if (object.is_none()) return std::nullopt;
  return input_arg(object, name);
}

inline int64_t int_arg(py::handle object, const char* name) {
  if (!PyIndex_Check(object.ptr()) || PyBool_Check(object.ptr())) {
    throw py::type_error(std::string(name) + ": expected an int, got " + detail::type_name(object));
  }
  const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!integer) {  // as of a tensor of floats, which has __index__ all the same
    if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(std::string(name) + ": expected an int, got " + detail::type_name(object) +
                         " " + std::string(py::repr(object)));
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  if (overflow != 0) {
    fail_argument(name, "an int that fits in 64 bits", std::string(py::str(object)));
  }
  return value;
}

inline bool bool_arg(py::handle object, const char* name) {
  if (!PyBool_Check(object.ptr())) {
    throw py::type_error(std::string(name) + ": expected a bool, got " + detail::type_name(object));
  }
  return object.ptr() == Py_True;
}

inline bool is_tuple_of(Py_ssize_t size, py::handle object) {
  return PyTuple_Check(object.ptr()) && PyTuple_GET_SIZE(object.ptr()) == size;
}

// A tuple of N numbers: what an aiter.ops.rule.RoutingRule packs itself into, the rule or the tuple.
template <size_t N>
std::array<double, N> packed_arg(py::handle object, const char* name) {
  static PyObject* const attribute = PyUnicode_InternFromString("packed");
  py::object packed = py::reinterpret_borrow<py::object>(object);
  if (!PyTuple_Check(object.ptr())) {
    packed = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), attribute));
    if (!packed) PyErr_Clear();
  }
  std::array<double, N> numbers;
  bool fits = packed && is_tuple_of(N, packed);
  for (size_t i = 0; fits && i < N; ++i) {
    numbers[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(packed.ptr(), i));
    fits = PyErr_Occurred() == nullptr;
    PyErr_Clear();
  }
  if (!fits) {
    throw py::type_error(std::string(name) + ": expected a RoutingRule, got " +
                         detail::type_name(object));
  }
  return numbers;
}

// id_format: "slot" or "flat".
inline bool is_flat(py::handle id_format) {
  if (!PyUnicode_Check(id_format.ptr())) {
    throw py::type_error("id_format: expected a string, got " + detail::type_name(id_format));
  }
  if (PyUnicode_CompareWithASCIIString(id_format.ptr(), "flat") == 0) return true;
  if (PyUnicode_CompareWithASCIIString(id_format.ptr(), "slot") == 0) return false;
  fail_argument("id_format", "'slot' or 'flat'", std::string(py::repr(id_format)));
}

// A function of torch._C, kept for the life of the process; a static py::object would outlive the
// interpreter.
inline py::handle kept_from_torch(const char* name) {
  return py::object(py::module_::import("torch").attr("_C").attr(name)).release();
}

// PyTorch's current stream on a GPU, as a raw handle. `exchange_device_type` is that of the tensor's
// view.
inline void* current_gpu_stream(py::handle tensor, int exchange_device_type, int device_index) {
  if (exchange_device_type != 0) {
    const dlpack::ExchangeApi* api = detail::exchange_api(tensor);
    void* stream = nullptr;
    if (api != nullptr && api->current_work_stream != nullptr) {
      if (api->current_work_stream(exchange_device_type, device_index, &stream) == 0) {
        return stream;
      }
      PyErr_Clear();
    }
  }
  static const py::handle raw_stream = kept_from_torch("_cuda_getCurrentRawStream");
  return reinterpret_cast<void*>(raw_stream(device_index).cast<uintptr_t>());
}

// PyTorch's current stream on the tensor's device, as a raw handle; null on the CPU.
inline void* current_stream(py::handle tensor, const TensorView& view) {
  if (view.device_kind != DeviceKind::gpu) return nullptr;
  return current_gpu_stream(tensor, view.exchange_device_type, view.device_index);
}

// Defines a function that takes exactly N arguments, by position only. It is for calls inside the
// package: pybind11's dispatcher, with its names and defaults, costs 0.13 us more.
template <auto kFunction>
struct Positional;

template <size_t N, py::object (*kFunction)(const std::array<py::handle, N>&)>
struct Positional<kFunction> {
  static PyObject* call(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    try {
      if (count != N) {
        throw py::type_error("expected " + std::to_string(N) + " arguments, got " +
                             std::to_string(count));
      }
      std::array<py::handle, N> arguments;
      std::copy_n(objects, N, arguments.begin());
      return kFunction(arguments).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

template <auto kFunction>
void def_positional(py::module_& m, const char* name) {
  static PyMethodDef definition = {
      name,
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Positional<kFunction>::call)),
      METH_FASTCALL, nullptr};
  m.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr)));
}

// Lets other Python threads run while a kernel runs on the CPU; a GPU launch is too short for it.
class ReleaseGilOnCpu {
 public:
  explicit ReleaseGilOnCpu(const TensorView& view) {
    if (view.device_kind == DeviceKind::cpu) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

}  // namespace aiter
