"""Does the Triton backend choose, compile and remember what it should? Its results: `test_fused_moe`.

On a GPU the kernels run as they are; without one they run in Triton's interpreter, in a process of its
own, since Triton reads TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import BASE, GPT_OSS, LayerCase, check_close, make_layer, options_of, run_layer
from targets import Target

from aiter import ActivationType, reference
from aiter import fused_moe as layer
from aiter.cli import tune, tune_experts
from aiter.jit import CacheError
from aiter.layer import triton_configs, triton_experts, triton_known, triton_plan, triton_tuned
from aiter.layer.parts import Experts
from aiter.layer.triton_configs import Row, Tile
from aiter.reference.layer import moe_layer

pytest.importorskip("triton", reason="PyTorch's GPU builds bring Triton; here: pip install triton")

HERE = Path(__file__).resolve().parent
ARCHS = ("gfx942", "gfx950", "gfx1201", "sm_80", "sm_90", "sm_100", "sm_120", "interpreter")
# Shared memory of a workgroup in bytes, and what a float16 tile of each kind may take of it.
LDS_BYTES = {"gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1201": 64 << 10, "sm_80": 163 << 10,
             "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}  # fmt: skip
TILES = {
    "rows of several blocks": Tile(32, 16, 16, 4, 2, group=2),
    "shared by fewer programs": Tile(16, 16, 32, 4, 2, persistent=3),
    "columns past the end": Tile(16, 64, 32, 4, 2, group=4),
}


def needs_kernels(target: Target) -> None:
    if reason := triton_experts.why_not(torch.device(target.device)):
        pytest.skip(reason)


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """This file, `test_triton_calls` and every case of `test_fused_moe`, on the CPU."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernels run in this process")
    if not triton_experts.INSTALLED:
        pytest.skip(triton_experts.NOT_INSTALLED)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--device", "cpu", "--wave", "64"]
    files = [HERE / f"{name}.py" for name in ("test_triton", "test_triton_calls", "test_fused_moe")]
    run = subprocess.run(
        [*command, *map(str, files), "-k", "triton"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("case", [GPT_OSS, replace(BASE, mask=(1, 0, 1, 0, 0, 0, 1, 1))])
def test_tiles(target: Target, case: LayerCase, name: str) -> None:
    """Tiles that no table has at these sizes compute the same, for blocks of any size."""
    needs_kernels(target)
    inputs = make_layer(case, target.device)
    family = triton_configs.family_of("interpreter", "inner")
    choice = triton_plan.Choice(family, Row(0, TILES[name], TILES[name]))
    experts = Experts(
        inputs.w1, inputs.w2, inputs.bias1, inputs.bias2, case.activation, case.interleaved
    )
    for block in (1, 24):
        with target.active():
            weights, ids = layer.fused_topk(inputs.hidden, inputs.logits, case.topk, True)
            buffers = layer.moe_sorting(
                ids, weights, case.num_experts, case.model_dim, case.dtype, block, inputs.mask
            )
            output = triton_experts.run_triton(
                inputs.hidden, experts, buffers, case.topk, block,
                all_routed=False, weight_first=False, choice=choice,
            )  # fmt: skip
        expected = moe_layer(
            *(t.cpu() for t in (inputs.hidden, inputs.w1, inputs.w2, weights, ids)),
            activation=case.activation.name.lower(),
            expert_mask=None if inputs.mask is None else inputs.mask.cpu(),
            bias1=None if inputs.bias1 is None else inputs.bias1.cpu(),
            bias2=None if inputs.bias2 is None else inputs.bias2.cpu(),
            gate_up_interleaved=case.interleaved,
        )
        check_close(output, expected)


@pytest.mark.parametrize("tokens", [3, 24, 70])
@pytest.mark.parametrize("case", [GPT_OSS, replace(BASE, mask=(1, 0, 1, 0, 0, 0, 1, 1))])
def test_triton_multiplies_less_for_padding(target: Target, case: LayerCase, tokens: int) -> None:
    """Half a row tile and a narrow last column tile give the bits that whole ones give."""
    needs_kernels(target)
    case = replace(case, num_tokens=tokens, model_dim=80, num_local=tokens - 1)
    inputs = make_layer(case, target.device)
    family = triton_configs.family_of("interpreter", "inner")
    experts = Experts(
        inputs.w1, inputs.w2, inputs.bias1, inputs.bias2, case.activation, case.interleaved
    )
    tile = Tile(32, 64, 16, 4, 2, group=2)
    outputs = []
    with target.active():
        weights, ids = layer.fused_topk(inputs.hidden, inputs.logits, case.topk, True)
        for less in (False, True):
            buffers = layer.moe_sorting(
                ids, weights, case.num_experts, case.model_dim, case.dtype, 32, inputs.mask,
                inputs.num_local,
            )  # fmt: skip
            asked = replace(tile, halves=less, tails=less)
            choice = triton_plan.Choice(family, Row(0, asked, asked))
            outputs.append(
                triton_experts.run_triton(
                    inputs.hidden, experts, buffers, case.topk, 32,
                    all_routed=False, weight_first=False, choice=choice,
                )[: tokens - 1]
            )  # fmt: skip
    assert outputs[0].abs().max() > 0.1
    if target.device == "cpu":  # NOTE: NumPy multiplies there, in an order that goes by the shape.
        torch.testing.assert_close(outputs[1], outputs[0])
    else:
        assert torch.equal(outputs[1], outputs[0])


def test_padding_is_left_out_where_it_can_be() -> None:
    """What the plan asks the kernels for, by the sizes."""
    tile = Tile(128, 256, 64, 8, 4, halves=True, tails=True)
    assert triton_plan._tail(2880, tile) == 64 and triton_plan._tail(2948, tile) == 0
    assert triton_plan._tail(2048, tile) == 0 and triton_plan._tail(2049, tile) == 16
    assert triton_plan._tail(2880, replace(tile, tails=False)) == 0
    call = triton_plan.Call(
        torch.device("cpu"), torch.bfloat16, torch.bfloat16, 64, 4, 4096, 256, (8, 64, 64),
        (8, 64, 32), (64, 1), (4096, 64, 1), (2048, 32, 1), None, None, 0, False, 7.0, False, True,
        True,
    )  # fmt: skip
    assert triton_plan._halves(call, tile)
    assert not triton_plan._halves(call._replace(block=192), tile)
    assert not triton_plan._halves(call, replace(tile, rows=16))


def test_triton_layouts(target: Target) -> None:
    """Strided hidden states, sliced and shifted weights, odd sizes: read where they lie."""
    needs_kernels(target)
    run_layer(replace(BASE, model_dim=37, inter=11, bias=True), target, "triton")
    inputs = make_layer(BASE, target.device)
    wide = torch.zeros(8, 96, 130, device=target.device)
    wide[:, :, 1:129:2] = inputs.w1
    hidden = torch.zeros(9, 128, device=target.device)
    hidden[:, 64:] = inputs.hidden
    with target.active():
        arguments = (inputs.logits, 3)
        plain = layer.fused_moe_from_logits(
            inputs.hidden, inputs.w1, inputs.w2, *arguments, backend="triton"
        )
        strided = layer.fused_moe_from_logits(
            hidden[:, 64:], wide[:, :, 1:129:2], inputs.w2, *arguments, backend="triton"
        )
    torch.testing.assert_close(strided, plain, rtol=1e-6, atol=1e-6)


def test_triton_in_a_graph_of_torch_compile(target: Target) -> None:
    """One op, for any number of tokens."""
    needs_kernels(target)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    inputs = make_layer(BASE, target.device)

    def call(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return layer.fused_moe_from_logits(
            hidden, inputs.w1, inputs.w2, logits, 3, backend="triton"
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    with target.active(), torch.no_grad():
        for tokens in (9, 5, 3):
            hidden, logits = inputs.hidden[:tokens].clone(), inputs.logits[:tokens].clone()
            assert torch.equal(compiled(hidden, logits), call(hidden, logits))
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [name for name in called if "aiter" in name] == ["aiter.fused_moe_from_logits_triton"]


def test_triton_calls_are_known_by_what_they_are(target: Target) -> None:
    """A known call gives what a first one gives, and a changed tensor is another call."""
    if not target.device.startswith("cuda"):
        pytest.skip("calls are remembered on GPUs")
    triton_known.forget()
    inputs = make_layer(replace(BASE, dtype=torch.bfloat16), target.device)
    w1 = inputs.w1.clone()

    def call() -> torch.Tensor:
        return layer.fused_moe_from_logits(inputs.hidden, w1, inputs.w2, inputs.logits, 3)

    first = call()
    assert len(triton_known._known) == 1
    assert torch.equal(call(), first) and len(triton_known._known) == 1
    w1.data = w1.mT.contiguous().mT
    assert w1.stride() != inputs.w1.stride()
    torch.testing.assert_close(call(), first, rtol=2e-2, atol=2e-2)
    assert len(triton_known._known) == 2
    with pytest.raises(ValueError, match="9 rows"):
        layer.fused_moe_from_logits(inputs.hidden, w1, inputs.w2, inputs.logits[:8], 3)
    w1.requires_grad_()
    with pytest.raises(ValueError, match="needs no gradient"):
        call()


def test_triton_is_refused_by_name_where_it_cannot_run() -> None:
    if triton_experts.why_not(torch.device("cpu")) is None:
        pytest.skip("the interpreter runs on the CPU")
    reason = "Triton has no CPU" if triton_experts.INSTALLED else "Triton is not installed"
    inputs = make_layer(BASE, "cpu")
    with pytest.raises(ValueError, match=f"backend: expected another one.*{reason}"):
        layer.fused_moe_from_logits(
            inputs.hidden, inputs.w1, inputs.w2, inputs.logits, 3, backend="triton"
        )
    assert layer.expert_backend(inputs.w1, inputs.w2) != "triton"


def test_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_experts, "INSTALLED", False)
    inputs = make_layer(BASE, "cpu")
    with pytest.raises(ValueError, match="Triton is not installed"):
        layer.fused_moe_from_logits(
            inputs.hidden, inputs.w1, inputs.w2, inputs.logits, 3, backend="triton"
        )
    assert triton_experts.why_not(torch.device("cuda:0")) is not None


@pytest.mark.parametrize("layout", ["inner", "columns"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_table_ascends_and_fits(arch: str, layout: triton_configs.Layout) -> None:
    family = triton_configs.family_of(arch, layout)
    limits = [row.entries for row in family.rows]
    assert limits == sorted(set(limits)) and limits[-1] >= 1e9
    for row in family.rows:
        assert row.first.rows == row.second.rows == row.block
        for tile, pair in ((row.first, 2), (row.second, 1)):
            taken = (tile.rows + pair * tile.columns) * tile.inner * 2 * tile.stages
            assert taken <= LDS_BYTES.get(arch, 1 << 30)
            assert all(
                size & (size - 1) == 0 for size in (tile.rows, tile.columns, tile.inner, tile.warps)
            )


def test_nothing_is_compiled_after_warming_up(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels(target)
    triton_experts.forget()
    inputs = make_layer(BASE, target.device)
    layer.warmup_layer(inputs.w1, inputs.w2, 3, max_tokens=40)
    known = triton_plan.make_plan.cache_info().currsize
    assert known >= 2
    made = []
    compiling = triton_plan.make_launch

    def watched(kernel: object, *others: object) -> object:
        made.append(kernel)
        return compiling(kernel, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_plan, "make_launch", watched)
    with target.active():
        for tokens in (1, 8):
            layer.fused_moe_from_logits(
                inputs.hidden[:tokens], inputs.w1, inputs.w2, inputs.logits[:tokens], 3,
                backend="triton",
            )  # fmt: skip
    assert made == []  # both sizes had their plans


def test_few_variants_serve_all_sizes() -> None:
    """One decode server compiles what two rows need, not something for each M."""
    for layout, most in (("inner", 2), ("columns", 2)):
        family = triton_configs.family_of("sm_90", layout)
        rows = {triton_configs.row_for(family, tokens * 4 / 32, None, 2) for tokens in range(2, 65)}
        assert len(rows) <= most


def test_blocks_follow_the_number_of_tokens() -> None:
    weight = torch.empty(32, 64, 64, dtype=torch.bfloat16)
    device = torch.device("cpu")
    sizes = [
        triton_experts.block_size(device, tokens, 4, 32, weight) for tokens in (1, 2, 64, 256, 8192)
    ]
    assert sizes[0] == 1 and sizes == sorted(sizes) and sizes[-1] == 128


def test_given_blocks_cut_the_tiles() -> None:
    family = triton_configs.family_of("sm_90", "inner")
    for block, rows in ((1, 16), (17, 32), (64, 64), (4096, 128)):
        assert triton_configs.row_for(family, 1e6, block, 2).first.rows == rows
    assert triton_configs.row_for(family, 1e6, None, 4).first.inner == 32


def test_measured_tiles_are_kept_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AITER_JIT_DIR", str(tmp_path / "cache"))
    device = torch.device("cpu")
    family = triton_configs.family_of("sm_90", "columns")
    triton_tuned.families.cache_clear()
    assert triton_tuned.families(device) == {}
    path = triton_tuned.keep(device, (32, 5760, 2880, "columns"), family)
    triton_tuned.keep(device, (8, 64, 64, "inner"), replace(family, split=False))
    found = triton_tuned.families(device)
    assert found[(32, 5760, 2880, "columns")] == family and len(found) == 2

    triton_tuned.families.cache_clear()
    monkeypatch.setattr(triton_tuned, "kernels", lambda: "other kernels")
    assert triton_tuned.families(device) == {} and "other kernels" in caplog.text
    triton_tuned.families.cache_clear()
    path.write_text(path.read_text().replace('"rows": 16', '"rows": -16'))
    assert triton_tuned.families(device) == {} and "left aside" in caplog.text
    triton_tuned.families.cache_clear()
    path.chmod(0o666)
    with pytest.raises(CacheError, match="writable by everyone"):
        triton_tuned.families(device)
    triton_tuned.families.cache_clear()


def test_measured_rows_share_out_the_sizes() -> None:
    small, large = Tile(16, 32, 64, 4, 3), Tile(128, 128, 64, 8, 3)
    rows = [Row(1, small, small), Row(4, small, small), Row(64, large, large)]
    spread = tune_experts.spread(rows)
    assert [row.first for row in spread] == [small, large]
    assert [row.entries for row in spread] == [16.0, 1e9]


@pytest.mark.parametrize(
    ("entries", "blocks"),
    [
        (0.1, [16]),
        (4, [16, 32]),
        (64, [16, 32, 64, 128]),
        (2000, [128]),
        (2049, [128]),
        (1e6, [128]),
    ],
)
def test_every_number_of_entries_has_a_block(entries: float, blocks: list[int]) -> None:
    """M=8192, E=8, K=4 has 4096: more than a block of 128 should see, but there is no larger one."""
    assert tune_experts.blocks_for(entries) == blocks


def test_tune_says_what_it_cannot_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--experts", "8,2,64,64", "--device", "cpu"]) == 1
    assert "expected a GPU with Triton" in capsys.readouterr().err
    for wrong in ("8,9,64,64", "8,2,64", "8,2,64,0", "x"):
        with pytest.raises(SystemExit):
            tune.main(["--experts", wrong])


def test_the_reference_is_not_the_kernel() -> None:
    """A wrong weight is noticed by the comparison that the tests above use."""
    inputs = make_layer(BASE, "cpu")
    weights, ids = reference.topk_softmax(inputs.logits, 3, True)
    right = moe_layer(inputs.hidden, inputs.w1, inputs.w2, weights, ids)
    wrong = moe_layer(inputs.hidden, inputs.w1, inputs.w2, weights.flip(1), ids)
    assert BASE.activation == ActivationType.Silu
    with pytest.raises(AssertionError, match="error"):
        check_close(wrong.float(), right)
    assert options_of(BASE, inputs)["bias1"] is None
