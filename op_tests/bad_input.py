"""How is a refusal checked? One wrong argument per :class:`Bad`, its message, and its innocence.

An error must be of the right type, name the argument, say what was expected and what came, and
leave every output as it was. The rows that the sorting ops share are built here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from buffers import Mismatch, require
from runners import Op, SortedOutputs
from targets import Target
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    """A change to valid arguments, and the words of the error that it must cause."""

    name: str
    change: Callable[[Arguments], Arguments]
    words: tuple[str, ...]
    kind: type[Exception] = ValueError

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


def check_refused(
    bad: Bad, op: Op, arguments: Arguments, outputs: SortedOutputs, target: Target
) -> None:
    """``op`` refuses the changed arguments as ``bad`` says and writes nothing."""
    changed = {**arguments, **bad.change(arguments)}
    try:
        with target.active():
            op(**changed)
    except Exception as error:
        require(
            type(error) is bad.kind,
            f"{bad.name}: expected {bad.kind.__name__}, got {type(error).__name__}: {error}",
        )
        for word in (*bad.words, "expected", "got"):
            require(
                re.search(word, str(error)) is not None,
                f"{bad.name}: expected an error that matches {word!r}, got: {error}",
            )
    else:
        raise Mismatch(f"{bad.name}: expected {bad.kind.__name__}, got no error")
    target.synchronize()
    for buffer in outputs.buffers:
        buffer.check_untouched()


def replaced(name: str, make: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    """Replace one argument by a function of its valid value."""
    return lambda arguments: {name: make(arguments[name])}


def constant(name: str, value: object) -> Callable[[Arguments], Arguments]:
    """Replace one argument by ``value``."""
    return lambda arguments: {name: value}


def computed(name: str, make: Callable[[Arguments], object]) -> Callable[[Arguments], Arguments]:
    """Replace one argument by a function of all valid arguments."""
    return lambda arguments: {name: make(arguments)}


def spread(tensor: Tensor) -> Tensor:
    """The same shape at twice the inner stride."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def another_device(tensor: Tensor) -> Tensor:
    """The tensor on the meta device, which has no memory to run on."""
    return tensor.to("meta")


def bad_tensor(name: str, wrong_dtype: torch.dtype) -> list[Bad]:
    """Mistakes that any tensor argument allows."""
    return [
        Bad(f"{name} is a list", replaced(name, lambda t: t.tolist()), (name, "list"), TypeError),
        Bad(f"{name} is None", replaced(name, lambda t: None), (name, "None"), TypeError),
        Bad(
            f"{name} has {wrong_dtype}",
            replaced(name, lambda t: t.to(wrong_dtype)),
            (name, str(wrong_dtype).removeprefix("torch.")),
        ),
        Bad(f"{name} on another device", replaced(name, another_device), (name, "meta")),
        Bad(f"{name} has one more dimension", replaced(name, lambda t: t[None]), (name,)),
        Bad(f"{name} has inner stride 2", replaced(name, spread), (name, "stride|contiguous")),
    ]


def bad_int(name: str, wrong_values: Iterable[int]) -> list[Bad]:
    """Mistakes that any int argument allows: these values, -1, and other types."""
    values = [
        Bad(f"{name} = {value}", constant(name, value), (name, str(value)))
        for value in (-1, *wrong_values)
    ]
    types = [
        Bad(
            f"{name} is a {type(value).__name__}",
            constant(name, value),
            (name, type(value).__name__),
            TypeError,
        )
        for value in (4.0, "4", None)
    ]
    return values + types


def _shorter(name: str) -> Bad:
    return Bad(f"{name} is one short", replaced(name, lambda t: t[:-1]), (name, r"\d"))


def _shared(first: str, second: str, make: Callable[[Arguments], Arguments]) -> Bad:
    return Bad(f"{first} overlaps {second}", make, (first, second, "overlap|share"))


