"""How do compiled functions get called, and what does a hit cost?"""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import MODULE, Toy, child_code, child_environment

from aiter.jit import compile_ops, core, cpu_wave, module_for
from aiter.jit.errors import CacheError, ConfigError, LoadError
from aiter.jit.load import Loader

TENSOR = torch.zeros(1)


def make_twice(loader: Loader) -> Callable[..., int]:
    @compile_ops(MODULE, loader=loader)
    def twice(tensor: torch.Tensor, number: int) -> int:
        """Twice `number`."""
        raise NotImplementedError

    return twice


def make_renamed(loader: Loader) -> Callable[..., int]:
    @compile_ops(MODULE, fc_name="twice", loader=loader)
    def renamed(tensor: torch.Tensor, number: int) -> int:
        """Goes through to `twice`."""
        raise NotImplementedError

    return renamed


def test_a_stub_calls_its_namesake(toy: Toy) -> None:
    twice = make_twice(toy.loader())
    assert twice(TENSOR, 4) == 8
    assert twice(TENSOR, 5) == 10


def test_the_stub_keeps_its_face(toy: Toy) -> None:
    twice = make_twice(toy.loader())
    assert twice.__name__ == "twice"
    assert twice.__doc__ == "Twice `number`."
    assert list(inspect.signature(twice).parameters) == ["tensor", "number"]


def test_decorating_builds_nothing(toy: Toy) -> None:
    make_twice(toy.loader())
    assert not toy.cache_dir.exists()


def test_fc_name(toy: Toy) -> None:
    assert make_renamed(toy.loader())(TENSOR, 6) == 12


def test_exceptions_of_the_compiled_function_pass_through(toy: Toy) -> None:
    twice = make_twice(toy.loader())
    for _ in range(2):
        with pytest.raises(ValueError, match="number: expected >= 0, got -1"):
            twice(TENSOR, -1)
        with pytest.raises(TypeError, match="function takes exactly 2 arguments"):
            twice(TENSOR)
        with pytest.raises(TypeError, match="takes no keyword arguments"):
            twice(TENSOR, number=1)


def test_what_is_not_a_tensor(toy: Toy) -> None:
    twice = make_twice(toy.loader())
    for _ in range(2):
        with pytest.raises(TypeError, match="^tensor: expected a tensor, got list$"):
            twice([1.0], 1)
        with pytest.raises(TypeError, match="twice: expected the argument tensor, got none"):
            twice(number=1)
        with pytest.raises(TypeError, match="takes no keyword arguments"):
            twice(tensor=TENSOR, number=1)
        assert twice(TENSOR, 1) == 2


