"""Is the machine code for every AMD target within its budgets, and is what we say about it true?

Compiles every module for the architectures of `archs.py` (kept in the cache folder), which takes about
a minute for each the first time and seconds after that.
"""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import pytest

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

from archs import parameters  # noqa: E402

from aiter.cli import device_code as command  # noqa: E402
from aiter.jit import device_code, toolchain  # noqa: E402
from aiter.jit.compilers import Compiler  # noqa: E402
from aiter.jit.device_code import BUDGETS, compile_module, compile_source, over_budget  # noqa: E402
from aiter.jit.device_kernels import (  # noqa: E402
    ARCHS,
    KernelCode,
    instruction_class,
    parse_kernels,
    readable_name,
)
from aiter.jit.errors import BuildError, CacheError, ConfigError, ToolchainError  # noqa: E402
from aiter.jit.load import Loader, default_loader  # noqa: E402
from aiter.jit.spec import ModuleSpec  # noqa: E402
from aiter.jit.target import Target  # noqa: E402

MODULES = (
    "module_topk_softmax", "module_topk_routing", "module_fused_topk_moe_sorting",
    "module_fused_router_sorting", "module_moe_sorting_opus",
)  # fmt: skip
INSTANCES = {"module_topk_softmax": 36, "module_topk_routing": 9,
             "module_fused_topk_moe_sorting": 45, "module_fused_router_sorting": 27,
             "module_moe_sorting_opus": 3}  # fmt: skip


@cache
def kernels_of(module: str, arch: str) -> list[KernelCode]:
    return [kernel for assembly in compile_module(module, (arch,)) for kernel in assembly.kernels()]


def scratch_instructions(text: str) -> list[str]:
    return re.findall(r"^\s*((?:scratch|buffer)_(?:load|store)\S*)", text, re.MULTILINE)


def one_kernel() -> KernelCode:
    return kernels_of("module_moe_sorting_opus", "gfx942")[0]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_budgets(arch: str, module: str) -> None:
    kernels = kernels_of(module, arch)
    assert [problem for kernel in kernels for problem in over_budget(kernel)] == []
    assert len({kernel.name for kernel in kernels}) == INSTANCES[module]


@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_no_instruction_touches_scratch(arch: str) -> None:
    """Also where clang sets some aside; global memory is accessed by other instructions."""
    for module in MODULES:
        for assembly in compile_module(module, (arch,)):
            assert scratch_instructions(assembly.text) == [], assembly.source.name


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_figures_agree_with_the_compiler(arch: str, module: str) -> None:
    for kernel in kernels_of(module, arch):
        assert kernel.waves_per_simd == kernel.compiler_waves_per_simd, kernel.name
        assert kernel.wave_size == ARCHS[arch].wave_size, kernel.name
        # NOTE: an instruction takes 4 to 20 bytes; the compiler pads loops with s_nop.
        assert 4 * kernel.instructions <= kernel.code_bytes + 4, kernel.name
        assert kernel.code_bytes <= 20 * kernel.instructions + 256, kernel.name
        assert "_Z" not in kernel.name


@pytest.mark.parametrize("figure", [budget.figure for budget in BUDGETS])
def test_excess_is_reported(figure: str) -> None:
    bad = replace(one_kernel(), **{figure: 1 << 20})
    (problem,) = over_budget(bad)
    assert f"moe_sorting_oneshot on gfx942, {figure}: expected at most" in problem
    assert f"got {1 << 20}; " in problem


@pytest.mark.parametrize("arch", ARCHS)
def test_arrays_with_variable_indices_are_over_budget(arch: str) -> None:
    loader = default_loader()
    source = Path(__file__).with_name("planted.cu")
    assembly = compile_source(source, arch, loader, (loader.csrc_dir / "include",))
    assert scratch_instructions(assembly.text) != []
    kernels = assembly.kernels()
    problems = {kernel.name: " ".join(over_budget(kernel)) for kernel in kernels}
    assert "indexed_registers: expected at most 0, got" in problems["indexed_registers"]
    assert "scratch_bytes: expected at most 0, got" in problems["array_in_scratch"]
    assert problems["missing_barrier"] == ""


