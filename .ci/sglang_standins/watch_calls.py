"""A second plugin of SGLang's, for tests: writes down what ours did in every call of a MoE layer.

A JSON line per call goes to the file WATCH_CALLS, as SGLang kills the process that has the layers. It
says whether the layer got logits or ids, how often a launch of ours was made, by which path, and how
far the output lies from SGLang's own plain loop on the same input, relative to its largest value.

WATCH_TRITON=1 puts the products of the GPU, SGLang's Triton experts on flat ids, in place of those of
the CPU, to be interpreted (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from typing import Any


def register() -> None:
    """Wraps our runner in this process."""
    name = os.environ["WATCH_NAME"]
    runner = importlib.import_module(f"{name}.integrations.sglang_runner")
    if os.environ.get("WATCH_TRITON") == "1":
        runner._PRODUCTS["own"] = runner._triton
        # NOTE: SGLang's own are files by the name of the GPU.
        sizes = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1}
        experts = importlib.import_module("sglang.srt.layers.moe.moe_runner.triton_utils")
        experts._config = sizes
    _take_sinks()
    known = importlib.import_module(f"{name}.routing.known")
    launches: list[str] = []
    for function in ("fused_moe", "fused_moe_from_logits", "topk_routing_sorting"):
        setattr(runner, function, _counted(getattr(runner, function), known, launches))
    original = runner.Runner.run_from_dispatch

    def run_from_dispatch(
        self: Any, dispatch_output: Any, quant_info: Any, *more: Any, **by_name: Any
    ) -> Any:
        choice = dispatch_output.topk_output
        hidden = dispatch_output.hidden_states.clone()
        launches.clear()
        out = original(self, dispatch_output, quant_info, *more, **by_name)
        line = {
            "layer": self.config.layer_id,
            "rank": self.config.layer.moe_ep_rank if self.config.layer.moe_ep_size > 1 else 0,
            "tokens": hidden.shape[0],
            "got": type(choice).__name__,
            "launches": [path for path in launches if path is not None],
            "error": _error(self, hidden, choice, out.hidden_states),
        }
        with open(os.environ["WATCH_CALLS"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return out

    runner.Runner.run_from_dispatch = run_from_dispatch


def _take_sinks() -> None:
    """Lets gpt-oss's attention sinks be handed to PyTorch's attention, which leaves them out."""
    attention = importlib.import_module("sglang.srt.layers.attention.torch_native_backend")
    for name in ("forward_extend", "forward_decode"):
        original = getattr(attention.TorchNativeAttnBackend, name)

        def without(self: Any, *arguments: Any, _original: Any = original, **by_name: Any) -> Any:
            by_name.pop("sinks", None)
            return _original(self, *arguments, **by_name)

        setattr(attention.TorchNativeAttnBackend, name, without)


def _counted(function: Any, known: Any, launches: list[str]) -> Any:
    def counted(*arguments: Any, **by_name: Any) -> Any:
        out = function(*arguments, **by_name)
        launches.append(known.last_path())
        return out

    return counted


def _error(runner: Any, hidden: Any, choice: Any, out: Any) -> float:
    """How far `out` is from a sum over the experts of this rank, by SGLang's own weights and ids."""
    import torch

    layer, config = runner.config.layer, runner.config
    if hasattr(choice, "to_standard"):
        # NOTE: the GPU's choice, which is what a bypassed one becomes unasked, has no kernels here.
        native = dataclasses.replace(choice.topk_config, torch_native=True)
        choice = choice._replace(topk_config=native).to_standard()
        ids = choice.topk_ids - layer.moe_ep_rank * layer.num_local_experts * (
            layer.moe_ep_size > 1
        )
    else:
        ids = choice.topk_ids
    loop = importlib.import_module("sglang.srt.layers.moe.fused_moe_native")
    activations = importlib.import_module("sglang.srt.layers.activation")
    act = activations.SiluAndMul()
    wanted = torch.zeros(hidden.shape, dtype=torch.float32)
    for token in range(hidden.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if not 0 <= expert < layer.num_local_experts:
                continue
            h = hidden[token].float() @ layer.w13_weight[expert].float().T
            if hasattr(layer, "w13_weight_bias"):
                h = h + layer.w13_weight_bias[expert].float()
            if config.gemm1_alpha is None:
                h = act.forward_native(h)
            else:
                h = loop.swiglu_gpt_oss_sigmoid_alpha(
                    h, config.gemm1_alpha, config.gemm1_clamp_limit
                )
            y = h @ layer.w2_weight[expert].float().T
            if hasattr(layer, "w2_weight_bias"):
                y = y + layer.w2_weight_bias[expert].float()
            wanted[token] += choice.topk_weights[token, slot] * y
    return float((out.float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
