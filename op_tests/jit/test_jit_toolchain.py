"""Which compiler is taken, with which flags?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from toy import Toy, program

from aiter.jit import compilers
from aiter.jit.cache import Entry
from aiter.jit.compilers import (
    Compiler,
    compiler_version,
    find_compiler,
    host_compiler_of_nvcc,
)
from aiter.jit.errors import ToolchainError
from aiter.jit.load import Loader
from aiter.jit.rocm_flags import ROCM_FLAGS
from aiter.jit.spec import ModuleSpec
from aiter.jit.target import Target
from aiter.jit.toolchain import Profile, make_profile

GPU_SOURCE = """
#include "toy.h"
#if AITER_TARGET_ROCM
#include <hip/hip_runtime.h>
#endif
__global__ void fill(int* out) { out[threadIdx.x] = TOY; }
int launch() {
  fill<<<1, 32>>>(nullptr);
  return TOY;
}
"""
GPU_BINDING = """
#include <Python.h>
#include "toy.h"
int launch();
static PyObject* run(PyObject*, PyObject*) { return PyLong_FromLong(launch()); }
static PyMethodDef methods[] = {{"run", run, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "module_toy", nullptr, 0, methods,
                                 nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_module_toy() { return PyModuleDef_Init(&module_def); }
"""


def test_cpu_order(bare_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ziglang"
    program(package / "zig")
    monkeypatch.setattr(compilers, "_has_package", lambda name: name == "ziglang")
    monkeypatch.setattr(compilers, "_package_dir", lambda name: tmp_path / name)
    zig = find_compiler("cpu")
    assert (zig.command, zig.family) == ((str(package / "zig"), "c++"), "zig")
    program(bare_path / "clang++")
    assert find_compiler("cpu").command == (str(bare_path / "clang++"),)
    program(bare_path / "g++")
    assert find_compiler("cpu").command == (str(bare_path / "g++"),)
    program(bare_path / "own")
    monkeypatch.setenv("CXX", "own g++")
    assert find_compiler("cpu").command == (str(bare_path / "own"), "g++")
    monkeypatch.setenv("CXX", f"{package / 'zig'} c++")
    assert find_compiler("cpu").family == "zig"


def test_cuda_order(bare_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(bare_path / "nvcc")
    assert find_compiler("cuda").command == (str(path),)
    home = program(tmp_path / "cuda" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert find_compiler("cuda").command == (str(home),)
    assert find_compiler("cuda").found_by == "CUDA_HOME"


def test_the_host_compiler_of_nvcc(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVCC_CCBIN is a program or, as nvcc has it, the folder of gcc."""
    program(bare_path / "gcc")
    other = program(bare_path.parent / "other" / "gcc")
    program(other.with_name("clang++-19"))
    for setting, found in (
        (None, bare_path / "gcc"), (other.parent, other), (other, other),
        (other.with_name("clang++-19"), other.with_name("clang++-19")),
    ):  # fmt: skip
        if setting is not None:
            monkeypatch.setenv("NVCC_CCBIN", str(setting))
        compiler = host_compiler_of_nvcc()
        assert compiler is not None and compiler.command == (str(found),)


def test_rocm_order(bare_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last place to the first: each is taken as soon as it is there."""
    standard = "/opt/rocm/bin/hipcc"
    there: set[str] = set()
    is_file = Path.is_file
    monkeypatch.setattr(
        Path, "is_file", lambda path: str(path) in there if str(path) == standard else is_file(path)
    )
    packages: list[str] = []
    monkeypatch.setattr(compilers, "_has_package", lambda name: name in packages)
    monkeypatch.setattr(compilers, "_package_dir", lambda name: tmp_path / name)
    for package in ("_rocm_sdk_devel", "_rocm_sdk_core"):
        packages.append(package)
        bundled = program(tmp_path / package / "bin" / "hipcc")
        assert find_compiler("rocm").command == (str(bundled),)
        assert find_compiler("rocm").found_by == f"the {package} package"
    there.add(standard)
    assert find_compiler("rocm").command == (standard,)
    path = program(bare_path / "hipcc")
    assert find_compiler("rocm").command == (str(path),)
    assert find_compiler("rocm").found_by == "hipcc on PATH"
    for name in ("ROCM_PATH", "ROCM_HOME"):
        home = program(tmp_path / name / "bin" / "hipcc")
        monkeypatch.setenv(name, str(tmp_path / name))
        assert find_compiler("rocm").command == (str(home),)
        assert find_compiler("rocm").found_by == name


MISSING = [
    ("cpu", "expected CXX, g.. or clang.. on PATH, or the ziglang package, got none.*install g.."),
    ("cuda", "expected nvcc under CUDA_HOME, on PATH or in .*, got none.*install the CUDA toolkit"),
    ("rocm", "expected hipcc under ROCM_HOME or ROCM_PATH, on PATH, .*got none.*install ROCm"),
]


@pytest.mark.parametrize(("kind", "message"), MISSING)
def test_a_missing_compiler_says_how_to_get_one(
    bare_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(ToolchainError, match=message):
        find_compiler(kind)


@pytest.mark.parametrize(
    ("kind", "variable", "message"),
    [
        ("cpu", "CXX", "expected CXX to name a program, got CXX='/nowhere'"),
        ("cuda", "CUDA_HOME", "CUDA_HOME: expected a folder with bin/nvcc, got '/nowhere'"),
        ("rocm", "ROCM_HOME", "ROCM_HOME: expected a folder with bin/hipcc, got '/nowhere'"),
        ("rocm", "ROCM_PATH", "ROCM_PATH: expected a folder with bin/hipcc, got '/nowhere'"),
    ],
)
def test_a_setting_that_leads_nowhere_is_an_error(
    monkeypatch: pytest.MonkeyPatch, kind: str, variable: str, message: str
) -> None:
    monkeypatch.setenv(variable, "/nowhere")
    with pytest.raises(ToolchainError, match=message):
        find_compiler(kind)


def test_the_version_is_asked_once_per_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    path = program(tmp_path / "own", f"#!/bin/sh\necho asked >> {log}\necho own 1.0\n")
    monkeypatch.setenv("CXX", str(path))
    memo = tmp_path / "cache" / "memo"
    for _ in range(2):
        assert compiler_version(find_compiler("cpu"), memo, {}) == "own 1.0"
    assert log.read_text() == "asked\n"
    program(path, f"#!/bin/sh\necho asked >> {log}\necho own 2.0 now\n")
    assert compiler_version(find_compiler("cpu"), memo, {}) == "own 2.0 now"
    for path in memo.iterdir():
        path.write_text("{")
    assert compiler_version(find_compiler("cpu"), memo, {}) == "own 2.0 now"
    assert log.read_text() == "asked\n" * 3


def test_what_a_variable_leads_to_has_a_version_of_its_own(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hipcc prints the version of the ROCm that HIP_PATH or ROCM_PATH names, which decides flags."""
    text = '#!/bin/sh\necho "HIP version: 6.$HIP_PATH.$ROCM_PATH"\n'
    program(tmp_path / "bin" / "hipcc", text)
    monkeypatch.setenv("ROCM_HOME", str(tmp_path))
    seen = {}
    for name, value in (("HIP_PATH", "/1"), ("HIP_PATH", "/2"), ("ROCM_PATH", "/3")):
        monkeypatch.setenv(name, value)
        plan = toy.loader().plan("module_toy", Target("rocm", ("gfx942",)))
        seen[plan.key] = plan.inputs["compiler"][1][-1]
    assert list(seen.values()) == [
        "HIP version: 6./1.",
        "HIP version: 6./2.",
        "HIP version: 6./2./3",
    ]


def test_a_compiler_upgrade_is_a_miss(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = toy.compiler_wrapper()
    monkeypatch.setenv("CXX", str(wrapper))
    toy.load()
    version = 'case "$1" in --version) echo "g++ 99"; exit;; esac\n'
    wrapper.write_text(wrapper.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{version}"))
    toy.load()
    assert toy.compiles() == 2


def test_a_compiler_without_a_version_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(program(tmp_path / "own", "#!/bin/sh\necho no >&2\nexit 3\n")))
    with pytest.raises(
        ToolchainError, match="own --version: expected it to print its vers.*got no"
    ):
        compiler_version(find_compiler("cpu"), tmp_path / "memo", {})


def profile_of(target: Target, family: str = "gcc", **flags: Any) -> Profile:
    compiler = Compiler(("compiler",), Path("compiler"), "test", family)
    spec = ModuleSpec(name="module_x", srcs=(), **flags)
    return make_profile(spec, target, compiler, Path("/csrc"), Path("/pybind11"))


def test_cpu_flags() -> None:
    flags: dict[str, Any] = {
        "flags_extra_cc": ("-DCC",),
        "flags_extra_cpu": ("-DCPU",),
        "extra_ldflags": ("-lx",),
    }
    profile = profile_of(Target("cpu", ("wave32",), "x86-64-v3"), **flags)
    for words in (profile.device, profile.host):
        assert {
            "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
            "-Wall", "-Wextra", "-march=x86-64-v3", "-pthread", "-DAITER_TARGET_CPU=1",
            "-DAITER_WAVE_SIZE=32", "-DAITER_MODULE_NAME=module_x", "-I/csrc/include",
            "-ffile-prefix-map=/csrc=csrc", "-DCC", "-DCPU",
        } <= set(words)  # fmt: skip
        assert words[-2:] == ("-x", "c++")
    assert "-O3" in profile.device
    assert profile.link_tail == ("-lx",)
    assert "-march=x86_64_v3" in profile_of(Target("cpu", ("wave32",), "x86-64-v3"), "zig").host
    assert not any(
        word.startswith("-march") for word in profile_of(Target("cpu", ("wave64",))).host
    )


def test_the_cpu_target_adds_the_execution_layer(tmp_path: Path) -> None:
    layer = program(tmp_path / "cpu" / "hip_cpu.cpp", "")
    spec = ModuleSpec(name="module_x", srcs=())
    compiler = Compiler(("compiler",), Path("compiler"), "test", "gcc")
    arguments = (compiler, tmp_path, Path("/pybind11"))
    assert make_profile(spec, Target("cpu", ("wave64",)), *arguments).extra_sources == (layer,)
    assert make_profile(spec, Target("cuda", ("sm_90",)), *arguments).extra_sources == ()


def test_cuda_flags() -> None:
    flags: dict[str, Any] = {"flags_extra_cc": ("-DCC", "-Wa,b"), "flags_extra_cuda": ("-DDEV",)}
    profile = profile_of(Target("cuda", ("sm_80", "sm_90")), **flags)
    assert {
        "-std=c++17", "-O3", "-lineinfo", "--fmad=false", "-DAITER_TARGET_CUDA=1", "-DDEV",
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-fPIC,-fvisibility=hidden",
    } <= set(profile.device)  # fmt: skip
    assert profile.device[-2:] == ("-x", "cu")
    assert "-DCC" not in profile.device
    assert profile.host[-2:] == ("-x", "c++")
    assert "-DCC" in profile.host and "-DDEV" not in profile.host
    assert profile.host[profile.host.index("-Wa\\,b") - 1] == "-Xcompiler"


def test_rocm_flags() -> None:
    flags: dict[str, Any] = {"flags_extra_cc": ("-DCC",), "flags_extra_hip": ("-DDEV",)}
    profile = profile_of(Target("rocm", ("gfx942:xnack-", "gfx90a")), **flags)
    assert {
        "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-gpu-rdc",
        "-DAITER_TARGET_ROCM=1", "--offload-arch=gfx942:xnack-", "--offload-arch=gfx90a", "-DDEV",
    } <= set(profile.device)  # fmt: skip
    assert profile.device[-2:] == ("-x", "hip")
    assert profile.host[-2:] == ("-x", "c++")
    assert "-D__HIP_PLATFORM_AMD__=1" in profile.host and "-DCC" in profile.host
    assert profile.environment == {"HIP_PLATFORM": "amd"}
    assert "-mllvm" not in profile.device


HIPCC_5_2 = """HIP version: 5.2.21153-0
Debian clang version 15.0.6
Target: x86_64-pc-linux-gnu"""
HIPCC_6_2 = """HIP version: 6.2.41133-dd7f95766
AMD clang version 18.0.0git (https://example.com/llvm-project roc-6.2.0 24292)"""
INLINING = ("-mllvm", "-amdgpu-early-inline-all=true", "-mllvm", "-amdgpu-function-calls=false")
PRELOAD = ("-mllvm", "-amdgpu-kernarg-preload-count=16")


@pytest.mark.parametrize(
    ("text", "archs", "words"),
    [
        (HIPCC_5_2, ("gfx90a",), ()),
        (HIPCC_5_2.replace("5.2.21153", "6.2.41132"), ("gfx942",), ()),
        (HIPCC_6_2, ("gfx90a",), INLINING),
        (HIPCC_6_2, ("gfx1100", "gfx942:sramecc+:xnack-"), (*INLINING, *PRELOAD)),
        (HIPCC_6_2.replace("6.2.41133", "7.0.51831"), ("gfx950",), (*INLINING, *PRELOAD)),
        (HIPCC_6_2.replace("6.2.41133", "10.0.1"), ("gfx1201",), INLINING),
        ("AMD clang version 20.0.0git", ("gfx942",), ()),
        ("", ("gfx942",), ()),
    ],
)
def test_flags_by_rocm_version(text: str, archs: tuple[str, ...], words: tuple[str, ...]) -> None:
    """A compiler gets what it knows: for what its version says, and for its architectures."""
    compiler = Compiler(("hipcc",), Path("hipcc"), "test", "hipcc")
    spec, target = ModuleSpec(name="module_x", srcs=()), Target("rocm", archs)
    profile = make_profile(spec, target, compiler, Path("/csrc"), Path("/pybind11"), text)
    start = profile.device.index(f"--offload-arch={archs[-1]}") + 1
    assert profile.device[start : start + len(words)] == words
    assert profile.device.count("-mllvm") == words.count("-mllvm")
    assert "-mllvm" not in (*profile.host, *profile.link)


def test_every_versioned_flag_has_a_reason_and_is_given_once() -> None:
    assert all(flag.reason and flag.words for flag in ROCM_FLAGS)
    assert len({flag.words for flag in ROCM_FLAGS}) == len(ROCM_FLAGS)


def test_a_hipcc_gets_the_flags_of_its_version(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the loader: the version text comes from the compiler itself."""
    (toy.csrc / "toy.cu").write_text(GPU_SOURCE)
    toy.configure(srcs=["{{ AITER_CSRC_DIR }}/toy.cu"])
    for text, known in ((HIPCC_5_2, False), (HIPCC_6_2, True)):
        home = tmp_path / text[13:16]
        program(home / "bin" / "hipcc", f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        monkeypatch.setenv("ROCM_HOME", str(home))
        plan = toy.loader().plan("module_toy", Target("rocm", ("gfx942",)))
        flags = {flag for source in plan.sources for flag in source.flags}
        assert ("-amdgpu-function-calls=false" in flags) == known
        assert text in plan.inputs["compiler"][1]


@pytest.mark.parametrize(
    ("compiler", "built_for"),
    [("nvcc", Target("cuda", ("sm_90",))), ("hipcc", Target("rocm", ("gfx90a",)))],
)
def test_a_gpu_module_cross_builds_and_imports(toy: Toy, compiler: str, built_for: Target) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on PATH")
    (toy.csrc / "include" / "toy.h").write_text("#define TOY 5\n")
    (toy.csrc / "toy.cu").write_text(GPU_SOURCE)
    (toy.csrc / "binding.cpp").write_text(GPU_BINDING)
    toy.configure(
        srcs=["{{ AITER_CSRC_DIR }}/binding.cpp", "{{ AITER_CSRC_DIR }}/toy.cu"],
        flags_extra_cc=["-Wall", "-DHOST_ONLY=1"],
    )
    loader = toy.loader()
    module = loader.load("module_toy", built_for)
    assert callable(module.run)
    plan = loader.plan("module_toy", built_for)
    entry = loader.cache.lookup(plan)
    assert isinstance(entry, Entry)
    headers = [header[0] for header in entry.manifest["headers"]]
    assert headers.count("<csrc>/include/toy.h") == 1
    assert any(name.startswith("<python>/") for name in headers)
    log = (entry.folder / "build.log").read_text()
    assert "warning" not in log and "Traceback" not in log
    (toy.csrc / "include" / "toy.h").write_text("#define TOY 6\n")
    assert not isinstance(
        Loader(toy.config_path, toy.csrc, toy.cache_dir).cache.lookup(plan), Entry
    )


def test_clang_builds_for_the_cpu(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["clang++", *(f"clang++-{version}" for version in range(25, 12, -1))]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no clang++ on PATH")
    monkeypatch.setenv("CXX", found)
    assert toy.load().value() == 1


def test_the_environment_reaches_the_compiler(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = toy.root / "extra"
    extra.mkdir()
    (extra / "only_here.h").write_text("#define FROM_HERE 3\n")
    toy.source.write_text("#include <only_here.h>\n" + toy.source.read_text())
    monkeypatch.setenv("CPATH", str(extra))
    assert toy.load().value() == 1