def test_unlaunchable_workgroup_is_reported() -> None:
    (problem,) = over_budget(replace(one_kernel(), waves_per_simd=3))
    assert "expected registers for a workgroup of 1024 threads (16 waves)" in problem


@pytest.mark.parametrize(
    ("arch", "vgprs", "sgprs", "waves"),
    [
        ("gfx942", 0, 0, 8), ("gfx942", 64, 80, 8), ("gfx942", 65, 80, 7), ("gfx942", 128, 80, 4),
        ("gfx942", 129, 80, 3), ("gfx942", 10, 102, 7), ("gfx1100", 96, 106, 16),
        ("gfx1100", 97, 106, 12), ("gfx1100", 256, 106, 5), ("gfx1250", 64, 106, 16),
        ("gfx1250", 65, 106, 12),
    ],
)  # fmt: skip
def test_occupancy(arch: str, vgprs: int, sgprs: int, waves: int) -> None:
    assert ARCHS[arch].waves_per_simd(vgprs, sgprs) == waves


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("v_add_u32_e32 v0, v1, v2", "VALU"), ("v_add_f32_dpp v0, v0, v0 row_ror:8", "DPP"),
        ("v_readlane_b32 s0, v1, 63", "VALU"), ("s_and_saveexec_b64 s[0:1], vcc", "SALU"),
        ("s_load_dwordx2 s[0:1], s[2:3], 0x0", "SMEM"), ("ds_bpermute_b32 v0, v1, v2", "LDS"),
        ("global_store_dword v[0:1], v2, off", "VMEM"), ("s_cbranch_scc1 .LBB0_1", "branch"),
        ("s_barrier_signal -1", "barrier"), ("s_wait_kmcnt 0x0", "waitcnt"), ("s_nop 1", "nop"),
        ("s_delay_alu instid0(VALU_DEP_1)", "waitcnt"), ("s_clause 0x1", "other"),
        ("global_inv scope:SCOPE_SE", "other"), ("v_nop", "nop"),
    ],
)  # fmt: skip
def test_instruction_class(line: str, name: str) -> None:
    assert instruction_class(line) == name


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN5aiter19topk_softmax_kernelINS_7WaveRowIfLi2EEEEEvNS_17TopkSoftmaxParamsE",
         "topk_softmax<WaveRow<f32, 2>>"),
        ("_ZN5aiter29fused_topk_moe_sorting_kernelINS_7WaveRowINS_4Bf16ELi0EEEEEvNS_11FusedParamsE",
         "fused_topk_moe_sorting<WaveRow<bf16, 0>>"),
        ("_ZN5aiter19topk_softmax_kernelINS_9GroupRowsINS_3F16ELi8ELi16ELi4EEEEEvNS_17TopkSoftmaxParamsE",
         "topk_softmax<GroupRows<f16, 8, 16, 4>>"),
        ("_ZN5aiter3twoINS_4Bf16EiLin3EEEvv", "two<bf16, i32, -3>"),
        ("_ZN5aiter3twoISt4pairIiiEEEvv", "_ZN5aiter3twoISt4pairIiiEEEvv"),
        ("_ZN5aiter26moe_sorting_oneshot_kernelENS_10OpusParamsE", "moe_sorting_oneshot"),
        ("plain_c_name", "plain_c_name"),
    ],
)  # fmt: skip
def test_readable_name(symbol: str, name: str) -> None:
    assert readable_name(symbol) == name


