"""Miniature trees of ROCm's aiter, as far as an export looks at one, and what runs in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

LAYOUTS = ("checkout", "installed")  # with aiter_tensor_t, and with PyTorch's tensors

CORE = '''\
"""Hands calls to functions that a test registers; `develop` where tensors are aiter_tensor_t."""

FUNCTIONS = {}


def compile_ops(
    _md_name: str,
    fc_name=None,%s
):
    def decorator(func):
        name = func.__name__ if fc_name is None else fc_name
        return lambda *args, **kwargs: FUNCTIONS[name](*args, **kwargs)

    return decorator


# With develop: module._set_current_hip_stream(stream)
'''

GUARD = """\
def torch_compile_guard(mutates_args="unknown", device="cpu", calling_func_=None, gen_fake=None):
    return lambda func: func
"""

CONFIG = """\
{
    "module_quant": {
        "srcs": [
            "f'{AITER_CSRC_DIR}/pybind/quant_pybind.cu'"
        ],
        "verbose": "False"
    },
    "module_moe_sorting": {
        "srcs": []
    }
}"""

PACKAGE = """\
import logging
import os

get_hip_quant = None
logger = logging.getLogger("aiter")

if os.getenv("AITER_AOT_IMPORT", "0") == "0":
    from .ops.quant import *
    from .ops.moe_sorting import *
%s    from .ops.topk import *
"""

FUSED_MOE = """\
import torch

from aiter import get_hip_quant as get_quant

SORTED = []  # what moe_sorting was asked for
BLOCK_SIZE = 32  # what fused_moe chooses
MORE = {}  # keywords that its moe_sorting is given


def moe_sorting(
    topk_ids,
    topk_weights,
    num_experts,
    model_dim,
    moebuf_dtype,
    block_size=32,
    expert_mask=None,
    num_local_tokens=None,
    dispatch_policy=0,
    return_local_topk_ids=False,
    accumulate=True,
    flat=False,
    output_aux=False,
):
    SORTED.append(block_size)
    return SORT(
        topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size, expert_mask,
        num_local_tokens, dispatch_policy,
    )


def fused_moe(
    hidden_states, w1, w2, topk_weight, topk_ids, expert_mask=None, block_size_M=None,
    num_local_tokens=None, moe_sorting_dispatch_policy=0, dtype=None, activation=None,
):
    buffers = moe_sorting(
        topk_ids, topk_weight, w1.shape[0] if expert_mask is None else expert_mask.numel(),
        w2.shape[1], dtype or hidden_states.dtype, block_size_M or BLOCK_SIZE, expert_mask,
        num_local_tokens, moe_sorting_dispatch_policy, **MORE,
    )
    return topk_weight, topk_ids, buffers
"""


TEST_COMMON = """\
def run_perftest(func, *args, **kwargs):
    return func(*args, **kwargs), 0.0
"""


def write_tree(root: Path, layout: str) -> Path:
    """Writes a tree of that layout, and returns its folder."""
    checkout = layout == "checkout"
    include = "csrc/include" if checkout else "aiter_meta/csrc/include"
    files = {
        "aiter/jit/core.py": CORE % ("\n    develop: bool = False," if checkout else ""),
        "aiter/jit/optCompilerConfig.json": CONFIG,
        "aiter/jit/__init__.py": "",
        "aiter/jit/utils/__init__.py": "",
        "aiter/jit/utils/torch_guard.py": GUARD,
        "aiter/__init__.py": PACKAGE
        % ("    from .ops.moe_sorting_opus import *\n" if checkout else ""),
        "aiter/fused_moe.py": FUSED_MOE,
        "aiter/ops/__init__.py": "",
        "aiter/dtypes.py": "import torch\n\nfp32, bf16 = torch.float32, torch.bfloat16\n",
        "aiter/test_common.py": TEST_COMMON,
        "aiter/ops/quant.py": "def quant(x):\n    return x\n",
        f"{include}/aiter_enum.h": "#pragma once\n",
    }
    if checkout:
        files[f"{include}/aiter_tensor.h"] = "#pragma once\nstruct aiter_tensor_t\n{\n};\n"
        files[f"{include}/aiter_stream.h"] = "#pragma once\n"
        files["op_tests/test_quant.py"] = "print('quant')\n"
    for path, text in files.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    (root / "aiter" / "fused_moe.py").chmod(0o664)
    return root


def state_of(root: Path) -> dict[str, tuple[int, str]]:
    """Mode and hash of every file, and every folder, by its path."""
    return {
        path.relative_to(root).as_posix(): (
            path.lstat().st_mode,
            hashlib.sha256(b"" if path.is_dir() else path.read_bytes()).hexdigest(),
        )
        for path in sorted(root.rglob("*"))
    }
