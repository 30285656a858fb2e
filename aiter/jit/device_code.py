"""What machine code does an AMD target get, and what does it cost?

Compiles the device half of a module's `.cu` sources to assembly text with the clang of the PyPI
package `ziglang`, which has every AMD target built in, so neither ROCm nor a GPU is needed: the
headers of HIP are replaced by `csrc/cross`. `device_kernels` reads the numbers from the text, and
`Budget` says which numbers are a defect.

The text is kept in the cache folder under a hash of the command, the compiler's version and every
header that could be included. Hashing all headers instead of the included ones can only rebuild too
often; a file takes 1 to 25 s to compile, and one process compiles it while others that want it wait.

Rejected: hipcc for this, since the distributions' hipcc is too old for gfx950 and later, and the
table should not depend on which ROCm is installed; linked code objects, as the text says the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from . import envs
from .builders import build_lock
from .cache import DEVICE_CODE_DIR, FAILED_DIR, TOOL_DIR
from .compilers import zig_of_package
from .device_kernels import KernelCode, arch_of, parse_kernels
from .driver import Job, JobFailed, first_error, run_jobs
from .errors import BuildError, CacheError, ConfigError, ToolchainError
from .folders import write_atomically
from .load import Loader, default_loader
from .log import get_logger
from .progress import Progress
from .rocm_flags import ROCM_FLAGS, rocm_flags
from .spec import load_spec
from .target import Target

# NOTE: what decides the code is as in the rocm profile of `toolchain` for the newest hipcc; the rest
# replaces ROCm.
_NEWEST = max(flag.since for flag in ROCM_FLAGS)
DEVICE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-DAITER_TARGET_ROCM=1",
    "-x",
    "hip",
    "--cuda-device-only",
    "--no-gpu-bundle-output",
    "-nogpulib",
    "-nogpuinc",
    "-S",
)


@dataclass(frozen=True)
class Budget:
    """A limit on one figure of every kernel.

    Attributes:
        figure: the attribute of KernelCode.
        limit: the largest value that is fine; None for the architecture's LDS.
        reason: why more than that is a defect.
    """

    figure: str
    limit: int | None
    reason: str


BUDGETS = (
    Budget("scratch_bytes", 0, "scratch is memory: an array was indexed by a variable, or a spill"),
    Budget("vgpr_spills", 0, "a spilled vector register costs two memory accesses per use"),
    Budget(
        "sgpr_spills",
        0,
        "a spilled scalar register goes to a lane of a vector register and back (v_writelane,"
        " v_readlane); gfx90a has the fewest, 96, as it keeps 6 for itself",
    ),
    Budget(
        "indexed_registers",
        0,
        "an array of registers was indexed by a variable, which takes one access after the other;"
        " unroll the loop",
    ),
    Budget("lds_bytes", None, "a workgroup cannot be launched with more LDS than its unit has"),
)


# What some kernels may have beyond, by the beginning and a part of their names: those by rules carry the
# rule's thirty scalars beside the launch's; those of f32 keys are a few scalars over on gfx9, and so are
# those from hidden states, which have the product's scalars as well, and the chain's launches, which
# have those of the counts. The scratch is set aside by clang on gfx90a and gfx950 alone, and no
# instruction touches it. The worst of the six architectures, 2026-11-27.
ALLOWANCES = (
    ("fused_", "RuleRow", {"scratch_bytes": 20, "sgpr_spills": 59}),
    ("topk_routing", "RuleRow", {"scratch_bytes": 36, "sgpr_spills": 51}),
    ("topk_softmax", "GroupRows<f32", {"sgpr_spills": 6}),
    ("moe_sorting_place", "", {"sgpr_spills": 7}),
    ("fused_", "GroupRows<f32", {"sgpr_spills": 4}),
    ("fused_router", "KeyRows", {"sgpr_spills": 4}),
    ("fused_router", "RuleRow", {"sgpr_spills": 71}),
    ("fused_router", "GroupRows<f32", {"sgpr_spills": 6}),
    ("router_product", "<8, 8", {"sgpr_spills": 26}),
)


@dataclass(frozen=True)
class Assembly:
    """The device code of one source file for one architecture.

    Attributes:
        source: the `.cu` file.
        arch: such as `gfx942`.
        path: where the text is kept.
        text: the assembly text.
    """

    source: Path
    arch: str
    path: Path
    text: str

    def kernels(self) -> list[KernelCode]:
        """The kernels in the text; raises ToolchainError if it is not as expected."""
        return parse_kernels(self.text, self.arch)


def clang() -> tuple[tuple[str, ...], str]:
    """The command of the ziglang package's clang, and its version; raises ToolchainError."""
    program = zig_of_package()
    if program is None:
        raise ToolchainError(
            "device code: expected the Python package ziglang, which carries a clang for every AMD"
            " target, got none; install it: pip install ziglang"
        )
    return (str(program), "clang"), importlib.metadata.version("ziglang")