def test_code_generation_flags_are_those_of_the_rocm_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(("hipcc",), Path("hipcc"), "a test", "hipcc")
    spec, target = ModuleSpec("module", ()), Target("rocm", ("gfx942",))
    folders = Path("csrc"), Path("pybind11")
    profile = toolchain.make_profile(spec, target, compiler, *folders, "HIP version: 99.0.0-x")
    deciding = ("-O", "-std=", "-ff", "-fno-f", "-DAITER_TARGET", "-mllvm", "-amdgpu", "-munsafe")
    wanted = [flag for flag in profile.device
              if flag.startswith(deciding) and not flag.startswith("-ffile-prefix-map")]  # fmt: skip
    commands = []
    monkeypatch.setattr(device_code, "run_jobs", lambda jobs, *rest: commands.extend(jobs))
    source = tmp_path / "any.cu"
    source.touch()
    with pytest.raises(CacheError):
        compile_source(source, "gfx942", Loader(cache_dir=tmp_path / "cache"))
    assert wanted.count("-mllvm") == 3 and set(wanted) <= set(commands[0].command)


def test_command_prints_a_row_per_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["module_moe_sorting_opus"], ["gfx942", "gfx1201"], mix=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["arch", "kernel", "VGPR"]
    assert sum(line.startswith(("gfx942 ", "gfx1201 ")) for line in lines) == 2 * 2 * 3


def test_command_reports_excess(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_code, "BUDGETS", (replace(BUDGETS[2], figure="vgprs", limit=1),))
    assert command.run(["module_moe_sorting_opus"], ["gfx942"]) == 1
    assert "moe_sorting_count on gfx942, vgprs: expected at most 1" in capsys.readouterr().err


def test_second_time_comes_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_module("module_moe_sorting_opus", ("gfx942",))
    monkeypatch.setattr(device_code, "run_jobs", lambda *arguments: pytest.fail("compiled again"))
    assert compile_module("module_moe_sorting_opus", ("gfx942",)) == first


def test_who_comes_second_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __attribute__((global)) void tiny() {}\n')
    compiled = []
    run_jobs = device_code.run_jobs

    def counted(*arguments: Any) -> None:
        compiled.append(1)
        time.sleep(0.5)  # NOTE: long enough for the other one to look as well.
        run_jobs(*arguments)

    monkeypatch.setattr(device_code, "run_jobs", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda _: compile_source(source, "gfx942", Loader(cache_dir=tmp_path / "cache")), "ab"
        )
    assert first == second and len(compiled) == 1


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(cache_dir=tmp_path / "cache")
    source = tmp_path / "broken.cu"
    source.write_text("not C++;\n")
    with pytest.raises(ToolchainError, match="expected one of gfx90a, .*got 'gfx1'"):
        compile_source(source, "gfx1", loader)
    wanted = r"(?s)first error: .*expected unqualified-id.*command: .*log: "
    with pytest.raises(BuildError, match=wanted) as caught:
        compile_source(source, "gfx942", loader)
    log = caught.value.log_path
    assert log is not None and "broken.cu" in log.read_text()
    assert [path.name for path in (tmp_path / "cache").rglob("*.tmp")] == []
    monkeypatch.setenv("AITER_NO_BUILD", "1")
    with pytest.raises(CacheError, match="AITER_NO_BUILD"):
        compile_source(source, "gfx942", loader)
    with pytest.raises(ConfigError, match="module no_such_module: expected one of"):
        compile_module("no_such_module", ("gfx942",), loader)
    with pytest.raises(ToolchainError, match="expected at least one kernel"):
        parse_kernels("", "gfx942")


def test_missing_compiler_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match="pip install ziglang"):
        device_code.clang()


def test_nothing_is_written_outside_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source" / "tiny.cu"
    source.parent.mkdir()
    source.write_text('extern "C" __attribute__((global)) void tiny() {}\n')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(source.parent)
    before = default_loader().csrc_dir.stat().st_mtime_ns
    compile_source(source, "gfx942", Loader(cache_dir=tmp_path / "cache"))
    assert os.listdir(source.parent) == ["tiny.cu"] and not (tmp_path / "home").exists()
    assert default_loader().csrc_dir.stat().st_mtime_ns == before
