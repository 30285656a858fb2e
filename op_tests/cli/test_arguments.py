"""Is every command line answered, whatever is in it: by a result, or by one sentence and a status?

The arguments are drawn from the parsers' own definitions, so a new option is drawn as soon as it is
there. What is expensive is stubbed: compilers, kernels, models. What decides about arguments is not.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch

from aiter import reference
from aiter.cli import (
    cache_commands,
    demo,
    demo_model,
    explain,
    options,
    selftest,
    tune,
    tune_experts,
    tune_router,
)
from aiter.cli.main import OWN_PARSERS, main, make_parser, verbs
from aiter.jit import compilers, paths
from aiter.jit.errors import BuildError, ToolchainError
from aiter.jit.load import Loader, default_loader
from aiter.jit.target import Target

DRAWS = 150  # command lines per verb
MODULES = {"explain": explain, "tune": tune, "selftest": selftest, "demo": demo}
NUMBERS = ("0", "1", "2", "3", "4", "8", "32", "64", "255", "256", "-1", "+2", "1e3", "0x10",
           "1_000", "16777216", "2147483647", "2147483648", "9" * 25, "9" * 5000, "", " 2 ", "٣",
           "1.5", "nan")  # fmt: skip
TEXTS = ("", " ", "-", "--", "x", "cpu", "cuda", "cuda:0", "cuda:99", "cpu:0", "meta", "cuda:x", "gpu",
         "gfx942", "gfx9999", "sm_90", "wave32", "wave64;wave32", ";,", "native", "8,2,64", "2,8,64",
         "8,2", "1,2,3,4", "0,0,0", "1,,2", "\udcff", "é", "a\nb", "x" * 5000, "../../etc",
         "out.json", "no/such/folder/out.json", "module_topk_softmax", "topk_softmax",
         "module_topk_softmaks", "mixtral", "--all", "%s", "{}")  # fmt: skip


TREES = ("x", "cpu", "gpu", "native", "mixtral", "é", "8,2", "{}")  # of TEXTS: for `export --into`

# NOTE: a folder of tests is no package, and one beside this is not found by its name.
_trees = Path(__file__).parents[1] / "export" / "trees.py"
_spec = importlib.util.spec_from_file_location("trees", _trees)
assert _spec is not None and _spec.loader is not None
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)


def drawn_value(action: argparse.Action, rng: random.Random) -> str:
    """A value for an option: mostly one that it could take."""
    if action.choices is not None and rng.random() < 0.8:
        return str(rng.choice(list(action.choices)))
    if action.type is not None and rng.random() < 0.8:
        return rng.choice(NUMBERS[:8] if rng.random() < 0.6 else NUMBERS)
    return rng.choice(TEXTS)


def drawn_arguments(parser: argparse.ArgumentParser, rng: random.Random) -> list[str]:
    """Words for the options of `parser`, some of them twice or without what they need."""
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or rng.random() < 0.5:
            continue
        if not action.option_strings:
            words += [drawn_value(action, rng) for _ in range(rng.randint(0, 2))]
            continue
        name = rng.choice(action.option_strings)
        if action.nargs == 0 or rng.random() < 0.05:
            words.append(name)
        else:
            value = drawn_value(action, rng)
            words += [f"{name}={value}"] if rng.random() < 0.3 else [name, value]
    if rng.random() < 0.1:
        words.insert(rng.randint(0, len(words)), rng.choice(TEXTS))
    return words


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, out.getvalue(), err.getvalue()


def judge(arguments: list[str]) -> int:
    """The status of a command line, which has to fit what was printed."""
    status, out, err = run(arguments)
    shown = f"{arguments!r} gave {status}\n{out[-500:]}\n{err}"
    assert "Traceback" not in out + err and "this is a defect" not in err, shown
    errors = [line for line in err.splitlines() if line.startswith(("error:", "MISMATCH"))]
    assert status in (0, 1, 2), shown
    assert bool(errors) == (status != 0) or "selftest: NOT" in out, shown
    if status == 2:
        # NOTE: a value with a line break in it is shown as it is by some versions of argparse.
        assert len(errors) == 1 and (err.count("\n") == 1 or "\n" in "".join(arguments)), shown
    return status


@pytest.fixture
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiler, kernel or model is run; the files that are written go to an empty folder."""
    for name in ("AITER_JIT_DIR", "GPU_ARCHS", "AITER_LOG_LEVEL", "AITER_DISPATCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AITER_JIT_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "PREBUILT_DIR", tmp_path / "prebuilt")
    default_loader.cache_clear()

    def ensure(self: Loader, module: str, target: Target, force: bool = False) -> Any:
        self.plan(module, target)
        if force:
            raise BuildError(module, target.label, "planted")
        return SimpleNamespace(library=self.cache.root / module), True

    def tidy(root: Path) -> None:
        return None

    monkeypatch.setattr(Loader, "ensure", ensure)
    monkeypatch.setattr(cache_commands, "tidy_prebuilt", tidy)
    monkeypatch.setattr("aiter.cli.device_code.compile_module", lambda *arguments: [])
    monkeypatch.setattr(compilers, "compiler_version", lambda *arguments: "made up 1.0")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}
    monkeypatch.setattr(options.os, "sysconf", pages.__getitem__)
    monkeypatch.setattr("aiter.export.payload.formatted", dict)
    for name in TREES:
        trees.write_tree(tmp_path / name, "checkout")
    _stub_ops(monkeypatch)
    _stub_models(monkeypatch)
    yield
    default_loader.cache_clear()


