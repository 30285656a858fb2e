"""Do the wave operations become the instructions that the table in wave.h names?

The table is read from the header. For AMD GPUs every row is compared with what the interpreter
executes of the compiled operation (with n = 8 terms where the number is n), for sm_90 with the
disassembly of nvcc's output. Instructions by which lanes talk and that a row leaves out must not
occur.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import _checkout  # noqa: F401
import numpy as np
import pytest
from primitives import execute

from aiter.jit.compilers import find_compiler
from aiter.jit.device_kernels import ARCHS
from aiter.jit.errors import ToolchainError
from aiter.jit.load import default_loader

NUM_TERMS = 8
SOURCE = Path(__file__).with_name("primitives.cu")
CSRC = default_loader().csrc_dir
# The kernels of primitives.cu that a row of the table is about.
PRIMITIVES = {
    "wave_max, 32 bit": ("wave_max_32",), "wave_max, 64 bit": ("wave_max_64",),
    "wave_sum_by_halves": ("sum_by_halves",), "wave_sum_in_order": ("sum_in_order",),
    "wave_inclusive_sum": ("inclusive_sum",), "wave_rank": ("rank",),
    "wave_read_lane": ("read_lane",), "uniform_wave_idx": ("wave_index",),
    "wave_swap, 1 to 8": ("swap_1", "swap_2", "swap_4", "swap_8"), "wave_swap, 16": ("swap_16",),
    "wave_exchange, 1 to 15": tuple(f"exchange_{mask}" for mask in (1, 2, 3, 7, 8, 15)),
    "wave_exchange, 4": ("exchange_4",), "wave_exchange, 16": ("exchange_16",),
    "wave_exchange, 31": ("exchange_31",),
    "wave_sum_in_groups, 8": ("sum_in_groups_8", "sum_in_groups_16"),
    "wave_sum_in_groups, 32": ("sum_in_groups_32",),
}  # fmt: skip
AMD_CROSSING = re.compile(r".*_dpp$|ds_|v_readlane|v_readfirstlane|v_writelane|v_permlane|v_mbcnt")
CUDA_CROSSING = re.compile(r"SHFL|REDUX|VOTE|MATCH|LDS|STS|ATOMS|BAR")

Row = dict[str, str]


def table(text: str) -> dict[tuple[str, str], Row]:
    """Instruction to its number, by operation and target, from the comment of wave.h."""
    rows: dict[tuple[str, str], Row] = {}
    operation, targets = "", [""]
    _, _, after = text.partition("What compilers make of them")
    for line in after.partition("On the cpu target")[0].splitlines():
        match = re.fullmatch(r"//   (.{24})(.{14})(.*)", line.rstrip())
        if match is None:
            continue
        operation = match[1].strip() or operation
        targets = match[2].strip().split(", ") if match[2].strip() else targets
        for number, name in re.findall(r"(\w+) ([\w.]+)(?:,| for|$)", match[3]):
            for target in targets:
                rows.setdefault((operation, target), {})[name] = number
    return rows


ROWS = table((CSRC / "include" / "device" / "wave.h").read_text())


def terms(number: str) -> int:
    """What a number of the table is for NUM_TERMS terms: 4, n or 2n."""
    return int(number) if number.isdigit() else NUM_TERMS * int(number.removesuffix("n") or 1)


def row_of(operation: str, arch: str) -> Row:
    """The row of the target whose name is the longest prefix of `arch`."""
    fitting = [target for name, target in ROWS if name == operation and arch.startswith(target)]
    return ROWS[operation, max(fitting, key=len)]


def differences(row: Row, found: Counter[str], crossing: re.Pattern[str]) -> list[str]:
    """How what was found differs from the row, as sentences; n is NUM_TERMS."""
    wrong = []
    for name, number in row.items():
        if found[name] != terms(number):
            wrong.append(f"{name}: expected {terms(number)}, got {found[name]}")
    for name, count in found.items():
        if crossing.match(name) and name not in row:
            wrong.append(f"{name}: expected none, got {count}")
    return wrong


def test_table_is_complete() -> None:
    assert {name for name, _ in ROWS} == set(PRIMITIVES)
    for operation in PRIMITIVES:
        for arch in (*ARCHS, "sm_90"):
            assert row_of(operation, arch), f"{operation} on {arch}"


@pytest.mark.parametrize("operation", PRIMITIVES)
@pytest.mark.parametrize("arch", ARCHS)
def test_amd(arch: str, operation: str) -> None:
    pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")
    words = np.arange(2 * ARCHS[arch].wave_size, dtype=np.uint32)
    for primitive in PRIMITIVES[operation]:
        statistics, _ = execute(arch, primitive, words, NUM_TERMS)
        wrong = differences(row_of(operation, arch), statistics.names(), AMD_CROSSING)
        assert wrong == [], primitive


def test_differences_are_noticed() -> None:
    row = row_of("wave_sum_by_halves", "gfx942")
    found = Counter({name: int(number) for name, number in row.items()})
    assert differences(row, found, AMD_CROSSING) == []
    found["ds_swizzle_b32"] += 1
    found["v_permlane32_swap_b32"] = 1
    assert differences(row, found, AMD_CROSSING) == [
        "ds_swizzle_b32: expected 1, got 2", "v_permlane32_swap_b32: expected none, got 1",
    ]  # fmt: skip


def disassembler(nvcc: str) -> str:
    """nvdisasm: on PATH, beside nvcc, or in a package; skips the test if it is nowhere."""
    folders = [Path(nvcc).resolve().parent]
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec is not None else ():
            folders.append(Path(place) / inside)
    found = [path for folder in folders if (path := folder / "nvdisasm").is_file()]
    chosen = shutil.which("nvdisasm") or (str(found[0]) if found else None)
    if chosen is None:
        pytest.skip("no nvdisasm on PATH, beside nvcc, or in the packages triton and nvidia")
    return chosen


@pytest.fixture(scope="module")
def sass(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    """The instructions of every primitive on sm_90, NOPs left out."""
    try:
        nvcc = find_compiler("cuda").command[0]
    except ToolchainError as error:
        pytest.skip(str(error))
    nvdisasm = disassembler(nvcc)
    cubin = tmp_path_factory.mktemp("sass") / "primitives.cubin"
    flags = ("-std=c++17", "-O3", "--fmad=false", "-DAITER_TARGET_CUDA=1", "-arch=sm_90", "-cubin")
    command = [nvcc, *flags, f"-I{CSRC / 'include'}", "-o", str(cubin), "-x", "cu", str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{nvdisasm} does not read what {nvcc} wrote: {done.stderr.strip()[:200]}")
    found = {}
    for name, body in re.findall(
        r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", done.stdout, re.M | re.S
    ):
        code = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", body, re.M)
        found[name] = Counter(code)
    return found


@pytest.mark.parametrize("operation", PRIMITIVES)
def test_sm_90(sass: dict[str, Counter[str]], operation: str) -> None:
    for primitive in PRIMITIVES[operation]:
        row, found = row_of(operation, "sm_90"), sass[primitive]
        if "n" in row.values():
            # NOTE: the loop is unrolled; per term there is one of each.
            counts = {name: found[name] for name in row}
            assert min(counts.values()) > 0 and len(set(counts.values())) == 1, counts
            row = {name: str(found[name]) for name in row}
        assert differences(row, found, CUDA_CROSSING) == [], primitive
