"""Runs SGLang's engine on the CPU once, in its own environment, and prints what it generated as JSON.

    python sglang_engine.py MODEL FOLDER OPTIONS

MODEL is a key of CONFIGS, whose checkpoint of random weights is made in FOLDER if it is not there;
OPTIONS is a JSON object of further arguments of the engine. `.ci/sglang` sets the environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "Glm4Moe": {
        "n_routed_experts": 16, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 0,
    },
    "GptOss": {
        "num_local_experts": 8, "intermediate_size": 32, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [250, 3, 77]]  # of different length
NEW_TOKENS = 8


def make_checkpoint(name: str, folder: Path) -> None:
    """A tiny model of random weights, the bias of its choice among them."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | CONFIGS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, tensor in model.state_dict().items():
        if parameter_name.endswith("e_score_correction_bias"):
            tensor.uniform_(-0.2, 0.2)
        elif parameter_name.endswith("bias") and "experts" in parameter_name:
            tensor.normal_(std=0.1)
    model.save_pretrained(folder)


def allow_plain_attention() -> None:
    """Lets gpt-oss start with PyTorch's attention, which has no sinks and so makes odd tokens.

    Its layers get hidden states and logits all the same, and only they are compared.
    """
    from sglang.srt.arg_groups import model_hook

    model_hook.attention_backends_of = lambda view: ("triton", "triton")


def main() -> None:
    name, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if not folder.exists():
        make_checkpoint(name, folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    if options is None:
        return
    import sglang

    arguments = {
        "model_path": str(folder), "device": "cpu", "skip_tokenizer_init": True, "dtype": "float32",
        "attention_backend": "torch_native", "sampling_backend": "pytorch",
        "grammar_backend": "none", "disable_cuda_graph": True, "max_total_tokens": 256,
        "context_length": 128, "log_level": "info",
    }  # fmt: skip
    if name == "GptOss":
        allow_plain_attention()
    engine = sglang.Engine(**arguments | options)
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    outputs = engine.generate(input_ids=PROMPTS, sampling_params=sampling, return_logprob=True)
    result = {
        "tokens": [output["output_ids"] for output in outputs],
        "logprobs": [
            [value for value, *_ in output["meta_info"]["output_token_logprobs"]]
            for output in outputs
        ],
    }
    print("RESULT " + json.dumps(result), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
