"""Does a slice of the fuzzer find nothing, would it find what is wrong, and can it be repeated?"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import fuzz_ops
import pytest
from buffers import Mismatch
from fuzz_loader import LoaderJudges
from fuzz_ops import Ops
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import default_device

from aiter.jit import spec

LOADER_INPUTS, OP_INPUTS = 600, 150  # of each kind
EXAMPLES = 40
LOADER_KINDS = tuple(kind for kind in fuzz.shares() if kind not in fuzz.OPS)


@pytest.fixture(autouse=True)
def level_restored() -> Iterator[None]:
    """The fuzzer silences the loader; the tests after these shall hear it."""
    logger = logging.getLogger("aiter")
    level = logger.level
    yield
    logger.setLevel(level)


def judged(kind: str, inputs: int) -> set[str]:
    """What happened, in words, to the first inputs of a kind with seed 0."""
    with fuzz.judges(kind, default_device(), exact=False) as judge:
        return {judge(random.Random(f"0 {kind} {number}")) for number in range(inputs)}


@pytest.mark.parametrize("kind", LOADER_KINDS)
def test_a_slice_of_the_loaders_inputs_finds_nothing(kind: str) -> None:
    assert "accepted" in judged(kind, LOADER_INPUTS)


@pytest.mark.parametrize("kind", fuzz.OPS)
def test_a_slice_of_the_ops_inputs_finds_nothing(kind: str) -> None:
    assert judged(kind, OP_INPUTS) >= {"accepted", "ValueError", "TypeError"}


def test_shares_are_of_a_whole() -> None:
    assert sum(fuzz.shares().values()) == pytest.approx(1.0)
    assert set(fuzz.OPS) < set(fuzz.shares())


@pytest.fixture
def judges(tmp_path: Path) -> LoaderJudges:
    return LoaderJudges(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=6,
)


def test_any_json_is_a_config_or_a_config_error(judges: LoaderJudges) -> None:
    @settings(max_examples=EXAMPLES)
    @given(st.dictionaries(st.sampled_from(spec.SETTINGS) | st.text(), JSON))
    def judge(drawn: dict[str, Any]) -> None:
        judges.config_text(json.dumps({"module_fuzzed": drawn}))

    judge()


def test_any_text_is_a_config_or_a_config_error(judges: LoaderJudges) -> None:
    @settings(max_examples=EXAMPLES)
    @given(st.text())
    def judge(text: str) -> None:
        judges.config_text(text)

    judge()


def test_an_input_is_a_function_of_its_number(judges: LoaderJudges) -> None:
    first, again = (judges.draw_config(random.Random("0 config 7")) for _ in range(2))
    assert first == again != judges.draw_config(random.Random("0 config 8"))


def test_an_undocumented_exception_is_a_finding(
    judges: LoaderJudges, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise KeyError("srcs")

    monkeypatch.setattr(spec, "_checked", failing)
    with pytest.raises(KeyError):
        judges.config_text('{"module_fuzzed": {"srcs": []}}')


def _calls(kind: str) -> Any:
    """The judge of an op on the CPU, and numbers of inputs enough to meet what is wrong."""
    return Ops("cpu", exact=False).judge(kind), range(60)


WRONG = {
    "a result": (lambda a: a["load"].add_(1), r"load\[0\]: expected"),
    "a write in front": (
        lambda a: a["load"].as_strided((1,), (1,), a["load"].storage_offset() - 1).fill_(7),
        "written outside of load",
    ),
    "another exception": (lambda a: a["nothing"], "nothing"),
    "words without values": (lambda a: (_ for _ in ()).throw(ValueError("bad")), "not a sentence"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_op_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, (spoil, message) = fuzz_ops.expert_load, WRONG[what]

    def wrong(**arguments: Any) -> None:
        op(**arguments)
        spoil(arguments)

    monkeypatch.setattr(fuzz_ops, "expert_load", wrong)
    judge, numbers = _calls("expert_load")
    with pytest.raises((Mismatch, KeyError), match=message):
        for number in numbers:
            judge(random.Random(number))


def test_a_refusal_that_writes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    op = fuzz_ops.expert_load

    def wrong(**arguments: Any) -> None:
        try:
            op(**arguments)
        except ValueError:
            if hasattr(arguments["load"], "fill_"):
                arguments["load"].fill_(3)
            raise

    monkeypatch.setattr(fuzz_ops, "expert_load", wrong)
    judge, numbers = _calls("expert_load")
    with pytest.raises(Mismatch, match="load was written by a refused call"):
        for number in numbers:
            judge(random.Random(number))


def test_a_child_that_dies_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A made-up child that dies at input 3 of 5, and one that goes on behind it."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys\n"
        "mark, first, end = sys.argv[2], int(sys.argv[8]), int(sys.argv[10])\n"
        "for number in range(first, end):\n"
        "    open(mark, 'w').write(str(number))\n"
        "    if number == 3: os.abort()\n"
        "    print(json.dumps([0.1, {'accepted': 1}, [], number + 1]), flush=True)\n"
    )
    monkeypatch.setattr(fuzz, "__file__", str(child))
    monkeypatch.setattr(fuzz, "shares", lambda: {"config": 1.0})
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--inputs", "5"])
    assert fuzz.main() == 1
    printed = capsys.readouterr().out
    assert "accepted 4, ended the process 1" in printed
    assert "config 3: ended the process with status -6" in printed
