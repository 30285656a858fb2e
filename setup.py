"""Adds the C++ sources and the compiler config to the built package as `aiter/_src`.

All metadata is in pyproject.toml. The sources live beside the package in a checkout, so a wheel
needs this one copy; an editable install finds them where they are (see `aiter/jit/paths.py`).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLED = ("csrc", "jit_config")


class BuildWithSources(build_py):
    """`build_py` that also copies the folders in `BUNDLED`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).resolve().parent
        bundle = Path(self.build_lib) / "aiter" / "_src"
        shutil.rmtree(bundle, ignore_errors=True)
        for name in BUNDLED:
            shutil.copytree(root / name, bundle / name)


setup(cmdclass={"build_py": BuildWithSources})
