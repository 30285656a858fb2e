"""Which calls of `fused_moe` can be computed? Every other one is refused here, in a sentence.

Checked before anything is launched. What the routing ops check themselves (dtypes, shapes and
devices of ids, weights, logits, mask and `num_local_tokens`) is left to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing.graph import traced
from . import triton_experts
from .experts import BACKENDS, Experts
from .types import ActivationType, QuantType

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_layer(hidden_states: Tensor, experts: Experts, dtype: torch.dtype | None) -> None:
    """Raises unless hidden_states [M, D] and the experts' tensors fit each other.

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
    _check_no_gradient(hidden_states, experts)


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
    if expert_mask is not None:
        if not isinstance(expert_mask, Tensor):
            raise TypeError(f"expert_mask: expected a tensor, got {type(expert_mask).__name__}")
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


def check_knobs(block_size_m: int | None, backend: str | None, device: torch.device) -> None:
    """Raises for a block size or a backend that does not exist, or not on `device`.

    Raises:
        TypeError, ValueError: as the text says.
    """
    if block_size_m is not None and (
        not isinstance(block_size_m, int) or isinstance(block_size_m, bool)
    ):
        raise TypeError(f"block_size_M: expected an int or None, got {type(block_size_m).__name__}")
    if block_size_m is not None and block_size_m < 1:
        raise ValueError(f"block_size_M: expected at least 1, or None, got {block_size_m}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {list(BACKENDS)} or None, got {backend!r}")
    if backend == "triton":
        reason = triton_experts.why_not(device)
        if reason is not None:
            raise ValueError(
                f"backend: expected another one than 'triton' for tensors on {device}: {reason}"
            )


def _check_tensor(name: str, tensor: Tensor, rank: int, hidden_states: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
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
    if not isinstance(activation, ActivationType):
        raise TypeError(f"activation: expected an ActivationType, got {type(activation).__name__}")
    if activation == ActivationType.No:
        raise ValueError("activation: expected Silu, Gelu or Swiglu, got No")
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


def _check_no_gradient(hidden_states: Tensor, experts: Experts) -> None:
    if not torch.is_grad_enabled():
        return
    tensors = (hidden_states, experts.w1, experts.w2, experts.bias1, experts.bias2)
    names = ("hidden_states", "w1", "w2", "bias1", "bias2")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient, as routing has no backward, got"
                " one that requires grad; call under torch.no_grad() or torch.inference_mode()"
            )
