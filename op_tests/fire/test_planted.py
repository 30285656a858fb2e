"""Is every planted bug caught, with the kernel, the line and the address in the report?"""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from checked import build_checked, checked_environment, python

from aiter.jit.errors import LoadError
from aiter.jit.load import Loader
from aiter.jit.target import Target, cpu_level

PLANTED = Path(__file__).resolve().parent / "planted"
MODULE = "module_planted"
TIMEOUT_SECONDS = 120

# By any build: what hangs a GPU or is undefined there. The words of the report.
ALWAYS = {
    "divergent_collective": "lanes of one wave wait at different wave operations: thread 1 of",
    "divergent_barrier": "lanes of one wave wait at different barriers: thread 1 of workgroup 0",
    "collective_beside_barrier": "lanes 0xa{8,16} of wave 0 wait at wave_max .* for lanes 0x5+",
    "exited_lane": r"reads a lane that has left: thread \d+ of workgroup 0 at wave_read_lane",
    "early_workgroup": "reaches for a workgroup that may not have started: thread 0 of workgroup 0",
    "divergent_cluster": "workgroups of one cluster wait at different barriers: cluster_wait",
}
RACE = {
    **ALWAYS,
    "unordered_waves": r"data race on LDS offset 0x[0-9a-f]+: .* by thread \d+ of workgroup 0 at",
    "unordered_lanes": r"data race on LDS offset 0x[0-9a-f]+: .* by thread \d+ of workgroup 0 at",
    "ballot_for_sync": r"data race on LDS offset 0x[0-9a-f]+: .* by thread \d+ of workgroup 0 at",
    "unordered_workgroups": r"data race on LDS offset 0x10: read by thread 0 of workgroup 1 at",
    "shared_address": r"data race on address 0x[0-9a-f]+: write by thread 0 of workgroup 1 at",
    "missing_release": r"data race on address 0x[0-9a-f]+: read by thread \d+ of workgroup 1 at",
    "early_release": r"data race on address 0x[0-9a-f]+: read by thread \d+ of workgroup 1 at",
    "missing_acquire": r"data race on address 0x[0-9a-f]+: read by thread \d+ of workgroup 1 at",
    "narrow_release": r"data race on address 0x[0-9a-f]+: read by thread \d+ of workgroup 1 at",
    "unwritten_lds": "read of LDS that nobody wrote: offset 12, read by thread 3 of workgroup 0",
    "behind_lds": "access behind the 512 bytes of LDS: offset 512, write by thread 127",
}
ADDRESS = {
    **ALWAYS,
    "behind_lds": r"AddressSanitizer: use-after-poison on address 0x[0-9a-f]+",
    "behind_tensor": r"AddressSanitizer: heap-buffer-overflow on address 0x[0-9a-f]+",
    "signed_overflow": r"runtime error: signed integer overflow: \d+ \* 2",
    "wide_shift": "runtime error: shift exponent 32 is too large for 32-bit type",
}
# NOTE: the execution layer names the operation's place; the function of a wave operation it cannot.
WITHOUT_KERNEL = set(ALWAYS)

RUN = """
import json, sys
from pathlib import Path
import torch
from aiter.jit.load import Loader
from aiter.jit.target import cpu_target
module = Loader(Path(sys.argv[1])).load("module_planted", cpu_target())
reports = {}
for name in sys.argv[2:]:
    data = torch.zeros(128, dtype=torch.int32)
    try:
        module.run(name, data.data_ptr(), len(data))
        reports[name] = None
    except RuntimeError as error:
        reports[name] = str(error)
print(json.dumps(reports))
"""


@cache
def built(check: str, wave: int) -> None:
    build_checked(Loader(PLANTED / "config.json"), [MODULE], check, wave)


def run(check: str, wave: int, names: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the planted kernels `names` in a process under a checker."""
    built(check, wave)
    return subprocess.run(
        python("-c", RUN, str(PLANTED / "config.json"), *names),
        env=checked_environment(check, wave),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def line_of(bug: str) -> int:
    """The line of `planted.cu` that has the bug."""
    lines = (PLANTED / "planted.cu").read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"// BUG: {bug}"))
    return number


def check_report(bug: str, words: str, report: str) -> None:
    """The report says what is wrong and where."""
    assert re.search(words, report), report
    assert f"planted.cu:{line_of(bug)}" in report, report
    if bug not in WITHOUT_KERNEL:
        assert re.search(rf"\b{bug}\b", report), report


@pytest.mark.slow
@pytest.mark.parametrize("wave", [64, 32])
def test_race_check(wave: int) -> None:
    sound = ("sound", "sound_cluster", "sound_handover")
    done = run("race", wave, [*sound, "lost_arrival", *RACE])
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert [reports.pop(name) for name in sound] == [None] * 3
    assert "a ticket is left at 2 behind a launch: expected 0" in reports.pop("lost_arrival")
    for bug, report in reports.items():
        assert report is not None, f"{bug}: expected a report, got none"
        check_report(bug, RACE[bug], report)


@pytest.mark.slow
@pytest.mark.parametrize("wave", [64, 32])
def test_layer_under_address_check(wave: int) -> None:
    """Lanes that are abandoned in mid-kernel leave nothing behind that the next launch trips over."""
    done = run("address", wave, [name for bug in ALWAYS for name in (bug, "sound")])
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert reports.pop("sound") is None
    for bug, report in reports.items():
        assert report is not None, f"{bug}: expected a report, got none"
        check_report(bug, ALWAYS[bug], report)


@pytest.mark.slow
@pytest.mark.parametrize("bug", sorted(set(ADDRESS) - set(ALWAYS)))
def test_address_check(bug: str) -> None:
    done = run("address", 64, ["sound", bug])
    assert done.returncode != 0, done.stdout
    check_report(bug, ADDRESS[bug], done.stderr)


def test_a_missing_sanitizer_runtime_is_an_error_and_not_an_exit() -> None:
    built("address", 64)
    target = Target("cpu", ("wave64",), cpu_level(), "address")
    with pytest.raises(LoadError, match="expected the address sanitizer.*LD_PRELOAD=.*check_kern"):
        Loader(PLANTED / "config.json").load(MODULE, target)
