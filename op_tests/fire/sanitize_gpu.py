"""Are the kernels clean under compute-sanitizer on an NVIDIA GPU?

    python op_tests/fire/sanitize_gpu.py [--tool memcheck|racecheck|synccheck|initcheck|all]
        [--without-clusters]
    python op_tests/fire/sanitize_gpu.py --dry-run

Runs a small grid of routings (`CALLS`, by models' rules `RULED`, from hidden states `HIDDEN`), each on
every path, in a child process under each tool:
accesses out of bounds, races on shared memory, barriers that not all threads reach, reads of memory
that nobody wrote. The modules are built before, without the tool. PyTorch's caching allocator is
switched off, so that every tensor has its own bounds; only kernels with `aiter` in their name are
instrumented, and their inputs come by copy from the host, which initcheck counts as written; of the
outputs only what is defined is read. Results are compared with the reference. `--dry-run` runs the
grid on the cpu target, without a tool. `--without-clusters` runs the kernels that hand over through
memory.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import _checkout  # noqa: E402, F401
import torch  # noqa: E402
import without_clusters  # noqa: E402
from router_calls import check_logits, drawn  # noqa: E402

from aiter import fused_moe, reference  # noqa: E402
from aiter.cli.table import format_table  # noqa: E402
from aiter.jit import module_for  # noqa: E402
from aiter.jit.compilers import find_compiler  # noqa: E402
from aiter.ops.device import current_device  # noqa: E402
from aiter.ops.fused_router_sorting import router_product  # noqa: E402
from aiter.ops.rule import RoutingRule  # noqa: E402
from aiter.routing import dispatch  # noqa: E402
from aiter.routing.tuned import MODULES  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOL_SECONDS = 300  # for the whole grid under one tool
WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Call:
    """One routing problem."""

    tokens: int
    num_experts: int
    topk: int
    model_dim: int
    dtype: torch.dtype = torch.bfloat16
    need_renorm: bool = True
    block_size: int = 32
    local: bool = False  # with an expert mask and num_local_tokens


# Tails of words, waves, registers and 16-byte stores; every dtype; models' shapes.
CALLS = (
    Call(1, 128, 4, 2880),
    Call(64, 128, 4, 37),
    Call(33, 256, 8, 64, torch.float16, need_renorm=False),
    Call(7, 161, 9, 1, torch.float32, block_size=7),
    Call(40, 512, 10, 16, local=True),
    Call(2, 896, 16, 8),
    Call(3, 1030, 5, 3, torch.float32, local=True),
    Call(5, 8, 8, 33, block_size=1),
    Call(300, 32, 4, 8),
    Call(37, 250, 8, 8, torch.float16),
    Call(513, 160, 6, 8, block_size=64),
    Call(9, 512, 8, 8, local=True),
    Call(0, 16, 2, 4),
)

# By rules, each with a bias: those of DeepSeek-V3 (twice), Kimi-K2, Kimi-K3, Nemotron-3 and LongCat;
# tokens, experts, topk, and the dtype of the logits.
GROUPS = RoutingRule("sigmoid", num_expert_group=8, topk_group=4, group_score="top2")
RULED = (
    (GROUPS, 5, 256, 8, torch.bfloat16), (GROUPS, 1, 256, 8, torch.float32),
    (RoutingRule("sigmoid"), 33, 384, 8, torch.float32),
    (RoutingRule("sigmoid"), 3, 896, 16, torch.bfloat16),
    (RoutingRule("sigmoid"), 2, 512, 22, torch.float16),
    (RoutingRule(need_renorm=False, num_zero_experts=256), 7, 512, 12, torch.float32),
)  # fmt: skip

# From hidden states: tokens, experts, topk, D', and the dtype; a kernel of the product each, and tails.
HIDDEN = (
    (1, 128, 4, 2880, torch.bfloat16), (1, 256, 8, 1032, torch.bfloat16),
    (1, 512, 10, 520, torch.bfloat16), (4, 128, 4, 1100, torch.bfloat16),
    (4, 256, 8, 264, torch.bfloat16), (16, 128, 4, 136, torch.bfloat16),
    (16, 250, 8, 1048, torch.bfloat16), (64, 260, 8, 264, torch.bfloat16),
    (6, 24, 4, 140, torch.float32), (2, 40, 8, 136, torch.float16), (3, 16, 2, 43, torch.bfloat16),
)  # fmt: skip
SANITIZED = (*MODULES, "module_topk_routing", "module_fused_router_sorting")


def main() -> int:
    """Runs the command line; 1 if a tool reports something or a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--tool", choices=(*TOOLS, "all"), default="all")
    parser.add_argument("--dry-run", action="store_true", help="the grid on the cpu target")
    parser.add_argument("--without-clusters", action="store_true", help="as `pytest` has it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.without_clusters:
        without_clusters.request()
    if options.child or options.dry_run:
        device = current_device("cpu" if options.dry_run else "cuda")
        paths = run_grid(device)
        print(f"right on {device}: " + ", ".join(f"{n} {path}" for path, n in paths.items()))
        return 0
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print("error: expected an NVIDIA GPU, got none; --dry-run needs none", file=sys.stderr)
        return 1
    for module in SANITIZED:
        module_for(module, current_device())
    rows, reports = [], []
    for tool in TOOLS if options.tool == "all" else (options.tool,):
        problem, output = run_tool(tool)
        rows.append((tool, problem or "clean"))
        reports += [f"== {tool}: {problem}\n{output[-8000:]}"] if problem else []
    print(format_table(("tool", "result"), rows))
    for report in reports:
        print(f"\n{report}")
    return 1 if reports else 0


def run_tool(tool: str) -> tuple[str, str]:
    """What is wrong with the grid under `tool` ("" for nothing), and the output."""
    command = [
        sanitizer(), "--tool", tool, "--error-exitcode", "99", "--kernel-regex", "kns=aiter",
        sys.executable, __file__, "--child",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "AITER_NO_BUILD": "1",
        "AITER_DISPATCH": "capacity",
    }
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TOOL_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return f"not done after {TOOL_SECONDS} s", output
    output = done.stdout + done.stderr
    return verdict(done.returncode, output), output


def verdict(status: int, output: str) -> str:
    """What the tool's exit status and summary say is wrong; "" for nothing."""
    found = [int(count) for count in re.findall(r"SUMMARY: (\d+) (?:error|hazard)", output)]
    if not found:
        return f"expected a summary of the tool, got none (exit status {status})"
    if any(found):
        return f"{sum(found)} reports (exit status {status})"
    return "" if status == 0 else f"exit status {status}"


def sanitizer() -> str:
    """The path of compute-sanitizer: on PATH, or beside nvcc."""
    beside = Path(find_compiler("cuda").command[0]).resolve().parent / "compute-sanitizer"
    found = shutil.which("compute-sanitizer") or shutil.which(str(beside))
    if found is None:
        raise FileNotFoundError(f"expected compute-sanitizer on PATH or at {beside}, got neither")
    return found


def run_grid(device: torch.device) -> Counter[str]:
    """Routes every call under every policy; returns how often each path ran.

    Raises:
        RuntimeError: a result is wrong.
    """
    paths: Counter[str] = Counter()
    for seed, call in enumerate(CALLS):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(call.tokens, call.num_experts, generator=generator).to(call.dtype)
        mask = torch.randint(0, 2, (call.num_experts,), generator=generator, dtype=torch.int32)
        local = torch.tensor([call.tokens * 2 // 3], dtype=torch.int32)
        extras = (mask, local) if call.local else (None, None)
        arguments = (
            call.topk, call.num_experts, call.model_dim, torch.bfloat16, call.need_renorm,
            call.block_size,
        )  # fmt: skip
        expected = reference.topk_softmax_sorting(logits, *arguments, *extras)
        on_device = [None if extra is None else extra.to(device) for extra in extras]
        for policy in dispatch.POLICIES:
            outputs = buffers(device, call.tokens, *arguments[:4], call.block_size)
            fused_moe.topk_softmax_sorting(
                logits.to(device), *arguments, *on_device, dispatch_policy=policy, out=outputs
            )
            check(f"{call}, policy {policy}", call.block_size, outputs, expected)
            paths[str(fused_moe.last_path())] += 1
    return paths + run_rules(device) + run_hidden(device)


def buffers(
    device: torch.device, tokens: int, topk: int, num_experts: int, *sizes: Any
) -> fused_moe.SortedBuffers:
    """The five outputs, of which moe_buf is filled: initcheck does not see what bulk copies write, nor
    what PyTorch's kernels do, which are not looked at, but copies from the host.
    """
    found = fused_moe.empty_sorted_buffers(tokens, topk, num_experts, *sizes, device=device)
    return *found[:4], torch.ones(found[4].shape, dtype=found[4].dtype).to(device)


def run_rules(device: torch.device) -> Counter[str]:
    """The same by rules."""
    paths: Counter[str] = Counter()
    for seed, (rule, tokens, experts, topk, dtype) in enumerate(RULED):
        generator = torch.Generator().manual_seed(seed)
        width = experts + rule.num_zero_experts
        logits = torch.randn(tokens, width, generator=generator).to(dtype)
        bias = torch.randn(width, generator=generator) / 10
        arguments = (topk, experts, 24, torch.bfloat16)
        expected = reference.topk_routing_sorting(
            logits, *arguments, rule=rule, correction_bias=bias
        )
        for policy in dispatch.POLICIES:
            outputs = buffers(device, tokens, *arguments)
            fused_moe.topk_routing_sorting(
                logits.to(device), *arguments, rule=rule, dispatch_policy=policy,
                correction_bias=bias.to(device), out=outputs,
            )  # fmt: skip
            check(f"{rule}, {tokens} tokens, policy {policy}", 32, outputs, expected)
            paths[str(fused_moe.last_path())] += 1
    return paths


def run_hidden(device: torch.device) -> Counter[str]:
    """The same from hidden states, and the product alone, whose logits have the reference's bits."""
    paths: Counter[str] = Counter()
    for seed, (tokens, experts, topk, width, dtype) in enumerate(HIDDEN):
        hidden, weight = drawn(tokens, experts, width, dtype, seed)
        bias = torch.randn(experts, generator=torch.Generator().manual_seed(seed)).to(dtype)
        wanted = reference.router_logits(hidden, weight, bias)
        arguments = (topk, experts, 24, torch.bfloat16)
        expected = reference.topk_routing_sorting(wanted, *arguments)
        on_device = [tensor.to(device) for tensor in (hidden, weight, bias)]
        name = f"{tokens} x {width}, {experts} experts, {dtype}"
        logits = torch.empty(tokens, experts, device=device)
        router_product(on_device[0], on_device[1], logits, router_bias=on_device[2])
        check_logits(f"{name}, product", logits, wanted)
        for policy in dispatch.POLICIES:
            logits = torch.empty_like(logits)
            outputs = buffers(device, tokens, *arguments)
            fused_moe.router_topk_sorting(
                on_device[0], on_device[1], *arguments, router_bias=on_device[2],
                logits_out=logits, dispatch_policy=policy, out=outputs,
            )  # fmt: skip
            check_logits(f"{name}, policy {policy}", logits, wanted)
            check(f"{name}, policy {policy}", 32, outputs, expected)
            paths[str(fused_moe.last_path())] += 1
    return paths


def check(
    name: str,
    block_size: int,
    outputs: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
) -> None:
    """Raises RuntimeError unless what is defined of the outputs is the reference's."""
    slots, rows = expected[3].tolist()
    got = [
        buffer[:size].cpu()
        for buffer, size in zip(outputs, (slots, slots, slots // block_size, 2, rows), strict=True)
    ]
    for index in (3, 0, 2):
        if not torch.equal(got[index], expected[index][: len(got[index])]):
            raise RuntimeError(f"{name}: output {index} differs from the reference")
    error = (got[1] - expected[1][:slots]).abs()
    if bool((error > WEIGHT_TOLERANCE * expected[1][:slots] + 2.0**-126).any()):
        raise RuntimeError(f"{name}: weights differ by up to {float(error.max())}")
    if bool(got[4].any()):
        raise RuntimeError(f"{name}: moe_buf is not zero")


if __name__ == "__main__":
    sys.exit(main())
