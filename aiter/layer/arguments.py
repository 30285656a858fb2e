"""Which calls of `fused_moe` can be computed? Every other one is refused here, in a sentence.

Checked before anything is launched. What the routing ops check themselves (dtypes, shapes and
devices of ids, weights, logits, mask and `num_local_tokens`) is left to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing.arguments import check_bool, check_int, check_number, check_strided
from ..routing.autograd import checked
from ..routing.tracing import traced
from .experts import BACKENDS, grouped_mm_problem, triton_problem
from .parts import Experts
from .types import ActivationType, QuantType

GATE_MODES = {"separated": False, "interleave": True, None: False}
"""`gate_mode` of ROCm's aiter: whether gate and up take turns along w1's rows."""

_SHARED = "as shared experts are not computed here but by a layer of their own"
ABSENT = {
    "beta": "as ActivationType.Situv2 is not computed",
    "linear_beta": "as ActivationType.Situv2 is not computed",
    "shared_w1": _SHARED,
    "shared_w2": _SHARED,
    "shared_w1_scale": _SHARED,
    "shared_w2_scale": _SHARED,
    "shared_expert_id": _SHARED,
    "stage2_scatter": "as the output goes to one tensor",
}
"""Why an argument of ROCm's aiter has no meaning here."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_layer(hidden_states: Tensor, experts: Experts, dtype: torch.dtype | None) -> Tensor:
    """hidden_states [M, D], if it and the experts' tensors fit each other.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a rank, size, dtype or device does not fit, or a gradient would be needed.
    """
    w1, w2 = experts.w1, experts.w2
    _check_tensor("hidden_states", hidden_states, 2, hidden_states)
    _check_tensor("w1", w1, 3, hidden_states)
    _check_tensor("w2", w2, 3, hidden_states)
    if hidden_states.dtype not in DTYPES:
        raise ValueError(
            f"hidden_states: expected dtype float32, float16 or bfloat16, got {hidden_states.dtype}"
        )
    for name, tensor in (("w1", w1), ("w2", w2)):
        if tensor.dtype != hidden_states.dtype:
            raise ValueError(
                f"{name}: expected {hidden_states.dtype}, as hidden_states (quantised weights are"
                f" not supported), got {tensor.dtype}"
            )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, float16, bfloat16 or None, got {dtype}")
    _check_sizes(hidden_states, experts)
    _check_activation(experts)
    _check_bias("bias1", experts.bias1, w1.shape[0], w1.shape[1], hidden_states)
    _check_bias("bias2", experts.bias2, w1.shape[0], w2.shape[1], hidden_states)
    return checked(
        hidden_states,
        hidden_states=hidden_states,
        w1=w1,
        w2=w2,
        bias1=experts.bias1,
        bias2=experts.bias2,
    )


def check_routing(
    source: str, num_experts: int, expert_mask: Tensor | None, local_experts: int
) -> None:
    """Raises unless the number of local experts is what the mask, or its absence, says.

    A mask's ones are counted where reading them needs no wait for a device; on a GPU, experts that
    the mask names but `w1` does not have contribute what nobody defines.

    Args:
        source: where `num_experts` comes from, in words.

    Raises:
        TypeError: the mask is no tensor.
        ValueError: `w1` has another number of experts.
    """
    expected, why = num_experts, source
    if expert_mask is None and local_experts == 0:
        raise ValueError("w1: expected at least one expert without expert_mask, got none")
    if expert_mask is not None:
        if not isinstance(expert_mask, Tensor):
            raise TypeError(f"expert_mask: expected a tensor, got {type(expert_mask).__name__}")
        check_strided("expert_mask", expert_mask)
        if expert_mask.dtype != torch.int32 or expert_mask.dim() != 1:
            raise ValueError(
                f"expert_mask: expected int32 of rank 1, got {expert_mask.dtype} of shape"
                f" {list(expert_mask.shape)}"
            )
        if traced(expert_mask) or expert_mask.device.type != "cpu":
            return
        expected, why = int(expert_mask.count_nonzero()), "the ones in expert_mask"
    if local_experts != expected:
        raise ValueError(f"w1: expected {expected} experts, {why}, got {local_experts}")


def check_unsupported(quant_type: QuantType, **options: object) -> None:
    """Raises for arguments of ROCm's aiter that only its quantised or padded kernels have.

    Raises:
        TypeError: `quant_type` is no QuantType.
        ValueError: one of them asks for something.
    """
    if not isinstance(quant_type, QuantType):
        raise TypeError(f"quant_type: expected a QuantType, got {type(quant_type).__name__}")
    if quant_type != QuantType.No:
        raise ValueError(
            f"quant_type: expected QuantType.No, as no quantised product is supported, got"
            f" {quant_type!s}"
        )
    for name, value in options.items():
        if isinstance(value, Tensor):
            raise ValueError(
                f"{name}: expected None, as no quantised product is supported, got a tensor of"
                f" shape {list(value.shape)}"
            )
        if value:
            raise ValueError(
                f"{name}: expected {'None' if name.endswith('scale') else 0}, as padded or quantised"
                f" weights are not supported, got {value!r}"
            )


