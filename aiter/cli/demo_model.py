"""What does the layer do in a real model? A small transformers model generates, with and without it.

The architecture is the model's own, the weights are random and small, and nothing is downloaded.
The untouched model generates greedily first, then the same model under `use_aiter`: the tokens have
to be equal. Every MoE block's calls are counted by the routing path that they took.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers import Patched, use_aiter
from ..jit import cpu_wave
from ..ops.device import current_device
from .options import (
    MOST_SEED,
    MOST_TOKENS,
    MOST_TOPK,
    PROGRAM,
    Parser,
    add_device,
    add_wave,
    check_memory,
    check_topk,
    whole,
)
from .table import format_table

VOCABULARY = 4096
_QWEN_SIZES = ("num_experts", "moe_intermediate_size")
_OTHER_SIZES = ("num_local_experts", "intermediate_size")
MODELS: dict[str, tuple[str, tuple[str, str]]] = {
    "deepseek-v3": ("DeepseekV3", ("n_routed_experts", "moe_intermediate_size")),
    "gpt-oss": ("GptOss", _OTHER_SIZES),
    "mixtral": ("Mixtral", _OTHER_SIZES),
    "qwen3-moe": ("Qwen3Moe", _QWEN_SIZES),
    "qwen3-next": ("Qwen3Next", _QWEN_SIZES),
}
"""Prefix of the classes in transformers; its config's names of E and of the experts' width."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HEADS = {"num_key_value_heads": 2, "head_dim": 32}
_WEIGHT_STD = 0.2  # large enough for every step to matter, and for distinct logits


def main(argv: Sequence[str]) -> int:
    """Runs the demo; 0 if the tokens are equal, 1 if not or if transformers is not there."""
    parser = make_parser()
    options = parser.parse_args(argv)
    check_topk(parser, options.topk, options.experts)
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        print(
            f"error: transformers: expected it to be installed for --model {options.model}, got"
            f" {error}; install it with: pip install -c constraints.txt -e '.[models]'",
            file=sys.stderr,
        )
        return 1
    device = current_device(options.device)
    check_memory(parser, _bytes_of(options), device)
    on_cpu = device.type == "cpu"
    where = f"cpu target, wave {options.wave}" if on_cpu else torch.cuda.get_device_name(device)
    model = _make_model(transformers, options).to(device=device, dtype=_DTYPES[options.dtype])
    print(
        f"{options.model} with random weights: {options.layers} layers, E={options.experts}"
        f" K={options.topk} D={options.model_dim}, expert width {options.width}, {options.dtype},"
        f" {where}, transformers {transformers.__version__}, seed {options.seed}"
    )
    prompt = torch.randint(0, VOCABULARY, (options.sequences, options.prompt)).to(device)
    expected = _generate(model, prompt, options.steps)
    with cpu_wave(options.wave) if on_cpu else nullcontext(), use_aiter(model) as patched:
        calls = _count_paths(model, patched)
        got = _generate(model, prompt, options.steps)
        print("\n" + _layer_table(model, calls, patched))
    return _report(expected, got)


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(f"{PROGRAM} demo --model MODEL", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", choices=MODELS, required=True, help="the architecture")
    add_device(parser)
    add_wave(parser)
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the weights")
    parser.add_argument(
        "--sequences", type=whole(1, MOST_TOKENS), default=2, help="generated at once"
    )
    parser.add_argument(
        "--prompt", type=whole(1, MOST_TOKENS), default=12, help="tokens in a sequence's prompt"
    )
    parser.add_argument("--steps", type=whole(1), default=16, help="tokens generated per sequence")
    parser.add_argument("--layers", type=whole(1, 10_000), default=4, help="decoder layers")
    parser.add_argument("--experts", type=whole(1), default=32, help="experts (E)")
    parser.add_argument("--topk", type=whole(1, MOST_TOPK), default=4, help="experts per token (K)")
    parser.add_argument("--model-dim", type=whole(1), default=256, help="hidden size (D)")
    parser.add_argument("--width", type=whole(1), default=128, help="width of an expert")
    parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0, help="of weights and tokens")
    return parser


def _bytes_of(options: argparse.Namespace) -> int:
    """About what weights and activations take, in float32."""
    per_layer = options.experts * 3 * options.width + options.experts + 512
    rows = options.sequences * (options.prompt + options.steps)
    return 4 * int(
        options.model_dim * (options.layers * per_layer + 2 * VOCABULARY) + rows * options.model_dim
    )


def _make_model(transformers: Any, options: argparse.Namespace) -> Any:
    prefix, (experts, width) = MODELS[options.model]
    special = _deepseek_sizes(options) if options.model == "deepseek-v3" else _HEADS
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=VOCABULARY,
        hidden_size=options.model_dim,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_experts_per_tok=options.topk,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{experts: options.experts, width: options.width, **special},
    )
    torch.manual_seed(options.seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=_WEIGHT_STD)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            torch.nn.init.normal_(buffer, std=_WEIGHT_STD)
    return model


def _deepseek_sizes(options: argparse.Namespace) -> dict[str, int]:
    """One dense layer, then as many groups, half of them to stay, as leave K experts to choose."""
    groups = 8
    while groups > 1 and (
        options.experts % groups
        or options.experts < 2 * groups
        or options.topk > options.experts // 2
    ):
        groups //= 2
    return {
        "n_group": groups,
        "topk_group": max(1, groups // 2),
        "first_k_dense_replace": min(1, options.layers - 1),
        "intermediate_size": 2 * options.width,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    }


def _generate(model: Any, prompt: Tensor, steps: int) -> Tensor:
    """The new tokens [sequences, steps], greedily."""
    whole = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False
    )
    new: Tensor = whole[:, prompt.shape[1] :].cpu()
    return new


def _count_paths(model: Any, patched: Patched) -> dict[str, Counter[str]]:
    """Counts every block's calls by path, from now on."""
    calls: dict[str, Counter[str]] = {name: Counter() for name in patched.layers}

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: calls[name].update([str(patched.paths[name])])

    for name in patched.layers:
        model.get_submodule(name).register_forward_hook(counter(name))
    return calls


def _layer_table(model: Any, calls: dict[str, Counter[str]], patched: Patched) -> str:
    backends = patched.backends
    rows: list[tuple[str, str, str]] = []
    for name, _ in model.named_modules():
        if name in calls:
            paths = ", ".join(f"{path}: {n} calls" for path, n in calls[name].items())
            rows.append((name, paths, backends[name]))
        elif re.fullmatch(r"model\.layers\.\d+\.mlp", name):
            rows.append((name, "no experts", ""))
    return format_table(("layer", "routing path", "expert products"), rows)


def _report(expected: Tensor, got: Tensor) -> int:
    print(f"\nfirst sequence: {' '.join(map(str, got[0].tolist()))}")
    same = int((expected == got).sum())
    print(f"tokens equal to the untouched model's: {same} of {expected.numel()}")
    if same == expected.numel():
        return 0
    sequence, step = (expected != got).nonzero()[0].tolist()
    print(
        f"MISMATCH: sequence {sequence}, step {step}: expected token"
        f" {int(expected[sequence, step])}, got {int(got[sequence, step])}",
        file=sys.stderr,
    )
    return 1