def _touching(arguments: Arguments) -> Arguments:
    """``sorted_weights`` begins in the last element of ``sorted_ids``."""
    count = len(arguments["sorted_ids"])
    raw = torch.zeros(2 * count - 1, dtype=torch.int32, device=arguments["sorted_ids"].device)
    return {"sorted_ids": raw[:count], "sorted_weights": raw[count - 1 :].view(torch.float32)}


def sorted_buffer_mistakes(input_name: str) -> list[Bad]:
    """Mistakes in the five outputs, the mask and the token count of a sorting op.

    ``input_name`` is the op's f32 or i32 tensor argument of at least as many bytes as ``moe_buf``.
    """
    outputs = {
        "sorted_weights": torch.float16,
        "sorted_expert_ids": torch.int64,
        "num_valid_ids": torch.int64,
    }
    name = "moe_buf"
    return [
        *(bad for output, dtype in outputs.items() for bad in bad_tensor(output, dtype)),
        *(_shorter(output) for output in (*outputs, name)),
        Bad(f"{name} is a list", constant(name, [0]), (name, "list"), TypeError),
        Bad(f"{name} on another device", replaced(name, another_device), (name, "meta")),
        Bad(f"{name} is flat", replaced(name, torch.flatten), (name,)),
        Bad(f"{name} has inner stride 2", replaced(name, spread), (name, "stride|contiguous")),
        _shared("sorted_ids|sorted_weights", "sorted_weights|sorted_ids", _touching),
        _shared(
            "num_valid_ids",
            "sorted_expert_ids",
            computed("num_valid_ids", lambda arguments: arguments["sorted_expert_ids"][:2]),
        ),
        _shared(
            name,
            input_name,
            computed(name, lambda a: _bytes_of(a[input_name], len(a[name]))),
        ),
        *_mask_mistakes("local_expert_mask"),
        *_count_mistakes("num_local_tokens"),
    ]


def _bytes_of(tensor: Tensor, num_rows: int) -> Tensor:
    """The first bytes of ``tensor`` as rows of one."""
    return tensor.reshape(-1).view(torch.uint8)[:num_rows, None]


def _mask_mistakes(name: str) -> list[Bad]:
    makes: list[tuple[str, Callable[[Arguments], Tensor], str]] = [
        ("is one short", lambda a: ones(a, a["num_experts"] - 1), r"\d"),
        ("is one long", lambda a: ones(a, a["num_experts"] + 1), r"\d"),
        ("is int64", lambda a: ones(a, a["num_experts"]).long(), "int64"),
        ("is bool", lambda a: ones(a, a["num_experts"]).bool(), "bool"),
        ("is a matrix", lambda a: ones(a, a["num_experts"])[None], r"\d"),
        ("has stride 2", lambda a: ones(a, 2 * a["num_experts"])[::2], "stride|contiguous"),
        ("is on another device", lambda a: ones(a, a["num_experts"]).to("meta"), "meta"),
    ]
    wrong_type = Bad(f"{name} is a list", constant(name, [1]), (name, "list"), TypeError)
    return [wrong_type, *(Bad(f"{name} {m[0]}", computed(name, m[1]), (name, m[2])) for m in makes)]


def _count_mistakes(name: str) -> list[Bad]:
    makes: list[tuple[str, Callable[[Arguments], Tensor], str]] = [
        ("has two elements", lambda a: ones(a, 2), "2"),
        ("is empty", lambda a: ones(a, 0), "0"),
        ("is int64", lambda a: ones(a, 1).long(), "int64"),
        ("is on another device", lambda a: ones(a, 1).to("meta"), "meta"),
    ]
    wrong_type = Bad(f"{name} is an int", constant(name, 1), (name, "int"), TypeError)
    return [wrong_type, *(Bad(f"{name} {m[0]}", computed(name, m[1]), (name, m[2])) for m in makes)]


def ones(arguments: Arguments, length: int) -> Tensor:
    """An i32 vector on the op's device."""
    return torch.ones(length, dtype=torch.int32, device=arguments["moe_buf"].device)