def _stub_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    def route(logits: torch.Tensor, topk: int, experts: int, *rest: Any, **named: Any) -> Any:
        return reference.topk_softmax_sorting(
            logits, topk, experts, *rest, block_size=named["block_size"]
        )

    def decode(layers: Any, chosen: Any, device: Any, record: demo.Record) -> None:
        record.routing_us, record.experts_us, record.paths = [1.0], [1.0], {"fused"}

    for module in (explain, tune, tune_router, demo):
        monkeypatch.setattr(module, "fused_topk_moe_sorting_max_tokens", lambda *a, **o: 64)
    for module in (explain, tune_router):
        monkeypatch.setattr(module, "fused_router_sorting_max_tokens", lambda *a, **o: 64)
    monkeypatch.setattr(explain, "moe_sorting_opus_get_workspace_size", lambda *a, **o: 0)
    monkeypatch.setattr(explain.fused_moe, "topk_softmax_sorting", route)
    monkeypatch.setattr(
        tune, "device_clock", lambda *a: lambda shape, m, used: {path: 1.0 for path in used}
    )
    monkeypatch.setattr(tune_router, "device_clock", lambda *a: lambda shape, m: (1.0, 2.0))
    monkeypatch.setattr(tune.tuned, "keep", lambda device, measured, kind: Path("kept"))
    monkeypatch.setattr(selftest, "_report", lambda *arguments: None)
    monkeypatch.setattr(demo, "_make_layer", lambda *arguments: None)
    monkeypatch.setattr(demo, "_warm_up", lambda *arguments: None)
    monkeypatch.setattr(demo, "_decode", decode)


