"""Is every MoE model of transformers either taken, and right, or refused in a sentence?

All families of the installed transformers that have a block with experts, each with a small random
model. A model that is taken has to give the untouched model's logits and greedy tokens, and to be
restored bit for bit. docs/models.md has the table; `python op_tests/integrations/test_models.py --write`
writes it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _checkout  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402

from aiter import RoutingRule  # noqa: E402
from aiter.integrations.blocks import BLOCKS, REFUSED  # noqa: E402
from aiter.integrations.forwards import rule_of  # noqa: E402
from aiter.integrations.transformers import use_aiter  # noqa: E402

transformers = pytest.importorskip("transformers")
import tiny_models as tiny  # noqa: E402

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
VERSION = "5.23"  # of transformers, whose table is in docs/models.md
# float32; the experts' sums run in another order, and two layers pass it on.
TOLERANCE = 1e-5
# Blocks of other blocks, and what only the name takes for one.
CONTAINERS = {"Ernie4_5_VLMoeMoeBlock"}


def blocks_of(family: str) -> list[str]:
    return [name for name in tiny.block_classes()[family] if name not in CONTAINERS]


def is_taken(family: str) -> bool:
    return all(name in BLOCKS for name in blocks_of(family))


@pytest.mark.parametrize("family", tiny.families())
def test_every_block_is_in_a_table(family: str) -> None:
    unknown = [name for name in blocks_of(family) if name not in BLOCKS and name not in REFUSED]
    assert not unknown, f"{unknown}: in neither of the tables of aiter/integrations/blocks.py"


def outputs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    result = model(tokens)
    found: torch.Tensor = result.logits if hasattr(result, "logits") else result[0]
    return found


def greedy(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Four new tokens; None for a model that does not generate."""
    if not type(model).__name__.endswith("ForCausalLM"):
        return None
    found: torch.Tensor = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False
    )
    return found


def taken_model(family: str) -> Any:
    """A small model; skips where another version of transformers builds its blocks of other parts."""
    try:
        model = tiny.make_model(family)
        use_aiter(model).remove()
    except Exception as error:
        if transformers.__version__.startswith(VERSION):
            raise
        pytest.skip(f"refused with transformers {transformers.__version__}: {error}")
    return model


@pytest.mark.parametrize("family", [name for name in tiny.families() if is_taken(name)])
def test_taken_models_compute_the_same(family: str) -> None:
    model = taken_model(family)
    tokens = torch.randint(2, tiny.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, plain_tokens = outputs(model, tokens), greedy(model, tokens)
        with use_aiter(model) as patched:
            got, got_tokens = outputs(model, tokens), greedy(model, tokens)
            called = [path for path in patched.paths.values() if path is not None]
            assert called, f"no block of {patched.layers} was called"
            check_rules(model, patched.layers)
        after = outputs(model, tokens)
    scale = plain.abs().max().item()
    assert 0 < scale < float("inf")
    assert (got - plain).abs().max().item() <= TOLERANCE * scale
    assert plain_tokens is None or torch.equal(got_tokens, plain_tokens)
    assert torch.equal(after, plain)


def check_rules(model: Any, layers: list[str]) -> None:
    """The routers' rules are those of the configuration; what they apply to logits themselves is not."""
    expected = RoutingRule.from_config(model.config)
    expected = replace(expected, softcap=0.0, logit_scale=1.0)
    for name in layers:
        block = model.get_submodule(name)
        known = BLOCKS[type(block).__name__]
        router = getattr(block, known.router)
        if type(router).__name__ == known.router_class:
            assert rule_of(known.spec, router) == expected


@pytest.mark.parametrize("family", [name for name in tiny.families() if not is_taken(name)])
def test_refused_models_are_refused_by_name(family: str) -> None:
    model = tiny.make_model(family)
    with pytest.raises(ValueError, match=r"expected a MoE block .*, got \w+: its? ") as error:
        use_aiter(model)
    assert any(name in str(error.value) for name in blocks_of(family))
    assert not any("_aiter_mark" in vars(module) for module in model.modules())


def row_of(family: str) -> str:
    """The family's line in the table."""
    names = blocks_of(family)
    refused = sorted({REFUSED[name] for name in names if name in REFUSED})
    if refused:
        return f"| {family} | {', '.join(names)} | refused: {'; '.join(refused)} | |"
    rule = RoutingRule.from_config(tiny.config_class(family)())
    biased = any(BLOCKS[name].spec.correction_bias for name in names)
    return f"| {family} | {', '.join(names)} | {described(rule)} | {'yes' if biased else ''} |"


def described(rule: RoutingRule) -> str:
    """The fields of a rule that differ from a plain one's."""
    plain = RoutingRule()
    changed = [
        f"{field.name}={getattr(rule, field.name)!r}"
        for field in fields(rule)
        if getattr(rule, field.name) != getattr(plain, field.name)
    ]
    return f"`{', '.join(changed)}`" if changed else "plain softmax"


def table() -> list[str]:
    head = [
        "| family | blocks | rule of the default configuration | correction bias |",
        "|---|---|---|---|",
    ]
    return head + [row_of(family) for family in tiny.families()]


def test_the_documents_have_the_table() -> None:
    if not transformers.__version__.startswith(VERSION):
        pytest.skip(
            f"the table is of transformers {VERSION}, installed is {transformers.__version__}"
        )
    lines = TABLE.read_text().splitlines()
    missing = [line for line in table() if line not in lines]
    assert not missing, f"run python {Path(__file__).name} --write: {missing[:3]}"


def write_table() -> None:
    lines = TABLE.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| family |"))
    last = first
    while last < len(lines) and lines[last].startswith("|"):
        last += 1
    TABLE.write_text("\n".join(lines[:first] + table() + lines[last:]) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table of docs/models.md")
    if parser.parse_args().write:
        write_table()
    else:
        raise SystemExit(pytest.main([__file__, "-q"]))
