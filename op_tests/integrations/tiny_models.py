"""Which MoE models does the installed transformers have, and how is a small one of each made?

Families are found in the sources of transformers, not listed: a module of models counts when it has a
class of a MoE block. Sizes are given by the names that configurations use for them; `SPECIAL` has what a
family needs beside that. Weights are random and large enough for every step to matter.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 97
EXPERTS, TOPK = 8, 3
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), TOPK),
    **dict.fromkeys(("intermediate_size", "dense_intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim",
                     "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size",
                     "shared_experts_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "kv_channels"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim",), 16),
    "max_position_embeddings": 128, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 2, "num_expert_group": 2,
    "topk_group": 1, "routed_scaling_factor": 1.5,
    "zero_expert_num": 4, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    "sliding_window": 16, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16,
    "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 2, "linear_head_dim": 16,
    "mamba_d_state": 8, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32,
    "mamba_dt_rank": 4, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8,
    "mamba_n_groups": 1,
    "chunk_size": 16, "mamba_chunk_size": 16, "num_nextn_predict_layers": 0, "use_mamba_kernels": False,
}  # fmt: skip

OMITTED = object()
# Of a family: other values of its configuration.
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
         "longcat_flash", "mistral4", "mistral_large4"),
        {"head_dim": 8, "num_key_value_heads": 4},
    ),
    **dict.fromkeys(
        ("qwen3_5_moe", "qwen3_next", "qwen4_exp"),
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "axk2": {"head_dim": 8, "num_key_value_heads": 4, "n_group": None, "topk_group": None},
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"], "topk_method": "greedy"},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4, "topk_method": "group_limited_greedy"},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "diffusion_gemma": {"top_k_experts": 2},
    "doge": {"is_moe": True},
    "dots3_note": {"num_key_value_heads": 4, "head_dim": OMITTED},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [32, 24],
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                            "mrope_section": [2, 2, 4]}},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 97,
               "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                      "mrope_section": [1, 1, 2],
                                      "partial_rotary_factor": 0.5}},
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": OMITTED,
                   "mlp_layer_types": ["dense", "sparse"],
                   "layer_types": ["linear_attention", "indexed_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1,
              "expert_layer_offset": 0},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4,
                    "head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mistral4": {"head_dim": OMITTED, "num_key_value_heads": 4},
    "nemotron_h": {"n_groups": 1,
                   "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen4_exp": {"layer_types": ["linear_attention", "full_attention"], "indexer_n_heads": 2,
                  "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                  "indexer_compress_ratio": 4},
    "step3p7": {"mlp_layer_types": ["dense", "sparse"]},
    "unlimited_ocr": {"num_key_value_heads": 4},
    "vitpose_backbone": {**dict.fromkeys(SIZES, OMITTED), "num_experts": 2, "hidden_size": 32,
                        "num_attention_heads": 2,
                        "num_hidden_layers": 1, "image_size": [32, 32], "part_features": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

_BLOCK_NAME = re.compile(
    r"(MoE|(?<!Naive)Moe|MoA|SparseMoeBlock|SparseMoEBlock|MoELayer|SparseMLP)$"
)


@functools.cache
def block_classes() -> dict[str, list[str]]:
    """Classes of blocks with experts, by family: those that make `self.experts`, or are named so."""
    import transformers

    found: dict[str, list[str]] = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text()
        if "xperts" not in source and "MoE" not in source:
            continue
        blocks = []
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef):
                continue
            text = ast.get_source_segment(source, node) or ""
            if "self.experts = " in text or (
                _BLOCK_NAME.search(node.name) and "def forward" in text
            ):
                blocks.append(node.name)
        if blocks:
            found[path.parent.name] = blocks
    return found


def families() -> list[str]:
    """The families with MoE blocks; a family is a folder of transformers' models."""
    return list(block_classes())


def make_model(family: str) -> Any:
    """A small model of the family in float32: its causal model, or else the part that has the blocks."""
    model_class = _model_class(family)
    config = make_config(family, config_class(family))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and _is_weight(name):
                torch.nn.init.normal_(tensor, std=0.2)
            elif name.endswith("tid2eid"):  # of hash routers: distinct experts of every token
                tensor.copy_(
                    torch.rand(tensor.shape[0], EXPERTS).argsort(dim=1)[:, : tensor.shape[1]]
                )
    return model


def config_class(family: str) -> Any:
    """The configuration's class of what `make_model` makes."""
    return _model_class(family).config_class


def make_config(family: str, kind: type) -> Any:
    sizes = {**SIZES, **SPECIAL.get(family, {})}
    known = set(inspect.signature(kind).parameters)
    known |= {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    known |= set(SPECIAL.get(family, {}))
    return kind(**{k: v for k, v in sizes.items() if k in known and v is not OMITTED})


def _is_weight(name: str) -> bool:
    return not re.search(r"norm|A_log|inv_freq|dt_bias|tid2eid|\bD$|conv1d|slope|decay", name)


def _model_class(family: str) -> Any:
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = {
        name: kind
        for name, kind in vars(modeling).items()
        if inspect.isclass(kind) and kind.__module__ == modeling.__name__
        and getattr(kind, "config_class", None) is not None
    }  # fmt: skip
    for pattern in (
        r"ForCausalLM$",
        r"ForTokenClassification$",
        r"TextModel$",
        r"ForConditionalGeneration$",
        r"(?<!PreTrained)Model$",
        r"Backbone$",
    ):
        for name, kind in classes.items():
            if re.search(pattern, name):
                return kind
    raise LookupError(f"{modeling.__name__}: no model class among {', '.join(classes)}")
