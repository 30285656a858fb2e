"""What is installed, and under which import name?

One tree, two names. `pip install .` installs it as `aiter`, the name that programs for ROCm's aiter
import; with AITER_IMPORT_NAME=fused_moe_routing the same files are installed under that name, and can
live beside ROCm's aiter (docs/with_rocm_aiter.md). Everything that goes by the name is computed here:
the distribution, the folder in the wheel, the plugins of engines. Inside of the package nothing spells
it. The distributions have names of their own, as `aiter` on PyPI is somebody else's project.

This is why the metadata stands here and not in pyproject.toml, whose `project.name` must be static.
Rejected: a `[project]` table whose name is overwritten afterwards, since installers that read the
table, as they may, then refuse the wheel; a second pyproject.toml, which takes a copy of all else.

The wheel also gets the C++ sources and the compiler config, as `_src` in the package. They live beside
the package in a checkout, where an editable install finds them (see `aiter/jit/paths.py`).

With PREBUILD_KERNELS=1 every module is also built into `_prebuilt` in the package, for the cpu and for
each architecture in GPU_ARCHS, by the package's own loader; the wheel is then for one platform and
Python. The loader's parts that this needs import no PyTorch, which a build environment has not; what
they do import is in pyproject.toml's `build-system.requires`. Rejected: requirements that depend on
the variable, which take a build backend of our own for three packages that every user installs
anyway.
"""

import importlib
import os
import re
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TREE = "aiter"  # the package's folder in a checkout
DISTRIBUTIONS = {"aiter": "fused-moe-routing-aiter", "fused_moe_routing": "fused-moe-routing"}
NAME = os.environ.get("AITER_IMPORT_NAME") or TREE
if NAME not in DISTRIBUTIONS:
    sys.exit(f"AITER_IMPORT_NAME: expected one of {', '.join(DISTRIBUTIONS)}, got {NAME!r}")

BUNDLED = ("csrc", "jit_config")
PREBUILD = os.environ.get("PREBUILD_KERNELS", "0").lower() not in ("", "0", "false", "off")
MODELS = ["transformers>=5.17"]
EXPORT = ["black", "clang-format"]
EXTRAS = {
    "test": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "numpy",
        "ziglang",
        "triton>=3.7; sys_platform == 'linux'",
        *MODELS,
        *EXPORT,
    ],
    "demo": ["numpy"],
    "models": MODELS,
    "bench": ["matplotlib"],
    "cross": ["ziglang"],
    "export": EXPORT,
    "dev": ["ruff", "mypy", "clang-format", "pre-commit"],
}
PLUGINS = {  # group of an engine's entry points: our module that has its `register`
    "vllm.general_plugins": "integrations.vllm",
    "sglang.srt.plugins": "integrations.sglang",
}


class BuildWithSources(build_py):
    """`build_py` that also copies the folders in `BUNDLED`, and prebuilds on request."""

    def run(self) -> None:
        package = ROOT / TREE if self.editable_mode else Path(self.build_lib).resolve() / NAME
        in_place = package == ROOT / TREE
        if not in_place:
            # NOTE: what an earlier run left, such as modules that were renamed since, would be shipped.
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if not in_place:
            for name in BUNDLED:
                shutil.copytree(ROOT / name, package / "_src" / name)
        if PREBUILD:
            prebuild(package / "_prebuilt")


class PlatformDistribution(Distribution):
    """A distribution whose wheel fits one platform and Python, since it holds extension modules."""

    def has_ext_modules(self) -> bool:
        return True


def prebuild(output: Path) -> None:
    """Builds every module for the cpu and GPU_ARCHS into the folder `output`."""
    for name in ("", ".jit"):
        # NOTE: bare packages in place of the real ones, whose imports lead to PyTorch.
        package = types.ModuleType(NAME + name)
        package.__path__ = [str(ROOT.joinpath(TREE, *name.split(".")[1:]))]
        sys.modules[NAME + name] = package
    envs, load, prebuilt, spec, target = (
        importlib.import_module(f"{NAME}.jit.{part}")
        for part in ("envs", "load", "prebuilt", "spec", "target")
    )
    envs.PREBUILD_KERNELS.get()  # NOTE: raises for what is neither 1 nor 0.
    loader = load.Loader(cache_dir=output)
    for each in (target.cpu_target(), *map(prebuilt.gpu_target, envs.GPU_ARCHS.get())):
        for module in loader.modules():
            found = spec.load_spec(loader.config_path, module, loader.csrc_dir, each)
            if each.kind in found.targets:
                loader.ensure(module, each)
    prebuilt.tidy_prebuilt(output)


def version() -> str:
    """What `_version.py` states."""
    text = (ROOT / TREE / "_version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def entry_points() -> dict[str, list[str]]:
    """The plugins of engines whose modules are in this tree."""
    return {
        group: [f"{NAME} = {NAME}.{module}:register"]
        for group, module in PLUGINS.items()
        if ROOT.joinpath(TREE, *module.split(".")).with_suffix(".py").is_file()
    }


setup(
    name=DISTRIBUTIONS[NAME],
    version=version(),
    description="Fused MoE routing in one launch, compiled on first use for ROCm, CUDA or the CPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    python_requires=">=3.10",
    install_requires=["torch", "pybind11", "jinja2", "filelock"],
    extras_require=EXTRAS,
    entry_points=entry_points(),
    packages=[
        NAME + found.removeprefix(TREE) for found in find_packages(include=[TREE, TREE + ".*"])
    ],
    package_dir={NAME: TREE},
    package_data={NAME: ["py.typed", "export/templates/*.j2"]},
    cmdclass={"build_py": BuildWithSources},
    distclass=PlatformDistribution if PREBUILD else Distribution,
    # NOTE: a folder for each name: what a build folder holds from another one would be shipped.
    options={"build": {"build_base": f"build/{NAME}"}},
)
