"""Does every path behave on a GPU: capturable, ordered by its stream, free of hidden state?

A :class:`Pipeline` holds the static tensors of one path, as a serving engine does; its outputs are
judged like any other run. These tests need a GPU and are skipped on the CPU target.
"""

from __future__ import annotations

from dataclasses import replace

import _checkout  # noqa: F401
import pytest
import torch
from buffers import GuardedBuffer
from cases import Case, Inputs, make_inputs
from route_calls import PATHS, check_allocated, route
from runners import Op, SortedOutputs, expected_sorted, handed_over_slots, reporting
from targets import Target
from torch import Tensor

import aiter
import aiter.fused_moe

POLICY = {"fused": 0, "oneshot": 1, "multiphase": 2}
BASE = Case(48, 128, 4, torch.bfloat16, logits="ties", num_local=48, mask="random", model_dim=37)
SELECT: Op = aiter.topk_softmax
SORT: Op = aiter.moe_sorting_opus_fwd
FUSED: Op = aiter.fused_topk_moe_sorting_fwd
SLEEP_CYCLES = 200_000_000
ROUNDS, CALLS = 10, 5000

VARIANTS = [
    replace(BASE, num_local=num_local, logits=logits, seed=seed)
    for seed, (num_local, logits) in enumerate(
        [(48, "ties"), (0, "normal"), (1, "mixed"), (47, "equal"), (20, "few_finite"), (48, "wide")]
    )
]


class Pipeline:
    """One path with tensors that stay where they are."""

    def __init__(self, case: Case, path: str, device: str) -> None:
        self.case = case
        self.path = path
        self.inputs = make_inputs(case, device)
        self.outputs = SortedOutputs.allocate(case, device)
        shape = (case.num_tokens, case.topk)
        self.weights = torch.empty(shape, dtype=torch.float32, device=device)
        self.ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.source = torch.empty_like(self.ids)
        size = aiter.moe_sorting_opus_get_workspace_size(
            case.num_tokens, case.num_experts, case.topk, POLICY[path]
        )
        self.workspace = GuardedBuffer("workspace", (size,), torch.uint8, device)

    def load(self, inputs: Inputs) -> None:
        """Replace the contents of the static inputs and poison the outputs."""
        for name, tensor in inputs.named().items():
            self.inputs.named()[name].copy_(tensor, non_blocking=True)
        for buffer in self.outputs.buffers:
            buffer.poison()

    def launch(self) -> None:
        """Run the path on the current stream."""
        case, inputs = self.case, self.inputs
        options = {
            "local_expert_mask": inputs.mask,
            "num_local_tokens": inputs.num_local_tokens,
        }
        if self.path == "fused":
            FUSED(
                inputs.gating,
                *self.outputs.tensors,
                case.num_experts,
                case.topk,
                case.block_size,
                case.need_renorm,
                **options,
            )
            return
        SELECT(self.weights, self.ids, self.source, inputs.gating, case.need_renorm)
        SORT(
            self.ids,
            self.weights,
            *self.outputs.tensors,
            case.num_experts,
            case.block_size,
            workspace=self.workspace.tensor if self.workspace.tensor.numel() else None,
            dispatch_policy=POLICY[self.path],
            **options,
        )

    def check(self, case: Case, inputs: Inputs, target: Target) -> None:
        """The outputs are those of ``case``, whose tensors ``inputs`` are."""
        handed_over = handed_over_slots(case, target) if self.path == "fused" else 0
        with reporting(f"{self.path}, {case}", target):
            self.outputs.check(case, inputs, expected_sorted(case, inputs), handed_over=handed_over)
            self.workspace.check_guards()


@pytest.fixture
def gpu(target: Target) -> Target:
    """The target, if it is a GPU."""
    if not target.device.startswith("cuda"):
        pytest.skip("CUDA graphs and streams need a GPU")
    return target


def new_stream() -> torch.cuda.Stream:
    """A side stream of the current device."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return stream


def warm(pipeline: Pipeline) -> Pipeline:
    """Build and load the path's modules."""
    pipeline.launch()
    torch.cuda.synchronize()
    return pipeline


