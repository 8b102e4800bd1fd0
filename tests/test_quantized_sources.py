"""Compilation of checkpoints that are quantized already: dequantized, or code by code where the grids are the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import graphq
from graphq.errors import GraphError, GraphqError
from graphq.explanation import graph_after
from graphq.ir.views import Dequantize, ops_of
from graphq.verifier import verify
from tests.quantized_checkpoints import (
    EVERY_FORMAT,
    changed,
    decompressed,
    float8,
    gpt_oss,
    held,
    same_bytes,
    written,
)

IDS = torch.tensor([[3, 17, 64, 2, 90, 11, 5], [8, 8, 101, 0, 45, 6, 127]])
NOTE = "are dequantized as they are read, and keep their codes where the spec has the same grid"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("checkpoints") / "mix", EVERY_FORMAT)


@pytest.fixture(scope="module")
def dequantized(checkpoint: Path) -> Path:
    """The same as a float model, dequantized by compressed-tensors."""
    pytest.importorskip("compressed_tensors")
    folder = checkpoint.with_name("dequantized")
    folder.mkdir()
    wanted = decompressed(checkpoint)
    others = {name: t for name, t in held(checkpoint).items() if name.rpartition(".")[0] not in wanted}
    weights = {f"{layer}.weight": w.to(torch.bfloat16).contiguous() for layer, w in wanted.items()}
    save_file({**others, **weights}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_same_grid_is_exact(checkpoint: Path, tmp_path: Path) -> None:
    """Though the scales of most formats do not follow from the numbers that their codes stand for."""
    made = graphq.compile(checkpoint, EVERY_FORMAT, target="compressed-tensors", target_options={"consumer": "any"})
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    assert same_bytes(held(tmp_path / "out"), held(checkpoint)) == []
    quantized = [layer for layer in made.report.layers if layer.weight is not None]
    assert {layer.sqnr_db for layer in quantized} == {float("inf")}
    assert made.report.notes[0] == (
        f"the source is quantized (compressed-tensors 0.20.0, mixed-precision): its 13 weights {NOTE}"
    )


@pytest.mark.parametrize("target", [None, "compressed-tensors"])
def test_another_grid_is_that_of_the_dequantized_model(
    checkpoint: Path, dequantized: Path, target: str | None, tmp_path: Path
) -> None:
    """int8 by channels, which two layers have by another rule for scales; one of them is left float."""
    spec = {"graphq": 1, "weight": "int8/asym/channel", "rules": [{"match": "*.0.*.q_proj", "float": True}]}
    options: dict[str, Any] = {"target": target, "target_options": {"consumer": "any"}} if target else {}
    one, other = (graphq.compile(source, spec, **options) for source in (checkpoint, dequantized))
    ours, theirs = (made.graph.state_dict() for made in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert [row.nbytes for row in one.report.layers] == [row.nbytes for row in other.report.layers]
    if target:
        for made, place in ((one, "one"), (other, "other")):
            made.emit(target, tmp_path / place, consumer="any")
        assert same_bytes(held(tmp_path / "one"), held(tmp_path / "other")) == []


def test_calibrated_as_the_dequantized_model(checkpoint: Path, dequantized: Path) -> None:
    """Where it has to be held whole."""
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/tensor"}
    ours, theirs = (
        graphq.compile(source, spec, calibration=[(IDS,)]).graph.state_dict() for source in (checkpoint, dequantized)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


VERIFIED: dict[str, tuple[str, dict[str, Any]]] = {
    "kept": ("compressed-tensors", {}),
    "rounded": ("torch", {"weight": "int8/asym/channel"}),
    "held whole": ("compressed-tensors", {"weight": "int8/half/channel", "input": "int8/half/tensor"}),
    "folded": ("torch", {"weight": "int8/half/channel", "algorithms": [{"equalize": {}}]}),
    "by data": ("compressed-tensors", {"weight": "int4/half/g32", "algorithms": [{"gptq": {}}]}),
}


@pytest.mark.parametrize("how", VERIFIED)
def test_artifacts_are_verified_against_the_checkpoint(checkpoint: Path, how: str, tmp_path: Path) -> None:
    """Codes that were kept, codes that were rounded anew, and those that an algorithm had a say in."""
    target, plan = VERIFIED[how]
    needs_data = how in ("held whole", "by data")
    made = graphq.compile(
        checkpoint,
        {"graphq": 1, **plan} if plan else EVERY_FORMAT,
        target=target,
        target_options={"consumer": "any"} if target != "torch" else None,
        calibration=[(IDS,)] if needs_data else None,
    )
    made.emit(target, tmp_path / "out", **({"consumer": "any"} if target != "torch" else {}))
    assert verify(tmp_path / "out", checkpoint).differences == ()


def test_artifacts_of_another_checkpoint_differ(checkpoint: Path, tmp_path: Path) -> None:
    made = graphq.compile(checkpoint, EVERY_FORMAT, target="compressed-tensors", target_options={"consumer": "any"})
    made.emit("compressed-tensors", tmp_path / "out", consumer="any")
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors = held(other)
    assert tensors[name].dtype == torch.int8
    tensors[name][3, 5] ^= 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "out", other).differences == (
        f"{name}: 1 of {tensors[name].numel()} elements differ ({other})",
    )


@pytest.mark.parametrize("weight", ["int8/half/channel/mse", "int8/half/channel"])
def test_a_searched_scale_is_not_better_than_the_one_that_is_there(checkpoint: Path, weight: str) -> None:
    made = graphq.compile(checkpoint, {"graphq": 1, "rules": [{"match": "*.1.*.q_proj", "weight": weight}]})
    assert [row.sqnr_db for row in made.report.layers if row.weight is not None] == [float("inf")]


@pytest.mark.parametrize("weight", ["int8/pow2/channel", "int8/half/g32", "int7/half/channel"])
def test_what_is_another_grid(checkpoint: Path, weight: str) -> None:
    made = graphq.compile(checkpoint, {"graphq": 1, "rules": [{"match": "*.1.*.q_proj", "weight": weight}]})
    (row,) = [row for row in made.report.layers if row.weight is not None]
    assert row.sqnr_db is not None
    assert row.sqnr_db < 100


def test_smoothed_weights_are_rounded_anew(checkpoint: Path) -> None:
    spec = {"graphq": 1, "weight": "int8/half/channel", "algorithms": [{"equalize": {}}]}
    made = graphq.compile(checkpoint, spec, target="compressed-tensors", target_options={"consumer": "any"})
    rows = {row.layer.fqn: row.sqnr_db for row in made.report.layers if row.weight is not None}
    assert rows["model.layers.1.self_attn.q_proj"] == float("inf")
    assert rows["model.layers.1.self_attn.o_proj"] != float("inf")


def test_fp8_of_transformers(tmp_path: Path) -> None:
    wanted = float8(tmp_path / "model", "mixtral", rows=16)
    made = graphq.compile(tmp_path / "model", {"graphq": 1, "weight": "float8_e4m3fn/16x16"})
    codes = [op for op in ops_of(made.graph) if isinstance(op, Dequantize)]
    assert codes
    assert {row.sqnr_db for row in made.report.layers if row.weight is not None} == {float("inf")}
    gm = graphq.compiler.capture(tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(gm.state_dict()[name], wanted[name].float())


def test_gpt_oss(tmp_path: Path) -> None:
    """Experts that the model holds as [E, K, N] and the files as blocks of [E, N, K]."""
    wanted = gpt_oss(tmp_path / "model")
    gm = graphq.compiler.capture(tmp_path / "model")
    stack = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(gm.state_dict()[stack], wanted[stack].float().transpose(1, 2))
    made = graphq.compile(tmp_path / "model", {"graphq": 1, "weight": "mxfp4"})
    rows = {row.layer.fqn: row.sqnr_db for row in made.report.layers if row.weight is not None}
    assert rows["model.layers.0.mlp.experts.2.down_proj"] == float("inf")
    assert rows["model.layers.1.mlp.experts.0.gate_up_proj"] == float("inf")
    assert rows["model.layers.1.self_attn.q_proj"] != float("inf")


def test_an_ascend_checkpoint(tmp_path: Path) -> None:
    plans = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"}
    folder = written(tmp_path / "ascend", plans, "ascend", num_hidden_layers=1)
    made = graphq.compile(folder, plans, target="ascend")
    made.emit("ascend", tmp_path / "again")
    assert same_bytes(held(tmp_path / "again"), held(folder)) == []


def test_explained_without_weights(checkpoint: Path) -> None:
    rows = graphq.explain(checkpoint, "w4a16").layers
    assert sum(row.weight is not None for row in rows) == 14


def test_what_is_not_read_is_named(checkpoint: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    name = "model.layers.1.mlp.down_proj.weight"  # which is float there
    changed(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(GraphError) as caught:
        graphq.compile(copied, "w4a16")
    assert (
        str(caught.value) == f"{copied}: {name}: LlamaForCausalLM has this tensor, and the files have none of its shape"
    )
    with pytest.raises(
        GraphError, match="example inputs or code of the directory's own are given, and its weights are"
    ):
        graphq.compile(checkpoint, "w4a16", inputs=(IDS,))
    (copied / "adapter_config.json").write_text("{}")
    (copied / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(GraphqError):
        graphq.compile(copied, "w4a16")
    with pytest.raises(graphq.SpecError, match="which holds the whole model"):
        graphq.compile(
            checkpoint,
            {"graphq": 1, "weight": "int8/channel", "input": "int8/tensor"},
            calibration=[(IDS,)],
            memory="100KB",
        )


def test_the_graph_of_a_quantized_model_is_printed(checkpoint: Path) -> None:
    gm = graph_after(checkpoint, "w4a16")
    assert sum(isinstance(op, Dequantize) for op in ops_of(gm)) == 14