def _stub_models(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = ModuleType("transformers")
    transformers.__version__ = "0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr(demo_model, "_make_model", lambda *a: torch.nn.Identity())
    monkeypatch.setattr(demo_model, "_generate", lambda *a: torch.zeros(1, 1, dtype=torch.long))
    monkeypatch.setattr(demo_model, "_count_paths", lambda *a: {})
    monkeypatch.setattr(demo_model, "_layer_table", lambda *a: "")
    monkeypatch.setattr(demo_model, "use_aiter", _NoPatch)
    monkeypatch.setattr(torch, "randint", lambda *a: torch.zeros(1, 1, dtype=torch.long))


class _NoPatch:
    def __init__(self, model: Any) -> None:
        pass

    def __enter__(self) -> _NoPatch:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser that reads what follows the verb."""
    if verb == "demo --model":
        return demo_model.make_parser()
    if verb == "tune --experts":
        return tune_experts.make_parser()
    if verb == "tune --router":
        return tune_router.make_parser()
    return MODULES[verb].make_parser() if verb in MODULES else verbs(make_parser())[verb]


VERBS = [*verbs(make_parser()), "demo --model", "tune --experts", "tune --router"]


def test_every_verb_is_drawn() -> None:
    assert set(OWN_PARSERS) == set(MODULES)
    assert set(VERBS) >= {"env", "list", "build", "status", "clean", *MODULES}


@pytest.mark.parametrize("verb", VERBS)
def test_any_arguments_are_answered(stubbed: None, verb: str) -> None:
    rng = random.Random(verb)
    parser = parser_of(verb)
    seen = {judge([*verb.split()[:1], *drawn_arguments(parser, rng)]) for _ in range(DRAWS)}
    if len(parser._actions) > 1:
        needed = {2} if verb == "tune --experts" else {0, 2}  # NOTE: it measures GPUs alone.
        assert seen >= needed, f"drawn too narrowly: {seen}"


def test_any_verb_is_answered(stubbed: None) -> None:
    rng = random.Random(0)
    for text in (*TEXTS, *NUMBERS, "buidl", "clena", "Env", "--versio"):
        judge([text, *rng.choices(TEXTS, k=rng.randint(0, 2))])
    judge([])


REFUSED = [
    (["demo", "--device", "tpu"], "argument --device: expected cpu, cuda or cuda:N, got 'tpu'"),
    (["explain", "--draw", "--block-size", "0"], "argument --block-size: expected a whole number fr"),
    (["demo", "--steps", "0"], "argument --steps: expected a whole number from 1"),
    (["demo", "--tokens", "0"], "argument --tokens: expected a whole number from 1"),
    (["demo", "--layers", "0"], "argument --layers: expected a whole number from 1"),
    (["demo", "--model", "mixtral", "--layers", "0"], "argument --layers: expected"),
    (["explain", "--tokens", "0", "--experts", "4", "--topk", "1"], "argument --tokens: expected"),
    (["tune", "--tokens", "4,0"], "argument --tokens: expected M,M,..., each from 1"),
    (["tune", "--router", "64,8"], "argument --router: expected D',E,K or several of these"),
    (["tune", "--router", "64,8,2,9"], "argument --router: expected D',E,K or several of these"),
    (["tune", "--router=64,8,9"], "argument --router: expected 1 <= K <= E, got '64,8,9'"),
    (["tune", "--router", "64,8,2", "--tokens", "1,65"], "argument --tokens: expected M,M,..., each"),
    (["tune", "--router", "99999999,99999999,2", "--device", "cpu"], "fit the memory"),
    (["tune", "--shape", "4,5,64"], "argument --shape: expected 1 <= K <= E, got '4,5,64'"),
    (["explain", "--tokens", "1", "--experts", "4", "--topk", "5"], "argument --topk: expected at mo"),
    (["demo", "--experts", "4", "--topk", "5"], "--topk: expected at most --experts, which is 4"),
    (["demo", "--model", "mixtral", "--experts", "4", "--topk", "5"], "--topk: expected at most"),
    (["demo", "--device", "cpu", "--model-dim", "99999999", "--width", "99999999"], "fit the memory"),
    (["explain", "--draw", "--model-dim", "2147483647", "--tokens", "60", "--device", "cpu"], "memory"),
    (["export"], "the following arguments are required: --into"),
    (["export", "--into", "no/such"], "--into: expected a folder, got 'no/such'"),
    (["export", "--into", ""], "--into: expected a folder, got ''"),
    (["export", "--into", "."], "--into: expected a checkout or an installed tree of ROCm's aiter"),
    (["export", "--into", "x", "--check", "--diff"], "not allowed with argument --check"),
    (["export", "--into", "x", "--remove"], "--remove: expected a tree with an export"),
    (["buidl"], "invalid choice: 'buidl'; did you mean build? (choose from env, list"),
    (["xyz"], "invalid choice: 'xyz' (choose from env, list"),
    ([], "the following arguments are required"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_command_line_is_one_sentence(
    stubbed: None, arguments: list[str], message: str
) -> None:
    status, out, err = run(arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("verb", ["demo", "explain", "tune", "selftest", "demo --model mixtral"])
def test_a_gpu_that_is_not_there(stubbed: None, verb: str) -> None:
    status, _, err = run([*verb.split(), "--device", "cuda"])
    assert status == 2 and err.count("\n") == 1
    assert "argument --device: expected a GPU that this PyTorch" in err and "it sees none" in err


def test_a_misspelt_module_is_answered_with_the_right_one(stubbed: None) -> None:
    for name in ("module_topk_softmaks", "topk_softmax"):
        status, _, err = run(["build", name])
        assert status == 1 and err.rstrip().endswith("did you mean module_topk_softmax?"), err
    assert "did you mean" not in run(["build", "zzz"])[2]


def test_the_version(stubbed: None) -> None:
    from aiter import __version__

    assert run(["--version"]) == (0, f"aiter {__version__}\n", "")


def test_env_as_json_says_what_the_tables_say(stubbed: None) -> None:
    status, out, _ = run(["env", "--json"])
    found = json.loads(out)
    assert status == 0 and list(found) == [
        "versions", "names", "folders", "targets", "notes", "variables",
    ]  # fmt: skip
    tables = run(["env"])[1]
    assert [target["target"] for target in found["targets"]] == ["cpu", "cuda", "rocm"]
    for value in (*found["versions"].values(), *found["folders"].values(), *found["notes"]):
        assert value in tables
    assert {row["variable"] for row in found["variables"]} >= {"AITER_JIT_DIR", "CXX"}


def _raise(error: Exception) -> Callable[..., Any]:
    def raising(*arguments: object) -> None:
        raise error

    return raising


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ToolchainError("compiler: expected one, got none"), 1, "error: compiler: expected one"),
        (ValueError("topk: expected 1, got 2"), 2, "error: topk: expected 1, got 2"),
        (PermissionError(13, "Permission denied", "/x"), 1, "write files, got [Errno 13]"),
        (MemoryError("no room"), 1, "error: expected a problem that fits the memory, got no room"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "expected a problem that fits the memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
            1,
            "that fits the memory",
        ),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            1,
            "is a defect of aiter",
        ),
        (KeyError("key"), 1, "error: this is a defect of aiter: KeyError: 'key' (AITER_LOG_LEVEL="),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_is_raised_is_one_message(
    stubbed: None, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, message: str
) -> None:
    monkeypatch.setattr(explain, "_explain", _raise(error))
    monkeypatch.setattr(explain.Parser, "error", lambda self, text: _raise(ValueError(text))())
    got, _, err = run(["explain", "--draw"])
    assert got == status and message in err and "Traceback" not in err
    if status != 130 and not isinstance(error, ToolchainError):
        monkeypatch.setenv("AITER_LOG_LEVEL", "DEBUG")
        with pytest.raises(type(error)):
            main(["explain", "--draw"])


def test_closed_outputs_are_no_error(stubbed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `>&-` of a shell leaves them."""
    for name in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert main(["list"]) == 0


def test_a_reader_that_has_enough_ends_the_command(stubbed: None) -> None:
    import subprocess

    command = f"{sys.executable} -m aiter env | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False,
                          cwd=Path(_checkout.__file__).parents[1])  # fmt: skip
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