def compile_module(
    module: str, archs: tuple[str, ...], loader: Loader | None = None
) -> list[Assembly]:
    """The device code of every `.cu` source of `module`, for each of `archs` in turn.

    Args:
        module: the module's name in the compiler config.
        archs: architecture names among `device_kernels.ARCHS`.
        loader: whose config, sources and cache folder; None for the package's own.

    Raises:
        ToolchainError: an architecture is unknown, or ziglang is not installed.
        ConfigError: the module is not as the config must be, or has no device code.
        BuildError: the compiler failed.
        CacheError: the cache folder cannot be written, or AITER_NO_BUILD forbids compiling.
    """
    loader = loader or default_loader()
    found = []
    for arch in archs:
        arch_of(arch)
        spec = load_spec(loader.config_path, module, loader.csrc_dir, Target("rocm", (arch,)))
        sources = [path for path in spec.srcs if path.suffix == ".cu"]
        if not sources:
            raise ConfigError(f"module {module}: expected a .cu source, got none")
        includes = (*spec.extra_include, loader.csrc_dir / "include")
        for source in sources:
            found.append(
                compile_source(source, arch, loader, includes, spec.flags_extra_hip, module)
            )
    return found


def compile_source(
    source: Path,
    arch: str,
    loader: Loader,
    includes: tuple[Path, ...] = (),
    extra_flags: tuple[str, ...] = (),
    module: str = "",
) -> Assembly:
    """The device code of one source file, from the cache if it is there; raises as above."""
    arch_of(arch)
    command, version = clang()
    folders = tuple(dict.fromkeys((loader.csrc_dir / "cross", *includes)))
    builtin_headers = Path(command[0]).parent / "lib" / "include"
    words = (
        *command,
        f"--offload-arch={arch}",
        *rocm_flags(_NEWEST, (arch,)),
        *DEVICE_FLAGS,
        *(f"-I{folder}" for folder in folders),
        "-idirafter",
        str(builtin_headers),
        *extra_flags,
        str(source),
    )
    key = _key(words, version, source, folders)
    place = Path(DEVICE_CODE_DIR, source.stem, arch, f"{key}.s")
    kept = loader.cache.root / place
    try:
        return Assembly(source, arch, kept, kept.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    label = module or source.stem
    if envs.AITER_NO_BUILD.get():
        raise CacheError(
            f"device code of {label} for {arch}: expected it in {kept}, as AITER_NO_BUILD is set,"
            " got no such file"
        )
    try:
        folder = loader.cache.make_folder(place.parent)
        what = f"the device code of {label} for {arch}"
        with build_lock(loader.cache, f"{source.stem}-{arch}-{key}", what):
            if kept.exists():
                return Assembly(source, arch, kept, kept.read_text(encoding="utf-8"))
            text = _compile(words, label, arch, folder, loader)
            write_atomically(kept, text)
    except OSError as error:
        raise CacheError(
            f"cache folder {loader.cache.root}: expected to keep device code in it, got"
            f" {error.strerror or error}; set AITER_JIT_DIR to a folder that can be written"
        ) from error
    return Assembly(source, arch, kept, text)


def over_budget(kernel: KernelCode) -> list[str]:
    """What exceeds its budget, each as a sentence; empty if all is well."""
    problems = []
    for budget in BUDGETS:
        value = getattr(kernel, budget.figure)
        limit = arch_of(kernel.arch).lds_bytes if budget.limit is None else budget.limit
        for beginning, rows, allowed in ALLOWANCES:
            if kernel.name.startswith(beginning) and rows in kernel.name:
                limit = max(limit, allowed.get(budget.figure, 0))
        if value > limit:
            problems.append(
                f"{kernel.name} on {kernel.arch}, {budget.figure}: expected at most {limit}, got"
                f" {value}; {budget.reason}"
            )
    if kernel.workgroups < 1:
        waves = kernel.max_threads // kernel.wave_size
        problems.append(
            f"{kernel.name} on {kernel.arch}: expected registers for a workgroup of"
            f" {kernel.max_threads} threads ({waves} waves), got {kernel.vgprs} VGPRs and"
            f" {kernel.sgprs} SGPRs, which allow {kernel.waves_per_simd} waves per SIMD; such a"
            " launch fails"
        )
    return problems


def _key(words: tuple[str, ...], version: str, source: Path, folders: tuple[Path, ...]) -> str:
    digest = hashlib.sha256("\0".join((version, *words)).encode())
    headers = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    for path in (source, *headers):
        digest.update(f"\0{path}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(words: tuple[str, ...], label: str, arch: str, folder: Path, loader: Loader) -> str:
    """Runs the compiler in `folder`; returns the text, leaves nothing behind."""
    get_logger().info("compiling the device code of %s for %s", label, arch)
    unique = f"{os.getpid()}-{os.urandom(4).hex()}"
    result, output = folder / f"{unique}.tmp", folder / f"{unique}.log"
    job = Job((*words, "-o", str(result)), output)
    environment = envs.child_environment(
        {
            "ZIG_GLOBAL_CACHE_DIR": str(loader.cache.root / TOOL_DIR),
            "ZIG_LOCAL_CACHE_DIR": str(loader.cache.root / TOOL_DIR),
        }
    )
    limit = envs.AITER_BUILD_TIMEOUT.get()
    deadline = None if limit is None else time.monotonic() + limit
    progress = Progress(f"device code of {label} for {arch}", 1)
    try:
        run_jobs([job], folder, environment, 1, deadline, progress)
        return result.read_text(encoding="utf-8")
    except JobFailed as failure:
        log = loader.cache.make_folder(FAILED_DIR) / f"{label}-device-{arch}.log"
        write_atomically(log, f"$ {job.text}\n{failure.output}")
        raise BuildError(
            label,
            f"rocm-{arch}",
            failure.problem,
            shlex.join(job.command),
            first_error(failure.output),
            log,
        ) from None
    finally:
        result.unlink(missing_ok=True)
        output.unlink(missing_ok=True)
