"""Is what gets built right, built once, and cleaned up after?"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from processes import PATIENCE_SECONDS, compiler_pids, wait_for, wait_for_compiles, wait_until_gone
from toy import MODULE, Toy, child_code, child_environment

from aiter.jit import builders, driver
from aiter.jit.cache import FAILED_DIR, WORK_DIR
from aiter.jit.driver import first_error, parse_depfile
from aiter.jit.errors import BuildError
from aiter.jit.plan import extension_suffix
from aiter.jit.progress import Progress

Messages = Callable[[], list[str]]
PROCESSES = 16


def test_log_lines_of_a_build(toy: Toy, messages: Messages) -> None:
    toy.load()
    (folder,) = toy.builds()
    first, second = messages()
    assert first == f"building {MODULE} for {toy.target().label} (no cached build)"
    assert second.startswith(f"built {MODULE} in ")
    assert second.endswith(f" s: {folder}/{MODULE}{extension_suffix()}")


def test_commands_are_logged_on_request(
    toy: Toy, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_LOG_MORE", "1")
    toy.load()
    assert sum(line.startswith("command: ") for line in messages()) == 2


def test_verbose_shows_commands_and_warnings(toy: Toy, messages: Messages) -> None:
    toy.source.write_text(toy.source.read_text() + "\nstatic int unused_thing;\n")
    toy.configure(verbose=True)
    toy.load()
    assert any("unused_thing" in line and "defined but not used" in line for line in messages())


def test_a_broken_source_fails_alike_each_time_and_recovers(toy: Toy) -> None:
    good = toy.source.read_text()
    toy.source.write_text(good + "\nint broken() { return undeclared_name; }\n")
    loader = toy.loader()
    texts = []
    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            loader.load(MODULE, toy.target())
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    error = caught.value
    assert error.module == MODULE
    assert error.target == toy.target().label
    assert "toy.cpp" in error.command and " -c " in error.command
    assert "error: 'undeclared_name' was not declared" in error.first_error
    assert error.log_path is not None and error.log_path.parent == toy.cache_dir / FAILED_DIR
    assert "undeclared_name" in error.log_path.read_text()
    for part in (error.command, error.first_error, str(error.log_path), MODULE):
        assert part in texts[0]
    assert toy.builds() == []
    toy.source.write_text(good)
    assert loader.load(MODULE, toy.target()).value() == 1


def test_a_link_error_names_the_symbol(toy: Toy) -> None:
    toy.configure(extra_ldflags=["-lno_such_library_anywhere"])
    with pytest.raises(BuildError, match="first error: .*cannot find -lno_such_library_anywhere"):
        toy.load()


def test_a_failing_source_stops_the_others(counted: Toy) -> None:
    (counted.csrc / "broken.cpp").write_text("#error stop here\n")
    counted.configure(srcs=["{{ AITER_CSRC_DIR }}/toy.cpp", "{{ AITER_CSRC_DIR }}/broken.cpp"])
    # The wrapper holds only toy.cpp: it waits for a file that broken.cpp's compile never needs.
    wrapper = counted.compiler_wrapper()
    wrapper.write_text(wrapper.read_text().replace('*" -c "*)', '*" -c "*toy.cpp*)'))
    counted.hold.touch()
    with pytest.raises(BuildError, match="stop here"):
        counted.load()
    (pid,) = compiler_pids(counted)
    wait_until_gone(pid)


def test_a_build_that_takes_too_long_is_stopped(
    counted: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_BUILD_TIMEOUT", "2")
    counted.hold.touch()
    with pytest.raises(BuildError, match="time ran out .AITER_BUILD_TIMEOUT.*\n  command: .* -c "):
        counted.load()
    (pid,) = compiler_pids(counted)
    wait_until_gone(pid)


def test_an_interrupt_stops_the_compilers(counted: Toy) -> None:
    counted.hold.touch()
    child = subprocess.Popen(
        child_code(counted, "loader.load(MODULE, target)"),
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(counted.compiles_log.exists)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=PATIENCE_SECONDS)
    assert "KeyboardInterrupt" in stderr
    (pid,) = compiler_pids(counted)
    wait_until_gone(pid)
    assert list((counted.cache_dir / WORK_DIR).iterdir()) == []


def _load_in_child(toy: Toy, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    results.put(toy.load().value())  # type: ignore[attr-defined]


def test_sixteen_processes_compile_once(counted: Toy) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(PROCESSES), context.Queue()
    children = [
        context.Process(target=_load_in_child, args=(counted, barrier, results))
        for _ in range(PROCESSES)
    ]
    for child in children:
        child.start()
    values = [results.get(timeout=PATIENCE_SECONDS) for _ in children]
    for child in children:
        child.join(PATIENCE_SECONDS)
    assert [child.exitcode for child in children] == [0] * PROCESSES
    assert values == [1] * PROCESSES
    assert counted.compiles() == 1
    assert len(counted.builds()) == 1


def test_threads_build_and_load_once(counted: Toy) -> None:
    loader = counted.loader()
    modules: list[object] = []
    threads = [
        threading.Thread(target=lambda: modules.append(loader.load(MODULE, counted.target())))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(modules) == 6
    assert all(module is modules[0] for module in modules)
    assert counted.compiles() == 1


def test_builders_without_locks_still_agree(
    counted: Toy, monkeypatch: pytest.MonkeyPatch, messages: Messages
) -> None:
    def refuse(self: object, timeout: float) -> None:
        raise NotImplementedError("no locks on this filesystem")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    children = [
        context.Process(target=_load_in_child, args=(counted, barrier, results)) for _ in range(2)
    ]
    for child in children:
        child.start()
    assert [results.get(timeout=PATIENCE_SECONDS) for _ in children] == [1, 1]
    for child in children:
        child.join(PATIENCE_SECONDS)
    assert len(counted.builds()) == 1
    counted.inner.write_text("#define TOY_VALUE 2\n")
    assert counted.load().value() == 2
    assert any("without a lock: no locks on this filesystem" in line for line in messages())


def test_the_next_builder_clears_up_after_a_killed_one(counted: Toy) -> None:
    counted.hold.touch()
    child = subprocess.Popen(
        child_code(counted, "loader.load(MODULE, target)"),
        env=child_environment(),
        stderr=subprocess.DEVNULL,
    )
    wait_for(counted.compiles_log.exists)
    child.kill()
    child.wait()
    (compiler,) = compiler_pids(counted)
    wait_until_gone(compiler)
    work = counted.cache_dir / WORK_DIR
    assert len(list(work.iterdir())) == 2
    counted.hold.unlink()
    assert counted.load().value() == 1
    assert counted.compiles() == 2
    assert list(work.iterdir()) == []


def test_clean_clears_up_after_a_killed_builder(counted: Toy) -> None:
    work = counted.cache_dir / WORK_DIR
    (work / "host-1-dead").mkdir(parents=True)
    (work / "host-1-dead.alive").touch()
    builders.remove_leftovers(counted.loader().cache)
    assert list(work.iterdir()) == []


def test_a_living_builders_folder_is_left_alone(counted: Toy) -> None:
    counted.hold.touch()
    first = threading.Thread(target=counted.load)
    first.start()
    wait_for(counted.compiles_log.exists)
    work = counted.cache_dir / WORK_DIR
    before = sorted(work.iterdir())
    with builders.private_folder(counted.loader().cache):
        assert set(before) < set(work.iterdir())
    assert sorted(work.iterdir()) == before
    counted.hold.unlink()
    first.join()


@pytest.mark.parametrize("name", ["source", "inner"])
def test_an_edit_during_the_build_is_not_published_under_the_old_key(
    counted: Toy, messages: Messages, name: str
) -> None:
    path: Path = getattr(counted, name)
    old = path.read_text()
    new = (
        old.replace("TOY_VALUE", "(TOY_VALUE + 1)", 1)
        if name == "source"
        else ("#define TOY_VALUE 2\n")
    )
    counted.hold.touch()
    values: list[int] = []
    thread = threading.Thread(target=lambda: values.append(counted.load().value()))
    thread.start()
    wait_for(counted.compiles_log.exists)
    path.write_text(new)
    counted.hold.unlink()
    thread.join()
    assert values == [2]
    assert any("changed during the build" in line for line in messages())
    assert counted.compiles() == 2
    assert len(counted.builds()) == 1
    path.write_text(old)
    assert counted.load().value() == 1


def test_files_that_never_keep_still_are_an_error(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = toy.root / "editing-g++"
    wrapper.write_text(f"#!/bin/sh\necho '// again' >> {toy.source}\nexec g++ \"$@\"\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    with pytest.raises(
        BuildError, match="keep still during a build, got .*toy.cpp changed in each"
    ):
        toy.load()
    assert toy.builds() == []


def test_a_header_from_the_future_still_builds_and_hits(counted: Toy) -> None:
    future = time.time_ns() + 10**15
    os.utime(counted.inner, ns=(future, future))
    assert counted.load().value() == 1
    compiles = counted.compiles()
    assert counted.load().value() == 1
    assert counted.compiles() == compiles


def test_objects_compile_at_most_max_jobs_at_once(
    counted: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["toy.cpp", "a.cpp", "b.cpp"]
    for name in names[1:]:
        (counted.csrc / name).write_text(f"int unused_{name[0]};\n")
    counted.configure(srcs=[f"{{{{ AITER_CSRC_DIR }}}}/{name}" for name in names])
    for jobs in (1, 2):
        counted.compiles_log.unlink(missing_ok=True)
        monkeypatch.setenv("MAX_JOBS", str(jobs))
        counted.hold.touch()
        built: list[bool] = []
        thread = threading.Thread(target=_force_build, args=(counted, built))
        thread.start()
        wait_for_compiles(counted, jobs)
        time.sleep(0.3)  # time in which one compile too many would start
        assert counted.compiles() == jobs
        counted.hold.unlink()
        thread.join()
        assert counted.compiles() == 3
        assert built == [True]


def _force_build(toy: Toy, built: list[bool]) -> None:
    built.append(toy.loader().ensure(MODULE, toy.target(), force=True)[1])


def test_results_do_not_depend_on_the_place(toy: Toy, tmp_path: Path) -> None:
    toy.source.write_text(
        toy.source.read_text().replace(
            "PyLong_FromLong(TOY_EXTRA)", "PyUnicode_FromString(__FILE__)"
        )
    )
    other = Toy(tmp_path / "elsewhere")
    other.source.write_text(toy.source.read_text())
    entries = [tree.loader().ensure(MODULE, tree.target())[0] for tree in (toy, other)]
    assert toy.load().extra() == "csrc/toy.cpp"
    assert entries[0].library.read_bytes() == entries[1].library.read_bytes()
    assert entries[0].folder.parts[-4:] == entries[1].folder.parts[-4:]


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("In file included\nx.cpp:3:5: error: bad\nx.cpp:4: error: more", "x.cpp:3:5: error: bad"),
        (
            "note\na.h:1:2: fatal error: b.h: No such file",
            "a.h:1:2: fatal error: b.h: No such file",
        ),
        (
            'k.cu(3): error: identifier "x" is undefined',
            'k.cu(3): error: identifier "x" is undefined',
        ),
        ("ld: x.o: undefined reference to `f()'", "ld: x.o: undefined reference to `f()'"),
        ("nvcc fatal   : Value 'x' is not defined", "nvcc fatal   : Value 'x' is not defined"),
        ("x.cpp: warning: errors ahead\nsomething else", "something else"),
        ("", "no output"),
    ],
)
def test_first_error(output: str, line: str) -> None:
    assert first_error(output) == line


def test_parse_depfile() -> None:
    text = "a.o: /x/a.cpp \\\n /x/with\\ space.h /x/b.h \\\n  /x/$$c.h /x/b.h\n"
    assert parse_depfile(text) == ["/x/a.cpp", "/x/with space.h", "/x/b.h", "/x/$c.h"]
    assert parse_depfile("a.o :  x.cu\\\n  y.h\n") == ["x.cu", "y.h"]


def test_a_compiler_that_cannot_start_is_a_build_error(toy: Toy) -> None:
    job = driver.Job(("/no/such/compiler",), toy.root / "out.txt")
    with pytest.raises(driver.JobFailed, match="cannot start the compiler: no program /no/such"):
        driver.run_jobs([job], toy.root, {}, 1, None, Progress("test", 1))


GONE = """
class Gone:
    def isatty(self): return {terminal}
    def write(self, text): raise {error}
    def flush(self): raise {error}

sys.stderr = Gone()
print(loader.load(MODULE, target).value())
sys.stderr = None
"""


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("error", ["BrokenPipeError(32, 'Broken pipe')", "ValueError('closed')"])
def test_an_stderr_that_nobody_reads_ends_no_build(toy: Toy, terminal: bool, error: str) -> None:
    """As behind `| head -1`, or of a terminal that was closed."""
    command = child_code(toy, GONE.format(terminal=terminal, error=error))
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