def test_the_tensor_may_come_later_and_by_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class FakeModule:
        @staticmethod
        def op(*args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

    class FakeLoader:
        def load(self, module: str, target: object) -> Any:
            return FakeModule

    @compile_ops("module_x", loader=FakeLoader())  # type: ignore[arg-type]
    def op(count: int, first: torch.Tensor, second: torch.Tensor) -> None:
        """Three arguments."""

    op(1, TENSOR, second=TENSOR)
    op(2, first=TENSOR, second=TENSOR)
    assert calls == [((1, TENSOR), {"second": TENSOR}), ((2,), {"first": TENSOR, "second": TENSOR})]


def test_a_stub_needs_a_tensor() -> None:
    with pytest.raises(TypeError, match="op: expected a parameter annotated as torch.Tensor, got"):

        @compile_ops("module_x")
        def op(count: int) -> None:
            """No tensor."""


def test_a_device_without_a_target(toy: Toy) -> None:
    with pytest.raises(
        ValueError, match="^tensor: expected .* cpu or cuda device, got one on meta$"
    ):
        make_twice(toy.loader())(torch.zeros(1, device="meta"), 1)


def test_a_missing_function_lists_what_is_there(toy: Toy) -> None:
    @compile_ops(MODULE, loader=toy.loader())
    def thrice(tensor: torch.Tensor) -> int:
        """Not in the module."""
        raise NotImplementedError

    with pytest.raises(
        LoadError, match="expected a function thrice, got .* extra, lanes, twice, v"
    ):
        thrice(TENSOR)


def test_a_library_that_does_not_load(toy: Toy) -> None:
    toy.source.write_text(toy.source.read_text().replace("PyInit_module_toy", "PyInit_other"))
    with pytest.raises(LoadError, match="expected to load .*module_toy.*, got .*PyInit_module_toy"):
        toy.load()


def test_every_call_follows_the_wave(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = toy.loader()
    monkeypatch.setattr(core, "_default_loader", lambda: loader)
    seen = [module_for(MODULE, "cpu").lanes()]
    with cpu_wave(32):
        seen.append(module_for(MODULE, torch.device("cpu")).lanes())
    seen.append(module_for(MODULE, "cpu").lanes())
    assert seen == [64, 32, 64]


def test_bound_functions_follow_the_wave() -> None:
    class FakeLoader:
        def load(self, module: str, target: Any) -> Any:
            return type("Module", (), {"op": staticmethod(lambda tensor: target.wave_size)})

    @compile_ops("module_x", loader=FakeLoader())  # type: ignore[arg-type]
    def op(tensor: torch.Tensor) -> int:
        """The wave width."""
        raise NotImplementedError

    for _ in range(2):
        assert op(TENSOR) == 64
        with cpu_wave(32):
            assert op(TENSOR) == 32
        with cpu_wave(64):
            assert op(TENSOR) == 64


def test_first_calls_from_threads_compile_once(counted: Toy) -> None:
    twice = make_twice(counted.loader())
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(twice(TENSOR, 3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [6] * 8
    assert counted.compiles() == 1


HIT = """
forbidden = []
def audit(event, args):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system",
                 "fcntl.flock", "fcntl.lockf"):
        forbidden.append(event)
sys.addaudithook(audit)
value = loader.load(MODULE, target).value()
import json
names = ("jinja2", "filelock", "pybind11", "aiter.jit.build")
print(json.dumps([value, forbidden, [name for name in names if name in sys.modules]]))
"""


def test_a_hit_starts_no_process_and_takes_no_lock(toy: Toy) -> None:
    def run() -> Any:
        command = child_code(toy, HIT)
        done = subprocess.run(
            command, env=child_environment(), capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout), done.stderr

    (value, events, modules), _ = run()
    assert value == 1
    assert "subprocess.Popen" in events and "fcntl.flock" in events
    assert "filelock" in modules and "aiter.jit.build" in modules
    assert run() == ([1, [], []], "")


def test_forbidden_building(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_NO_BUILD", "1")
    with pytest.raises(
        CacheError,
        match=rf"(?s)module {MODULE} for cpu-wave64.*no cached build"
        rf".*python -m aiter build {MODULE} --target cpu --arch 'wave64'",
    ):
        toy.load()
    assert toy.builds() == []
    monkeypatch.delenv("AITER_NO_BUILD")
    toy.load()
    monkeypatch.setenv("AITER_NO_BUILD", "1")
    assert toy.load().value() == 1


def test_rebuild_builds_once_per_process(
    counted: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted.load()
    caplog.set_level(logging.INFO, logger="aiter")
    monkeypatch.setenv("AITER_REBUILD", "1")
    loader = counted.loader()
    first = loader.load(MODULE, counted.target())
    assert loader.load(MODULE, counted.target()) is first
    assert counted.compiles() == 2
    assert "(AITER_REBUILD)" in caplog.text
    assert len(counted.builds()) == 1


def test_a_read_only_cache_serves_hits(
    toy: Toy, read_only: Callable[[Path], None], obey_permissions: Callable[[], None]
) -> None:
    toy.load()
    read_only(toy.cache_dir)
    code = "print(loader.load(MODULE, target).value())"
    done = subprocess.run(
        child_code(toy, code),
        env=child_environment(),
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


def test_a_miss_in_a_read_only_cache_names_the_way_out(
    toy: Toy, read_only: Callable[[Path], None], obey_permissions: Callable[[], None]
) -> None:
    toy.load()
    toy.inner.write_text("#define TOY_VALUE 2\n")
    read_only(toy.cache_dir)
    done = subprocess.run(
        child_code(toy, "loader.load(MODULE, target)"),
        env=child_environment(),
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"aiter.jit.errors.CacheError: cache folder {toy.cache_dir}: ")
    assert "Permission denied" in last
    assert "set AITER_JIT_DIR to a folder that can be written" in last


def test_an_unwritable_damaged_build_is_an_error(
    toy: Toy, read_only: Callable[[Path], None], obey_permissions: Callable[[], None]
) -> None:
    entry, _ = toy.loader().ensure(MODULE, toy.target())
    entry.library.write_bytes(b"")
    read_only(toy.cache_dir)
    done = subprocess.run(
        child_code(toy, "loader.load(MODULE, target)"),
        env=child_environment(),
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "expected to move" in done.stderr.splitlines()[-1]


def test_module_for_names_unknown_modules() -> None:
    with pytest.raises(ConfigError, match="module module_nope: expected one of module_fused_topk"):
        module_for("module_nope", "cpu")


LOGGING = """
import logging
{setup}
loader.load(MODULE, target)
"""


@pytest.mark.parametrize(
    ("setup", "variables", "prefix"),
    [
        ("", {}, "[aiter] building"),
        ("", {"AITER_LOG_LEVEL": "WARNING"}, None),
        ("logging.basicConfig(level='INFO', format='app %(message)s')", {}, "app building"),
        ("logging.basicConfig(format='app %(message)s')", {}, None),
        (
            "logging.basicConfig(format='app %(message)s')",
            {"AITER_LOG_LEVEL": "INFO"},
            "app building",
        ),
    ],
)
def test_where_messages_go(
    toy: Toy, setup: str, variables: dict[str, str], prefix: str | None
) -> None:
    done = subprocess.run(
        child_code(toy, LOGGING.format(setup=setup)),
        env=child_environment(**variables),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert [line.partition(f" {MODULE}")[0] for line in lines] == (
        [] if prefix is None else [prefix, prefix.replace("building", "built")]
    )
