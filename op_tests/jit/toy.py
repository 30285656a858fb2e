"""A small module in a tree of its own, for tests of the loader.

It includes only Python.h, so that a build takes about half a second. Its functions: `value()` gives
the number in `include/outer.h` (by way of `include/inner.h`), `lanes()` the wave width, `extra()`
what the macro TOY_EXTRA says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from aiter.jit.load import Loader
from aiter.jit.target import Target, cpu_level

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = "module_toy"

SOURCE = """
#include <Python.h>
#include "outer.h"
#ifndef TOY_EXTRA
#define TOY_EXTRA 0
#endif
static PyObject* value(PyObject*, PyObject*) { return PyLong_FromLong(TOY_VALUE); }
static PyObject* lanes(PyObject*, PyObject*) { return PyLong_FromLong(AITER_WAVE_SIZE); }
static PyObject* extra(PyObject*, PyObject*) { return PyLong_FromLong(TOY_EXTRA); }
static PyObject* twice(PyObject*, PyObject* args) {
  PyObject* tensor;
  long number;
  if (!PyArg_ParseTuple(args, "Ol", &tensor, &number)) return nullptr;
  if (number < 0) return PyErr_Format(PyExc_ValueError, "number: expected >= 0, got %ld", number);
  return PyLong_FromLong(2 * number);
}
static PyMethodDef methods[] = {{"value", value, METH_NOARGS, ""},
                                {"lanes", lanes, METH_NOARGS, ""},
                                {"extra", extra, METH_NOARGS, ""},
                                {"twice", twice, METH_VARARGS, ""},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "module_toy", nullptr, 0, methods,
                                 nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_module_toy() { return PyModuleDef_Init(&module_def); }
"""

WRAPPER = """#!/bin/sh
# Logs each call, waits as long as the file {hold} exists, then compiles.
case " $* " in *" -c "*) echo "$$" >> {log}; while [ -e {hold} ]; do sleep 0.05; done;; esac
exec g++ "$@"
"""


class Toy:
    """The tree: a config, sources, and a cache folder.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.csrc = root / "csrc"
        self.config_path = root / "config.json"
        self.jit_dir = root  # for AITER_JIT_DIR
        self.cache_dir = root / "aiter"
        self.source = self.csrc / "toy.cpp"
        self.inner = self.csrc / "include" / "inner.h"
        self.outer = self.csrc / "include" / "outer.h"
        self.compiles_log = root / "compiles.log"
        self.hold = root / "hold"
        self.inner.parent.mkdir(parents=True)
        self.source.write_text(SOURCE)
        self.inner.write_text("#define TOY_VALUE 1\n")
        self.outer.write_text('#include "inner.h"\n')
        self.settings: dict[str, Any] = {"srcs": ["{{ AITER_CSRC_DIR }}/toy.cpp"]}
        self.configure()

    def configure(self, **settings: Any) -> None:
        """Writes the config with `settings` added."""
        self.settings.update(settings)
        self.config_path.write_text(json.dumps({MODULE: self.settings}))

    def loader(self) -> Loader:
        """A loader with nothing in memory, as a new process has."""
        return Loader(self.config_path, self.csrc, self.cache_dir)

    def load(self, wave: int = 64) -> Any:
        """The toy module through a new loader."""
        return self.loader().load(MODULE, self.target(wave))

    def target(self, wave: int = 64) -> Target:
        """The cpu target with this wave width."""
        return Target("cpu", (f"wave{wave}",), cpu_level())

    def builds(self) -> list[Path]:
        """The folders of the builds in the cache."""
        return [folder for _, folder in self.loader().cache.entries()]

    def compiler_wrapper(self) -> Path:
        """A g++ that logs its compiles and waits while the file `hold` exists."""
        path = self.root / "logging-g++"
        path.write_text(WRAPPER.format(log=self.compiles_log, hold=self.hold))
        path.chmod(0o755)
        return path

    def compiles(self) -> int:
        """How many compiles the wrapper has seen."""
        if not self.compiles_log.exists():
            return 0
        return len(self.compiles_log.read_text().splitlines())


SMALLEST = """
#include <Python.h>
static PyModuleDef def = {PyModuleDef_HEAD_INIT, "module_toy", nullptr, 0, nullptr,
                          nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_module_toy() { return PyModuleDef_Init(&def); }
"""


def toy_package(place: Path) -> None:
    """Copies the package to `place`, with a module that builds in a moment as its only one."""
    for name in ("aiter", "csrc", "jit_config"):
        ignored = shutil.ignore_patterns("__pycache__", "_prebuilt")
        shutil.copytree(REPOSITORY / name, place / name, ignore=ignored)
    (place / "csrc" / "toy.cpp").write_text(SMALLEST)
    (place / "jit_config" / "optCompilerConfig.json").write_text(
        json.dumps({MODULE: {"srcs": ["{{ AITER_CSRC_DIR }}/toy.cpp"]}})
    )
    shutil.rmtree(place / "csrc" / "cpu")


NAMES = {"aiter": "fused_moe_routing_aiter", "fused_moe_routing": "fused_moe_routing"}
"""What a wheel's file name begins with, by the import name."""


def build_wheel(checkout: Path, output: Path, name: str, **variables: str) -> Path:
    """The wheel of `checkout` under an import name, in `output`."""
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--wheel-dir", str(output), str(checkout),
    ]  # fmt: skip
    environment = child_environment(AITER_IMPORT_NAME=name, **variables)
    del environment["PYTHONPATH"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = output.glob(f"{NAMES[name]}-*.whl")
    return wheel


def child_code(toy: Toy, body: str) -> list[str]:
    """The command of a Python process that runs `body` with `loader`, `target` and `MODULE` set."""
    # NOTE: a runner in the background (nohup, &) hands on signals that are ignored.
    prelude = f"""
import signal
import sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from aiter.jit.load import Loader
from aiter.jit.target import Target
loader = Loader(Path({str(toy.config_path)!r}), Path({str(toy.csrc)!r}),
                Path({str(toy.cache_dir)!r}))
target = Target("cpu", ("wave64",), {cpu_level()!r})
MODULE = {MODULE!r}
"""
    return [sys.executable, "-c", prelude + body]


def child_environment(**variables: str) -> dict[str, str]:
    """The environment for a Python process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}


def program(path: Path, text: str = "#!/bin/sh\necho made up 1.0\n") -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