@pytest.mark.parametrize("path", PATHS)
def test_graph_replay(gpu: Target, path: str) -> None:
    """One capture serves new logits, masks and local token counts."""
    pipeline = warm(Pipeline(BASE, path, gpu.device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pipeline.launch()
    for case in (*VARIANTS, *reversed(VARIANTS)):
        inputs = make_inputs(case, gpu.device)
        pipeline.load(inputs)
        graph.replay()
        gpu.synchronize()
        pipeline.check(case, inputs, gpu)


@pytest.mark.parametrize("path", PATHS)
def test_graph_of_the_routing_function(gpu: Target, path: str) -> None:
    """The allocating function can be captured: its outputs come from PyTorch's pool."""
    static = make_inputs(BASE, gpu.device)
    route(BASE, static, gpu, POLICY[path])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = aiter.fused_moe.topk_softmax_sorting(
            static.gating,
            BASE.topk,
            BASE.num_experts,
            BASE.model_dim,
            BASE.moebuf_dtype,
            BASE.need_renorm,
            BASE.block_size,
            static.mask,
            static.num_local_tokens,
            POLICY[path],
        )
    assert aiter.fused_moe.last_path() == path
    for case in VARIANTS:
        inputs = make_inputs(case, gpu.device)
        for name, tensor in inputs.named().items():
            static.named()[name].copy_(tensor)
        for tensor in outputs:
            tensor.view(torch.uint8).fill_(0xA5)
        graph.replay()
        gpu.synchronize()
        with reporting(f"{path}, {case}", gpu):
            check_allocated(case, inputs, gpu, outputs)


@pytest.mark.parametrize("path", PATHS)
def test_two_streams(gpu: Target, path: str) -> None:
    """Launches that overlap on two streams share nothing."""
    pipelines = [warm(Pipeline(BASE, path, gpu.device)) for _ in range(2)]
    streams = [new_stream() for _ in pipelines]
    drawn = [make_inputs(case, gpu.device) for case in VARIANTS]
    torch.cuda.synchronize()
    rounds = 100
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for step in range(rounds):
        for side, (pipeline, stream) in enumerate(zip(pipelines, streams, strict=True)):
            with torch.cuda.stream(stream):
                pipeline.load(drawn[(step + side) % len(drawn)])
                pipeline.launch()
                results[side].append(tuple(tensor.clone() for tensor in pipeline.outputs.tensors))
    torch.cuda.synchronize()
    for side in range(2):
        for step, outputs in enumerate(results[side]):
            variant = (step + side) % len(drawn)
            case = VARIANTS[variant]
            with reporting(f"{path}, stream {side}, round {step}, {case}", gpu):
                check_allocated(case, drawn[variant], gpu, outputs)
    for side, pipeline in enumerate(pipelines):
        variant = (rounds - 1 + side) % len(drawn)
        pipeline.check(VARIANTS[variant], drawn[variant], gpu)


@pytest.mark.parametrize("path", PATHS)
def test_runs_on_the_current_stream(gpu: Target, path: str) -> None:
    """Work queued before the call on a side stream comes first, and the call does not wait."""
    pipeline = warm(Pipeline(BASE, path, gpu.device))
    case = VARIANTS[3]
    inputs = make_inputs(case, gpu.device)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(new_stream()):
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        pipeline.load(inputs)
        pipeline.launch()
        done.record()
        returned_early = not done.query()  # type: ignore[no-untyped-call]
    gpu.synchronize()
    pipeline.check(case, inputs, gpu)
    assert returned_early, f"{path}: expected the call to return before its stream was done"


@pytest.mark.parametrize("path", PATHS)
def test_no_synchronisation(gpu: Target, path: str) -> None:
    """No call makes PyTorch wait, the allocating functions included."""
    pipeline = warm(Pipeline(BASE, path, gpu.device))
    inputs = pipeline.inputs
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipeline.launch()
        aiter.fused_moe.topk_softmax_sorting(
            inputs.gating,
            BASE.topk,
            BASE.num_experts,
            BASE.model_dim,
            BASE.moebuf_dtype,
            expert_mask=inputs.mask,
            num_local_tokens=inputs.num_local_tokens,
            dispatch_policy=POLICY[path],
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", PATHS)
def test_allocates_nothing(gpu: Target, path: str) -> None:
    """Neither PyTorch's pool nor the device's free memory changes over many calls.

    Other processes change what is free as well, so it has to stay in one round of ten. A call that
    allocates changes it in every round: the driver hands out pages of 2 MiB in pieces of 512 bytes or
    more, of which a round would take more than a page.
    """
    pipeline = warm(Pipeline(BASE, path, gpu.device))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    changes = []
    for _ in range(ROUNDS):
        free_before = torch.cuda.mem_get_info()[0]
        for _ in range(CALLS):
            pipeline.launch()
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        changes.append(torch.cuda.mem_get_info()[0] - free_before)
        if changes[-1] == 0:
            return
    pytest.fail(f"free memory: expected no change in one of {ROUNDS} rounds, got {changes} bytes")


@pytest.mark.parametrize("path", PATHS)
def test_second_device(gpu: Target, path: str) -> None:
    """The tensors choose the device; the current device stays what it was."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    second = Target("cuda:1")
    with torch.cuda.device(0):
        pipeline = Pipeline(BASE, path, second.device)
        for case in VARIANTS:
            inputs = make_inputs(case, second.device)
            pipeline.load(inputs)
            pipeline.launch()
            second.synchronize()
            pipeline.check(case, inputs, second)
        assert torch.cuda.current_device() == 0
