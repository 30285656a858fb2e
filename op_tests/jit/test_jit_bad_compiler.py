"""What happens when the compiler hangs, crashes or talks too much?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from processes import compiler_pids, exists, wait_for
from toy import Toy

from aiter.jit import progress
from aiter.jit.errors import BuildError, ToolchainError

Messages = Callable[[], list[str]]


def compiler(toy: Toy, monkeypatch: pytest.MonkeyPatch, at_compile: str, version: str = "") -> Path:
    """A compiler that runs the shell text `at_compile` first."""
    path = toy.root / "odd-g++"
    path.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" -c "*) {at_compile};; *" --version "*) {version or ":"};; esac\n'
        'exec g++ "$@"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


@pytest.mark.parametrize("name", ["SEGV", "ABRT", "KILL", "BUS"])
def test_a_crash_is_named(toy: Toy, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    compiler(toy, monkeypatch, f"kill -{name} $$; sleep 10")
    with pytest.raises(BuildError, match=f"the compiler was killed by SIG{name}\n(?s:.*)odd-g"):
        toy.load()


def test_a_crash_behind_the_compiler_is_an_error(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(
        toy, monkeypatch, "echo 'x.cpp:1: internal compiler error: Segmentation fault'; exit 4"
    )
    with pytest.raises(BuildError, match="exited with status 4\n  first error: .*internal comp"):
        toy.load()


MEGABYTE = "yes 'toy.cpp:1:1: warning: something is odd here' | head -c 1000000"


def test_a_megabyte_of_warnings_is_fine(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(toy, monkeypatch, MEGABYTE)
    assert toy.load().value() == 1
    (folder,) = toy.builds()
    assert (folder / "build.log").stat().st_size > 10**6


def test_an_error_behind_a_megabyte_of_warnings_is_found(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(toy, monkeypatch, f"{MEGABYTE}; echo; echo 'toy.cpp:7:7: error: here'; exit 1")
    with pytest.raises(BuildError) as caught:
        toy.load()
    assert caught.value.first_error == "toy.cpp:7:7: error: here"
    assert len(str(caught.value)) < 3000


def test_a_line_without_end_is_cut(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(toy, monkeypatch, "head -c 1000000 /dev/zero | tr '\\0' x; exit 1")
    with pytest.raises(BuildError) as caught:
        toy.load()
    assert len(str(caught.value)) < 3000


def test_a_hanging_compiler_is_visible_and_can_be_limited(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, messages: Messages
) -> None:
    log = toy.compiles_log
    compiler(toy, monkeypatch, f"echo $$ >> {log}; sleep 600")
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.2)
    monkeypatch.setenv("AITER_BUILD_TIMEOUT", "1")
    with pytest.raises(BuildError, match="time ran out .AITER_BUILD_TIMEOUT"):
        toy.load()
    assert any(
        "still building module_toy" in line and "0 of 2 steps" in line for line in messages()
    )
    wait_for(lambda: not any(map(exists, compiler_pids(toy))))


def test_a_child_of_the_compiler_does_not_outlive_the_limit(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(toy, monkeypatch, f"(echo $$ >> {toy.compiles_log}; exec sleep 600) & wait")
    monkeypatch.setenv("AITER_BUILD_TIMEOUT", "1")
    with pytest.raises(BuildError, match="time ran out"):
        toy.load()
    wait_for(lambda: not any(map(exists, compiler_pids(toy))))


def test_a_compiler_that_fails_silently(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(toy, monkeypatch, "exit 1")
    with pytest.raises(BuildError, match="exited with status 1\n  first error: no output"):
        toy.load()


def test_a_compiler_that_writes_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(toy, monkeypatch, "exit 0")
    with pytest.raises(BuildError, match="toy.cpp.o"):
        toy.load()


def test_a_compiler_that_only_ever_succeeds(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /bin/true does, which leaves nothing to link that could be missed."""
    path = compiler(toy, monkeypatch, ":")
    path.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(BuildError, match="the compiler succeeded, and wrote no shared object"):
        toy.load()


def test_a_compiler_that_refuses_to_say_its_version(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(toy, monkeypatch, ":", version="exit 3")
    with pytest.raises(ToolchainError, match="--version: expected .*, got exit status 3"):
        toy.load()


def test_a_crash_at_version_is_an_error(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(toy, monkeypatch, ":", version="kill -SEGV $$")
    with pytest.raises(ToolchainError, match="--version: expected it to print its version, got"):
        toy.load()
