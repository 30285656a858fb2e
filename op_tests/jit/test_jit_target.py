"""Which target does a device get?"""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aiter import fused_topk_moe_sorting_max_tokens, warmup
from aiter.jit import cpu_wave, module_for
from aiter.jit.errors import EnvError, TargetError
from aiter.jit.target import (
    Target,
    covers,
    cpu_level,
    cpu_target,
    named_target,
    target_for,
)

V2 = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma abm movbe"
GPU = torch.device("cuda", 0)


@pytest.fixture
def amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(
    ("built_for", "label"),
    [
        (Target("cpu", ("wave64",), "x86-64-v3"), "cpu-wave64-x86-64-v3"),
        (Target("cpu", ("wave32",)), "cpu-wave32"),
        (Target("cuda", ("sm_90",)), "cuda-sm_90"),
        (Target("rocm", ("gfx942", "gfx90a")), "rocm-gfx942,gfx90a"),
        (Target("rocm", ("gfx942:sramecc+:xnack-",)), "rocm-gfx942_sramecc+_xnack-"),
    ],
)
def test_labels(built_for: Target, label: str) -> None:
    assert built_for.label == label


@pytest.mark.parametrize(
    ("kind", "archs", "message"),
    [
        ("tpu", ("x",), "target: expected one of cpu, cuda, rocm, got 'tpu'"),
        ("cpu", ("wave16",), "of cpu: expected wave64 or wave32, got 'wave16'"),
        ("cpu", ("wave32", "wave64"), "of cpu: expected exactly one"),
        ("cuda", ("gfx942",), "of cuda: expected a name such as sm_90, got 'gfx942'"),
        ("rocm", ("sm_90",), "of rocm: expected a name such as gfx942, got 'sm_90'"),
        ("rocm", (), "of rocm: expected at least one"),
    ],
)
def test_wrong_targets(kind: str, archs: tuple[str, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Target(kind, archs)


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ("sm_90", "sm_90", True),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90", False),
        ("sm_90a", "sm_90", True),
        ("sm_100a", "sm_103", False),
        ("gfx942", "gfx942:sramecc+:xnack-", True),
        ("gfx942:xnack-", "gfx942:sramecc+:xnack-", True),
        ("gfx942:xnack+", "gfx942:sramecc+:xnack-", False),
        ("gfx90a", "gfx942:sramecc+:xnack-", False),
    ],
)
def test_covers(built: str, device: str, runs: bool) -> None:
    assert covers(built, device) is runs


def test_detected_amd_arch_drops_its_modes(amd_gpu: None) -> None:
    assert target_for(GPU) == Target("rocm", ("gfx942",))


def test_named_rocm_target_is_the_current_devices(
    amd_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert named_target("rocm") == Target("rocm", ("gfx942",))
    with pytest.raises(TargetError, match="shows no cuda device"):
        named_target("cuda")


def test_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's own architecture counts, as PyTorch numbers devices: HIP_VISIBLE_DEVICES renumbers
    them for PyTorch and for the runtime that a module calls alike, so it is not looked at here."""
    names = ["gfx90a:sramecc+:xnack-", "gfx1100"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(gcnArchName=names[d.index])
    )
    for visible in (None, "1", "1,0"):
        if visible is not None:
            monkeypatch.setenv("HIP_VISIBLE_DEVICES", visible)
        assert target_for(torch.device("cuda", 0)) == Target("rocm", ("gfx90a",))
        assert target_for(torch.device("cuda", 1)) == Target("rocm", ("gfx1100",))
    monkeypatch.setenv("GPU_ARCHS", "gfx90a;gfx942")
    assert target_for(torch.device("cuda", 0)) == Target("rocm", ("gfx90a", "gfx942"))
    with pytest.raises(TargetError, match="GPU_ARCHS .gfx90a, gfx942.*, got gfx1100"):
        target_for(torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("count", "device", "seen"),
    [(0, "cuda", "it sees none"), (0, "cuda:0", "it sees none"), (2, "cuda:2", "cuda:0, cuda:1")],
)
def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, count: int, device: str, seen: str
) -> None:
    """Before PyTorch is asked for it, which raises an AssertionError."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    message = rf"device: expected a GPU that this PyTorch .* sees \({seen}\), got '{device}'"
    for ask in (
        lambda: warmup(devices=[device]),
        lambda: module_for("module_expert_load", device),
        lambda: fused_topk_moe_sorting_max_tokens(128, 4, device=device),
    ):
        with pytest.raises(TargetError, match=message):
            ask()


def test_detected_nvidia_arch(nvidia_gpu: None) -> None:
    assert target_for(GPU) == Target("cuda", ("sm_90",))


def test_gpu_archs_overrides(amd_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_ARCHS", "gfx90a;gfx942:sramecc+:xnack-")
    assert target_for(GPU) == Target("rocm", ("gfx90a", "gfx942:sramecc+:xnack-"))


def test_a_device_that_gpu_archs_leaves_out(amd_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_ARCHS", "gfx90a,gfx942:xnack+")
    with pytest.raises(TargetError, match=r"GPU_ARCHS \(gfx90a, gfx942:xnack\+\), got gfx942:sram"):
        target_for(GPU)


def test_other_devices_have_no_target() -> None:
    with pytest.raises(TargetError, match="expected a cpu or cuda device, got 'meta'"):
        target_for(torch.device("meta"))


def test_cross_build_needs_architectures() -> None:
    assert named_target("rocm", ("gfx1100",)) == Target("rocm", ("gfx1100",))
    if torch.version.hip is None:
        with pytest.raises(TargetError, match="target rocm: expected architectures.*GPU_ARCHS"):
            named_target("rocm")


def test_cpu_wave_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_target().wave_size == 64
    monkeypatch.setenv("AITER_CPU_WAVE", "32")
    assert cpu_target().wave_size == 32
    with cpu_wave(64):
        assert cpu_target().wave_size == 64
        with cpu_wave(32):
            assert cpu_target().wave_size == 32
        assert cpu_target().wave_size == 64
    assert cpu_target().wave_size == 32
    monkeypatch.setenv("AITER_CPU_WAVE", "8")
    with pytest.raises(EnvError, match="AITER_CPU_WAVE: expected 32 or 64, got '8'"):
        cpu_target()


def test_cpu_wave_does_not_leak_into_other_threads() -> None:
    seen: list[int | None] = []
    with cpu_wave(32):
        thread = threading.Thread(target=lambda: seen.append(cpu_target().wave_size))
        thread.start()
        thread.join()
    assert seen == [64]


def test_cpu_wave_refuses_other_widths() -> None:
    with pytest.raises(TargetError, match="expected 32 or 64, got 16"), cpu_wave(16):
        pass


@pytest.mark.parametrize(
    ("flags", "level"),
    [(V3, "x86-64-v3"), (V3.replace("avx2 ", ""), "x86-64-v2"), (V2, "x86-64-v2"), ("sse2", "")],
)
def test_cpu_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, level: str) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\nflags\t\t: fpu {flags}\n\nprocessor : 1\n")
    assert cpu_level(path) == level


def test_cpu_level_of_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_level(tmp_path / "none") == ""
