"""The compiled ops, one module per op; each function is a stub of its namesake in `csrc/pybind`."""