def check_upstream(
    splitk: int, swiglu_limit: float | None, gate_mode: str | None, activation: object,
    **absent: object,
) -> None:  # fmt: skip
    """Raises for arguments of ROCm's aiter that have no meaning here, or not that value.

    Args:
        absent: those that must be None, by name, or -1 for `shared_expert_id`.

    Raises:
        TypeError, ValueError: as the text says.
    """
    check_int("splitk", splitk)
    if not isinstance(gate_mode, (str, type(None))) or gate_mode not in GATE_MODES:
        raise ValueError(f"gate_mode: expected one of {list(GATE_MODES)}, got {gate_mode!r}")
    check_swiglu_limit(swiglu_limit, activation)
    for name, value in absent.items():
        nothing = -1 if name == "shared_expert_id" else None
        if isinstance(value, Tensor) or (value is not nothing and value != nothing):
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name}: expected {nothing}, {ABSENT[name]}, got {got}")


def check_swiglu_limit(swiglu_limit: float | None, activation: object) -> None:
    """Raises unless it is None, or a positive number beside Swiglu.

    Raises:
        TypeError, ValueError: as the text says.
    """
    if swiglu_limit is None:
        return
    check_number("swiglu_limit", swiglu_limit, "a float or None")
    if activation != ActivationType.Swiglu or not 0 < swiglu_limit < float("inf"):
        raise ValueError(
            "swiglu_limit: expected None, or a positive number with ActivationType.Swiglu, got"
            f" {swiglu_limit!r} with {activation!s}"
        )


def check_knobs(
    block_size_m: int | None, backend: str | None, experts: Experts, doweight_stage1: bool
) -> None:
    """Raises for a block size or a backend that does not exist, or cannot compute these experts.

    Raises:
        TypeError, ValueError: as the text says.
    """
    check_bool("doweight_stage1", doweight_stage1)
    check_bool("gate_up_interleaved", experts.interleaved)
    if block_size_m is not None and (
        not isinstance(block_size_m, int) or isinstance(block_size_m, bool)
    ):
        raise TypeError(f"block_size_M: expected an int or None, got {type(block_size_m).__name__}")
    if block_size_m is not None and block_size_m < 0:
        raise ValueError(f"block_size_M: expected at least 1, or 0 or None, got {block_size_m}")
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise ValueError(f"backend: expected one of {list(BACKENDS)} or None, got {backend!r}")
    w1, w2 = experts.w1, experts.w2
    if backend == "triton":
        reason = triton_problem(w1.device, experts.activation)
        if reason is not None:
            raise ValueError(
                f"backend: expected another one than 'triton' or None for these tensors on"
                f" {w1.device}, as {reason}"
            )
    problem = grouped_mm_problem(w1, w2) if backend == "grouped_mm" else None
    if problem is not None:
        raise ValueError(f"backend: expected 'block_bmm' or None, as {problem}, got 'grouped_mm'")


def _check_tensor(name: str, tensor: Tensor, rank: int, hidden_states: Tensor) -> None:
    check_strided(name, tensor)
    if not traced(tensor) and tensor.is_neg():
        raise ValueError(
            f"{name}: expected a tensor with its numbers in memory, got one that is negated when it is"
            " read; call resolve_neg()"
        )
    if tensor.dim() != rank:
        raise ValueError(
            f"{name}: expected a tensor of rank {rank}, got shape {list(tensor.shape)}"
        )
    if tensor.device != hidden_states.device:
        raise ValueError(
            f"{name}: expected it on {hidden_states.device}, as hidden_states, got {tensor.device}"
        )


def _check_sizes(hidden_states: Tensor, experts: Experts) -> None:
    num_experts, width, model_dim = experts.w1.shape
    _, out_dim, inter = experts.w2.shape
    if hidden_states.shape[1] != model_dim:
        raise ValueError(
            f"hidden_states: expected {model_dim} columns, as w1 {list(experts.w1.shape)}, got shape"
            f" {list(hidden_states.shape)}"
        )
    if experts.w2.shape[0] != num_experts or out_dim != model_dim:
        raise ValueError(
            f"w2: expected shape [{num_experts}, {model_dim}, inter], as w1"
            f" {list(experts.w1.shape)}, got {list(experts.w2.shape)}"
        )
    if width not in (inter, 2 * inter) or inter == 0:
        raise ValueError(
            f"w1: expected {2 * inter} rows (gate and up) or {inter} per expert, as w2"
            f" {list(experts.w2.shape)}, got shape {list(experts.w1.shape)}"
        )


def _check_activation(experts: Experts) -> None:
    activation = experts.activation
    if callable(activation):
        return
    if not isinstance(activation, ActivationType):
        raise TypeError(
            f"activation: expected an ActivationType or a function, got {type(activation).__name__}"
        )
    if activation in (ActivationType.No, ActivationType.Situv2):
        raise ValueError(f"activation: expected Silu, Gelu or Swiglu, got {activation.name}")
    gated = experts.w1.shape[1] == 2 * experts.w2.shape[2]
    if not gated and activation == ActivationType.Swiglu:
        raise ValueError(
            f"activation: expected Silu or Gelu for w1 without an up projection, shape"
            f" {list(experts.w1.shape)}, got Swiglu"
        )
    if not gated and experts.interleaved:
        raise ValueError(
            "gate_up_interleaved: expected False for w1 without an up projection, shape"
            f" {list(experts.w1.shape)}, got True"
        )


def _check_bias(
    name: str, bias: Tensor | None, num_experts: int, width: int, hidden_states: Tensor
) -> None:
    if bias is None:
        return
    _check_tensor(name, bias, 2, hidden_states)
    if list(bias.shape) != [num_experts, width]:
        raise ValueError(f"{name}: expected shape [{num_experts}, {width}], got {list(bias.shape)}")
    if bias.dtype not in DTYPES:
        raise ValueError(f"{name}: expected dtype float32, float16 or bfloat16, got {bias.dtype}")
