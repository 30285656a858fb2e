#include <Python.h>

#include <exception>
#include <string>

void run_planted(const std::string& name, int* data, int n);

static PyObject* run(PyObject*, PyObject* args) {
  const char* name;
  unsigned long long data;
  int n;
  if (!PyArg_ParseTuple(args, "sKi", &name, &data, &n)) return nullptr;
  try {
    run_planted(name, reinterpret_cast<int*>(data), n);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"run", run, METH_VARARGS, "run(name, address, num_ints)"},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "module_planted", nullptr, 0, methods,
                                 nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_module_planted() { return PyModuleDef_Init(&module_def); }
