"""Which MoE blocks of transformers are known, and how do their routers compute logits and choose?

Data, a row per class of block. A router of transformers computes logits, scores and top-k in one
forward; a `Router` says how to get the logits alone, bit for bit those of that forward, and by which
rule it goes on, read from the router's attributes. Every other block with experts is refused, because
a router that differs in one detail would give plausible and wrong tokens.

The classes are those of transformers 5.23. Where two families share a forward, they share a `Router`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.rule_config import Of, read_fields

ARGUMENT = "argument"
"""The correction bias is the second argument of the router's forward."""

Inputs = Literal["as they are", "f32", "f32 rows", "dtype of the weight"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Router:
    """What a router's forward computes, but for the choice of experts.

    Attributes:
        rule: the fields of its rule, read from its attributes; None where `rule_by` says.
        correction_bias: the attribute's name, ARGUMENT, or None for none.
        inputs: how hidden states and weight are cast before the product.
        linear: the submodule that makes the product, called as it is; "" for the router's own weight.
        weight, bias: names of the router's own.
        autocast: whether the product follows an autocast.
        then: what becomes of the product before it counts as logits.
        rule_by: from the router to the fields of its rule.
    """

    rule: Row | None
    correction_bias: str | None = None
    inputs: Inputs = "as they are"
    linear: str = ""
    weight: str = "weight"
    bias: str = ""
    autocast: bool = True
    then: Callable[[Any, Tensor], Tensor] | None = None
    rule_by: Callable[[Any], Row] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether logits are the product of the router's own weight, and nothing else."""
        return not self.linear and self.then in (None, _to_float)

    def fields(self, router: Any) -> Row:
        """The fields of the rule as the router's attributes are now."""
        row = self.rule
        if row is None and self.rule_by is not None:
            row = self.rule_by(router)
        return read_fields(row or {}, router)


@dataclass(frozen=True)
class Block:
    """A block's parts: the attribute and class of its router, the class of its `experts`."""

    router: str
    router_class: str
    experts_class: str
    spec: Router
    ids_class: str = ""  # a router that gives ids of its own: it keeps its forward


def _to_float(_: Any, logits: Tensor) -> Tensor:
    return logits.float()


def _soft_capped(router: Any, logits: Tensor) -> Tensor:
    logits, cap = logits.float(), router.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0.0 else logits


def _by_topk_method(router: Any) -> Row:
    row = {"need_renorm": False, "routed_scaling_factor": Of("routed_scaling_factor")}
    if router.topk_method == "greedy":
        return row
    if router.topk_method != "group_limited_greedy":
        raise ValueError(
            f"topk_method: expected 'greedy' or 'group_limited_greedy', got {router.topk_method!r}"
        )
    return {**row, **_GROUPS, "group_score": "max"}


def _one_group_only(router: Any) -> Row:
    if (router.num_group or 1) > 1:
        raise ValueError(
            "num_group: expected None or 1, as experts of the other groups keep a key of 0 there, got"
            f" {router.num_group}"
        )
    return {**_SIGMOID_GROUPS, "num_expert_group": 1, "topk_group": 1}


def _by_selection(router: Any) -> Row:
    if router.expert_selection_fn == "softmax":
        return {}
    if router.expert_selection_fn != "sigmoid":
        raise ValueError(
            f"expert_selection_fn: expected 'softmax' or 'sigmoid', got {router.expert_selection_fn!r}"
        )
    return {
        "scoring_func": "sigmoid", "select_on": "logit", "renorm_eps": 0.0,
        "need_renorm": Of("norm_topk_prob"),
    }  # fmt: skip


def _with_zero_experts(router: Any) -> Row:
    return {
        "need_renorm": False, "routed_scaling_factor": Of("routed_scaling_factor"),
        "num_zero_experts": router.n_routed_experts - router.num_experts,
    }  # fmt: skip


_SCORES = {
    "SqrtSoftplusActivation": "sqrtsoftplus",
    "Sigmoid": "sigmoid",
    "SigmoidActivation": "sigmoid",
}


def _by_score(router: Any) -> Row:
    kind = type(router.score_fn).__name__
    if kind not in _SCORES:
        raise ValueError(f"score_fn: expected one of {', '.join(_SCORES)}, got {kind}")
    return {"scoring_func": _SCORES[kind], "routed_scaling_factor": Of("routed_scaling_factor")}


_GROUPS = {"num_expert_group": Of("num_group", 1), "topk_group": Of("topk_group", 1)}
_SIGMOID_GROUPS: Row = {
    **_GROUPS, "scoring_func": "sigmoid", "group_score": "top2",
    "need_renorm": Of("norm_topk_prob"), "routed_scaling_factor": Of("routed_scaling_factor"),
}  # fmt: skip
_TOP2_GROUPS: Row = {
    **_GROUPS, "group_score": "top2", "renorm_eps": 1e-20,
    "routed_scaling_factor": Of("routed_scaling_factor"),
}  # fmt: skip
_SIGMOID: Row = {"scoring_func": "sigmoid"}
_SIGMOID_NO_EPS: Row = {"scoring_func": "sigmoid", "renorm_eps": 0.0}
_BUFFER = "e_score_correction_bias"

PLAIN = Router({})
PLAIN_F32 = Router({}, then=_to_float)
RENORM_ASKED = Router({"need_renorm": Of("norm_topk_prob")})
GROUPED = Router(_SIGMOID_GROUPS, _BUFFER, "f32")
DEEPSEEK_V2 = Router(None, inputs="f32", rule_by=_by_topk_method)
BY_SCORE = Router(None, _BUFFER, rule_by=_by_score)
ERNIE = Router(
    {"renorm_min": Of("norm_min")}, "moe_statics.e_score_correction_bias", "f32", autocast=False
)
ROUTER_SCALED = Router(
    {**_SIGMOID, "routed_scaling_factor": Of("router_scaling_factor")}, ARGUMENT, "f32"
)
MINIMAX_M3 = Router(_SIGMOID_NO_EPS, _BUFFER, "dtype of the weight")

BLOCKS: dict[str, Block] = {
    "AfmoeSparseMoeBlock": Block("router", "AfmoeTokenChoiceRouter", "AfmoeExperts", Router(
        {**_SIGMOID, "routed_scaling_factor": Of("route_scale")}, ARGUMENT, linear="gate",
        then=_to_float,
    )),
    "AriaTextMoELayer": Block("router", "AriaTextTopKRouter", "AriaExperts", PLAIN),
    "AXK1MoE": Block("gate", "AXK1TopkRouter", "AXK1Experts", GROUPED),
    "AXK2MoE": Block("gate", "AXK2TopkRouter", "AXK2Experts", Router(
        None, _BUFFER, "f32", rule_by=_one_group_only,
    )),
    "BailingHybridMoE": Block("gate", "BailingHybridTopkRouter", "BailingHybridExperts", GROUPED),
    "BeamMoE": Block("gate", "BeamTopKRouter", "BeamExperts", Router(
        {**_SIGMOID_GROUPS, "routed_scaling_factor": 1.0}, _BUFFER, "f32",
    )),
    "Cohere2MoeSparseMoeBlock": Block(
        "gate", "Cohere2MoeTopKRouter", "Cohere2MoeExperts", Router(None, rule_by=_by_selection)
    ),
    "DeepseekOcr2TextMoe": Block(
        "gate", "DeepseekOcr2TextTopkRouter", "DeepseekOcr2TextExperts", DEEPSEEK_V2
    ),
    "DeepseekV2Moe": Block("gate", "DeepseekV2TopkRouter", "DeepseekV2Experts", DEEPSEEK_V2),
    "DeepseekV3MoE": Block("gate", "DeepseekV3TopkRouter", "DeepseekV3Experts", GROUPED),
    "DeepseekV32MoE": Block("gate", "DeepseekV32TopkRouter", "DeepseekV32Experts", GROUPED),
    "DeepseekV4SparseMoeBlock": Block(
        "gate", "DeepseekV4TopKRouter", "DeepseekV4Experts", BY_SCORE, ids_class="DeepseekV4HashRouter"
    ),
    "Dots1MoE": Block("gate", "Dots1TopkRouter", "Dots1Experts", GROUPED),
    "Dots3NoteTextMoE": Block("gate", "Dots3NoteTextTopkRouter", "Dots3NoteExperts", GROUPED),
    "Dots3NoteVisionMoE": Block(
        "gate", "Dots3NoteVisionTopKRouter", "Dots3NoteExperts", ROUTER_SCALED
    ),
    "Ernie4_5_MoeSparseMoeBlock": Block(
        "gate", "Ernie4_5_MoeTopKRouter", "Ernie4_5_MoeExperts", ERNIE
    ),
    "Ernie4_5_VLMoeSparseMoeBlock": Block(
        "gate", "Ernie4_5_VLMoeMoeTopKRouter", "Ernie4_5_VLMoeMoeExperts", ERNIE
    ),
    "ExaoneMoeSparseMoEBlock": Block("gate", "ExaoneMoeTopkRouter", "ExaoneMoeExperts", GROUPED),
    "FlexOlmoSparseMoeBlock": Block(
        "gate", "FlexOlmoTopKRouter", "FlexOlmoExperts", RENORM_ASKED
    ),
    "FlintSparseMoeBlock": Block("gate", "FlintTopKRouter", "FlintExperts", Router(
        {**_SIGMOID_NO_EPS, "need_renorm": Of("norm_topk_prob")}, inputs="f32", autocast=False,
    )),
    "Glm4MoeLiteMoE": Block("gate", "Glm4MoeLiteTopkRouter", "Glm4MoeLiteExperts", GROUPED),
    "Glm4MoeMoE": Block("gate", "Glm4MoeTopkRouter", "Glm4MoeExperts", GROUPED),
    "Glm4vMoeTextMoE": Block("gate", "Glm4vMoeTextTopkRouter", "Glm4vMoeTextExperts", GROUPED),
    "Glm5NextTextMoE": Block("gate", "Glm5NextTextTopkRouter", "Glm5NextTextExperts", GROUPED),
    "GlmMoeDsaMoE": Block("gate", "GlmMoeDsaTopkRouter", "GlmMoeDsaExperts", GROUPED),
    "GptOssMLP": Block("router", "GptOssTopKRouter", "GptOssExperts", Router({}, bias="bias")),
    "GraniteMoeHybridMoE": Block(
        "router", "GraniteMoeHybridTopKRouter", "GraniteMoeHybridExperts", PLAIN_F32
    ),
    "GraniteMoeMoE": Block("router", "GraniteMoeTopKRouter", "GraniteMoeExperts", PLAIN_F32),
    "GraniteMoeSWAMoE": Block(
        "router", "GraniteMoeSWATopKRouter", "GraniteMoeSWAExperts", PLAIN_F32
    ),
    "GraniteMoeSharedMoE": Block(
        "router", "GraniteMoeSharedTopKRouter", "GraniteMoeSharedExperts", PLAIN_F32
    ),
    "HYV3MoE": Block("gate", "HYV3TopKRouter", "HYV3Experts", ROUTER_SCALED),
    "HYV4MoE": Block("gate", "HYV4TopkRouter", "HYV4Experts", GROUPED),
    "HunYuanMoEV1Moe": Block("gate", "HunYuanMoEV1Gate", "HunYuanMoEV1Experts", Router(
        {}, inputs="dtype of the weight", linear="wg",
    )),
    "Inkling2SparseMoeBlock": Block("gate", "Inkling2TopKRouter", "Inkling2Experts", Router(
        None, _BUFFER, "f32 rows", rule_by=_by_score,
    )),
    "JambaSparseMoeBlock": Block(
        "router", "JambaTopKRouter", "JambaExperts", Router({"need_renorm": False})
    ),
    "KimiLinearMoE": Block("gate", "KimiLinearTopkRouter", "KimiLinearExperts", GROUPED),
    "LagunaSparseMoeBlock": Block("gate", "LagunaTopKRouter", "LagunaExperts", Router(
        _SIGMOID_NO_EPS, _BUFFER, then=_soft_capped,
    )),
    "Lfm2MoeSparseMoeBlock": Block("gate", "Lfm2MoeTopKRouter", "Lfm2MoeExperts", Router(
        {
            **_SIGMOID, "renorm_eps": 1e-6, "need_renorm": Of("norm_topk_prob"),
            "routed_scaling_factor": Of("routed_scaling_factor"),
        },
        ARGUMENT,
    )),
    "LongcatFlashMoE": Block("router", "LongcatFlashTopkRouter", "LongcatFlashExperts", Router(
        None, _BUFFER, "f32", weight="classifier.weight", rule_by=_with_zero_experts,
    )),
    "MellumSparseMoeBlock": Block("gate", "MellumTopKRouter", "MellumExperts", RENORM_ASKED),
    "MiMoV2FlashMoE": Block("gate", "MiMoV2FlashTopkRouter", "MiMoV2FlashExperts", GROUPED),
    "MiniMaxM2SparseMoeBlock": Block("gate", "MiniMaxM2TopKRouter", "MiniMaxM2Experts", Router(
        _SIGMOID_NO_EPS, ARGUMENT, "dtype of the weight",
    )),
    "MiniMaxM3VLSparseMoeBlock": Block(
        "gate", "MiniMaxM3VLTopKRouter", "MiniMaxM3VLExperts", MINIMAX_M3
    ),
    "MiniMaxSparseMoeBlock": Block("gate", "MiniMaxTopKRouter", "MiniMaxExperts", PLAIN),
    "Mistral4MoE": Block("gate", "Mistral4TopkRouter", "Mistral4Experts", Router(
        {**_TOP2_GROUPS, "need_renorm": Of("norm_topk_prob")},
    )),
    "MistralLarge4TextMoE": Block(
        "gate", "MistralLarge4TextTopkRouter", "MistralLarge4TextExperts",
        Router(_TOP2_GROUPS, inputs="f32"),
    ),
    "MixtralSparseMoeBlock": Block("gate", "MixtralTopKRouter", "MixtralExperts", PLAIN),
    "NemotronHMoE": Block("gate", "NemotronHTopkRouter", "NemotronHExperts", GROUPED),
    "OlmoeSparseMoeBlock": Block("gate", "OlmoeTopKRouter", "OlmoeExperts", RENORM_ASKED),
    "OpenAIPrivacyFilterMLP": Block(
        "router", "OpenAIPrivacyFilterTopKRouter", "OpenAIPrivacyFilterExperts",
        Router({"routed_scaling_factor": Of("top_k", inverse=True)}, inputs="f32", bias="bias"),
    ),
    "Qwen2MoeSparseMoeBlock": Block(
        "gate", "Qwen2MoeTopKRouter", "Qwen2MoeExperts", RENORM_ASKED
    ),
    "Qwen3_5MoeSparseMoeBlock": Block("gate", "Qwen3_5MoeTopKRouter", "Qwen3_5MoeExperts", PLAIN),
    "Qwen3MoeSparseMoeBlock": Block(
        "gate", "Qwen3MoeTopKRouter", "Qwen3MoeExperts", RENORM_ASKED
    ),
    "Qwen3NextSparseMoeBlock": Block(
        "gate", "Qwen3NextTopKRouter", "Qwen3NextExperts", RENORM_ASKED
    ),
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": Block(
        "gate", "Qwen3OmniMoeTalkerTextTopKRouter", "Qwen3OmniMoeTalkerTextExperts", RENORM_ASKED
    ),
    "Qwen3OmniMoeThinkerTextSparseMoeBlock": Block(
        "gate", "Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3OmniMoeThinkerTextExperts", RENORM_ASKED
    ),
    "Qwen3VLMoeTextSparseMoeBlock": Block(
        "gate", "Qwen3VLMoeTextTopKRouter", "Qwen3VLMoeTextExperts", PLAIN
    ),
    "Qwen4ExpTextSparseMoeBlock": Block(
        "gate", "Qwen4ExpTextTopKRouter", "Qwen4ExpTextExperts", RENORM_ASKED
    ),
    "SolarOpenMoE": Block("gate", "SolarOpenTopkRouter", "SolarOpenExperts", GROUPED),
    "Step3p7SparseMoeBlock": Block("gate", "Step3p7TopKRouter", "Step3p7Experts", MINIMAX_M3),
    "UnlimitedOcrTextMoe": Block(
        "gate", "UnlimitedOcrTextTopkRouter", "UnlimitedOcrTextExperts", DEEPSEEK_V2
    ),
}  # fmt: skip
"""The blocks that `use_aiter` takes, by the name of their class in transformers."""

