"""Adds the C++ sources and the compiler config to the built package as `aiter/_src`.

All metadata is in pyproject.toml. The sources live beside the package in a checkout, so a wheel
needs this one copy; an editable install finds them where they are (see `aiter/jit/paths.py`).

With PREBUILD_KERNELS=1 every module is also built into `aiter/_prebuilt`, for the cpu and for each
architecture in GPU_ARCHS, by the package's own loader; the wheel is then for one platform and
Python. The loader's parts that this needs import no PyTorch, which a build environment has not; what
they do import is in pyproject.toml's `build-system.requires`. Rejected: requirements that depend on
the variable, which take a build backend of our own for three packages that every user installs
anyway.
"""

import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUNDLED = ("csrc", "jit_config")
PREBUILD = os.environ.get("PREBUILD_KERNELS", "0").lower() not in ("", "0", "false", "off")


class BuildWithSources(build_py):
    """`build_py` that also copies the folders in `BUNDLED`, and prebuilds on request."""

    def run(self) -> None:
        super().run()
        package = ROOT / "aiter" if self.editable_mode else Path(self.build_lib).resolve() / "aiter"
        if not self.editable_mode:
            bundle = package / "_src"
            # NOTE: the build folder may hold those of an earlier run, which this one must not ship.
            for old in (bundle, package / "_prebuilt"):
                shutil.rmtree(old, ignore_errors=True)
            for name in BUNDLED:
                shutil.copytree(ROOT / name, bundle / name)
        if PREBUILD:
            prebuild(package / "_prebuilt")


class PlatformDistribution(Distribution):
    """A distribution whose wheel fits one platform and Python, since it holds extension modules."""

    def has_ext_modules(self) -> bool:
        return True


def prebuild(output: Path) -> None:
    """Builds every module for the cpu and GPU_ARCHS into the folder `output`."""
    for name in ("aiter", "aiter.jit"):
        # NOTE: bare packages in place of the real ones, whose imports lead to PyTorch.
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = package
    from aiter.jit import envs, prebuilt
    from aiter.jit.load import Loader
    from aiter.jit.spec import load_spec
    from aiter.jit.target import cpu_target

    if not envs.PREBUILD_KERNELS.get():
        return
    loader = Loader(cache_dir=output)
    for target in (cpu_target(), *map(prebuilt.gpu_target, envs.GPU_ARCHS.get())):
        for module in loader.modules():
            spec = load_spec(loader.config_path, module, loader.csrc_dir, target)
            if target.kind in spec.targets:
                loader.ensure(module, target)
    prebuilt.tidy_prebuilt(output)


setup(
    cmdclass={"build_py": BuildWithSources},
    distclass=PlatformDistribution if PREBUILD else Distribution,
)
