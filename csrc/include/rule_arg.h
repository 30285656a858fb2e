// How a binding takes a RoutingRule: None, the object, or the tuple of numbers that it packs.
#pragma once

#include "pybind_args.h"
#include "routing_rule.h"

namespace aiter {

// None stands for plain softmax, renormalised. The numbers were checked when the rule was made.
inline RoutingRule rule_arg(py::handle object, const char* name) {
  if (object.is_none()) return RoutingRule::plain(true);
  const auto fail = [&] {
    throw py::type_error(std::string(name) + ": expected a RoutingRule or None, got " +
                         detail::type_name(object));
  };
  py::object packed = py::reinterpret_borrow<py::object>(object);
  if (!PyTuple_Check(object.ptr())) {
    if (!py::hasattr(object, "packed")) fail();
    packed = object.attr("packed");
  }
  if (!is_tuple_of(RoutingRule::kNumNumbers, packed)) fail();
  double numbers[RoutingRule::kNumNumbers];
  for (int i = 0; i < RoutingRule::kNumNumbers; ++i) {
    numbers[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(packed.ptr(), i));
    if (numbers[i] == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  }
  return RoutingRule::of(numbers);
}

}  // namespace aiter