ROUTERS = {block.router_class: block.spec for block in BLOCKS.values()}

IN_F32 = ("OpenAIPrivacyFilterExperts",)
"""Experts whose products are in float32 whatever the dtype of the weights."""

REFUSED: dict[str, str] = {
    "DbrxFFN": "its weights are divided by a norm of any order",
    "DiffusionGemmaDecoderTextLayer": "its weights are multiplied by a learned scale per expert",
    "DiffusionGemmaEncoderTextLayer": "its weights are multiplied by a learned scale per expert",
    "DogeCDMoE": "its experts are the pairs of two top-k of keys",
    "Gemma4TextDecoderLayer": "its weights are multiplied by a learned scale per expert",
    "InklingMoE": "its routed and shared experts are renormalised together",
    "JetMoeAttention": "its experts are projections of an attention",
    "JetMoeMoA": "its experts are projections of an attention",
    "JetMoeMoE": "its experts are two lists of products, with a bias behind their sum",
    "Kolibri1SparseMoeBlock": "its correction bias is added to the logits",
    "Llama4TextMoe": "its weight multiplies an expert's input, not its output",
    "MuseSparkMoE": "it normalises what every expert returns",
    "NllbMoeSparseMLP": "its experts have a capacity, by which tokens are dropped",
    "PhimoeSparseMoeBlock": "it routes by sparsemixer",
    "SwitchTransformersSparseMLP": "its experts have a capacity, by which tokens are dropped",
    "VitPoseBackboneMoeMLP": "its expert is given by the data set, not chosen",
    "ZayaSparseMoeBlock": "its router has a state from layer to layer, and may skip every expert",
}
"""Why a block of this class is refused; one that is in neither table has a router that is not known."""
