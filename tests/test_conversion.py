"""Checkpoints in another format: the same codes and scales, there and back, or a refusal that names the layers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graphq
from graphq.errors import GraphqError, TargetError
from graphq.ir.stored_codes import StoredWeight
from graphq.verifier import verify
from tests.lowering.checkpoints.ascend import reader
from tests.quantized_checkpoints import (
    EVERY_FORMAT,
    changed,
    decompressed,
    float8,
    gpt_oss,
    held,
    same_bytes,
    source,
    written,
)

IDS = torch.tensor([[3, 17, 64, 2, 90, 11, 5], [8, 8, 101, 0, 45, 6, 127]])
# What both formats have.
SHARED = """
graphq: 1
rules:
- {match: "*.[qkv]_proj", weight: int8/channel, input: int8/token/dynamic}
- {match: "*.0.*.o_proj", weight: int8/g32}
- {match: "*.1.*.o_proj", weight: int4/half/g32}
- {match: "*.0.*.gate_proj", weight: float8_e4m3fn/channel, input: float8_e4m3fn/token/dynamic}
- {match: "*.1.*.gate_proj", weight: int8/asym/joint/channel}
- {match: "*.0.*.up_proj", weight: mxfp4/even}
- {match: "*.1.*.up_proj", weight: mxfp8_e4m3/even, input: mxfp8_e4m3/even/dynamic}
- {match: "*.down_proj", weight: int8/half/channel, input: INPUT}
"""


def spec(static: str) -> str:
    return SHARED.replace("INPUT", static)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of compressed-tensors with what both formats have, static inputs among it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "shared"
    return written(folder, spec("int8/asym/joint/tensor"), calibration=[(IDS,)])


def test_there_and_back(shared: Path, tmp_path: Path) -> None:
    ascend, back = tmp_path / "ascend", tmp_path / "back"
    report = graphq.convert_checkpoint(shared, "ascend", ascend, consumer="any")
    assert report.notes[-1] == f"14 weights have the codes of {shared} (compressed-tensors 0.20.0, mixed-precision)"
    made, wanted = reader.read(ascend), decompressed(shared)
    assert sorted(made.layers()) == sorted(wanted)
    for layer, w in wanted.items():  # two readers, neither of which is graphq's
        assert torch.equal(reader.dequantized(made, layer).to(torch.bfloat16), w.to(torch.bfloat16)), layer
    own = held(shared)
    down = "model.layers.0.mlp.down_proj"
    assert made.description[f"{down}.weight"] == "W8A8"
    assert torch.equal(made.part(down, "input_scale"), own[f"{down}.input_scale"].float())
    assert torch.equal(made.part(down, "input_offset"), own[f"{down}.input_zero_point"].float())
    (ascend / "graphq.json").unlink()
    graphq.convert_checkpoint(ascend, "compressed-tensors", back, consumer="any")
    assert same_bytes(held(back), own) == []
    groups = [
        json.loads((p / "config.json").read_text())["quantization_config"]["config_groups"] for p in (back, shared)
    ]
    plans = [
        sorted(
            (*sorted(g["targets"]), g["format"], g["weights"]["symmetric"], bool(g["input_activations"]))
            for g in one.values()
        )
        for one in groups
    ]
    assert plans[0] == plans[1]
    assert verify(ascend.parent / "back").ok


def test_to_its_own_format_it_is_the_same_file(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "mix", EVERY_FORMAT)
    graphq.convert_checkpoint(checkpoint, "compressed-tensors", tmp_path / "again", consumer="any")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    one, other = (json.loads((p / "config.json").read_text()) for p in (checkpoint, tmp_path / "again"))
    assert one == other
    assert (tmp_path / "again" / "generation_config.json").is_file()


def test_an_artifact_of_graphq(tmp_path: Path) -> None:
    """Which has a manifest; symmetric static inputs stay symmetric."""
    made = graphq.compile(
        source(tmp_path / "source"), "w8a8-static", calibration=[(IDS,)], target="ascend", algorithm="rtn"
    )
    made.emit("ascend", tmp_path / "ascend")
    graphq.convert_checkpoint(tmp_path / "ascend", "compressed-tensors", tmp_path / "ct")
    back = tmp_path / "back"
    graphq.convert_checkpoint(tmp_path / "ct", "ascend", back)
    assert same_bytes(held(back), held(tmp_path / "ascend")) == []
    tags = [json.loads((p / "quant_model_description.json").read_text()) for p in (back, tmp_path / "ascend")]
    assert tags[0] == tags[1]


def test_experts(tmp_path: Path) -> None:
    plans = '{match: "*.experts.*", weight: int4/channel, input: int8/token/dynamic}'
    checkpoint = written(tmp_path / "moe", f"graphq: 1\nrules:\n- {plans}", "ascend", "mixtral")
    graphq.convert_checkpoint(checkpoint, "compressed-tensors", tmp_path / "ct", consumer="any")
    own = held(tmp_path / "ct")
    experts = [name for name in own if name.endswith("weight_packed")]
    assert len(experts) == 2 * 4 * 3
    made = reader.read(checkpoint)
    for layer, w in decompressed(tmp_path / "ct").items():
        assert torch.equal(reader.dequantized(made, layer).to(torch.bfloat16), w.to(torch.bfloat16)), layer
    (tmp_path / "ct" / "graphq.json").unlink()
    graphq.convert_checkpoint(tmp_path / "ct", "ascend", tmp_path / "back", consumer="any")
    assert same_bytes(held(tmp_path / "back"), held(checkpoint)) == []


def test_fp8_blocks_of_transformers(tmp_path: Path) -> None:
    """Scales that are numbers of the model's dtype are carried over; others are refused, layer by layer."""
    folder = tmp_path / "fp8"
    float8(folder, num_hidden_layers=1)
    with pytest.raises(TargetError) as caught:
        graphq.convert_checkpoint(folder, "compressed-tensors", tmp_path / "out", consumer="any")
    assert "self_attn.q_proj: its scales are no numbers of bfloat16, which stores them" in str(caught.value)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].to(torch.bfloat16).float()

    changed(folder, narrow)
    graphq.convert_checkpoint(folder, "compressed-tensors", tmp_path / "out", consumer="any")
    own, made = held(folder), held(tmp_path / "out")
    for name in (name for name in own if name.endswith("_proj.weight")):
        assert torch.equal(made[name].view(torch.uint8), own[name].view(torch.uint8))
        assert torch.equal(made[f"{name}_scale"].float(), own[f"{name}_scale_inv"])


def test_what_the_other_format_cannot_hold_is_named(tmp_path: Path) -> None:
    checkpoint = written(
        tmp_path / "w4", 'graphq: 1\nrules:\n- {match: "*.0.mlp.*", weight: int4/asym/joint/g16}\n', num_hidden_layers=1
    )
    with pytest.raises(TargetError) as caught:
        graphq.convert_checkpoint(checkpoint, "ascend", tmp_path / "out")
    lines = str(caught.value).splitlines()
    up = "ascend: model.layers.0.mlp.up_proj: int4/asym/joint/g16 (W4A16): vLLM-Ascend reads it from files of"
    assert any(line.startswith(up) for line in lines), lines
    assert len(lines) == 4
    assert lines[-1] == (
        f"ascend: codes are carried over as they are; to quantize it anew: graphq compile {checkpoint} --target ascend"
        " --spec ..."
    )
    assert not (tmp_path / "out").exists()


def test_experts_that_lie_the_other_way_are_named(tmp_path: Path) -> None:
    """gpt-oss holds its stacks as [inputs, outputs], gate and up interleaved."""
    gpt_oss(tmp_path / "model")
    with pytest.raises(TargetError) as caught:
        graphq.convert_checkpoint(tmp_path / "model", "compressed-tensors", tmp_path / "out", consumer="any")
    lines = str(caught.value).splitlines()
    way = "a linear whose weight is stored as [inputs, outputs] has no place among quantized linears; keep it float"
    roles = ("gate_up_proj", "down_proj")
    layers = [f"model.layers.{n}.mlp.experts.{e}.{role}" for n in range(2) for role in roles for e in range(4)]
    assert sorted(lines[:-1]) == sorted(f"compressed-tensors: {layer}: {way}" for layer in layers)
    assert not (tmp_path / "out").exists()


def test_each_weight_is_read_once_and_alone(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = StoredWeight.read

    def counted(self: StoredWeight) -> Any:
        read.append(self.layer)
        return plain(self)

    monkeypatch.setattr(StoredWeight, "read", counted)
    graphq.convert_checkpoint(shared, "ascend", tmp_path / "out", consumer="any")
    assert len(read) == len(set(read)) == 14


def test_unlike_scales_of_one_input_are_named(shared: Path, tmp_path: Path) -> None:
    checkpoint = written(
        tmp_path / "static",
        'graphq: 1\nrules:\n- {match: "*.[qkv]_proj", weight: int8/channel, input: int8/tensor}\n',
        calibration=[(IDS,)],
        num_hidden_layers=1,
    )
    attention = "model.layers.0.self_attn"
    changed(
        checkpoint, lambda t: t.update({f"{attention}.k_proj.input_scale": t[f"{attention}.k_proj.input_scale"] * 2})
    )
    with pytest.raises(GraphqError) as caught:
        graphq.convert_checkpoint(checkpoint, "ascend", tmp_path / "out")
    assert str(caught.value) == (
        f"{attention}.q_proj and {attention}.k_proj read one activation, and have unlike scales of it"
    )


def test_columns_whose_groups_are_no_neighbours_are_refused(tmp_path: Path) -> None:
    rules = 'graphq: 1\nrules:\n- {match: "*.up_proj", weight: int4/half/g16}\n'
    folder = written(tmp_path / "w4", rules, num_hidden_layers=1)
    layer = "model.layers.0.mlp.up_proj"
    order = torch.arange(64).flip(0) // 16
    changed(folder, lambda tensors: tensors.update({f"{layer}.weight_g_idx": order.to(torch.int32)}))
    with pytest.raises(TargetError) as caught:
        graphq.convert_checkpoint(folder, "compressed-tensors", tmp_path / "out")
    assert str(caught.value).splitlines() == [
        f"compressed-tensors: {layer}: pack-quantized: its groups are no neighbouring columns",
        "compressed-tensors: the model has none of the quantized weights",
        (
            "compressed-tensors: codes are carried over as they are; to quantize it anew: graphq compile"
            f" {folder} --target compressed-tensors --spec ..."
        ),
    ]


def test_caches_are_not_converted(tmp_path: Path) -> None:
    folder = written(tmp_path / "w8", "w8a8", num_hidden_layers=1)
    name = "model.layers.0.self_attn.k_scale"
    changed(folder, lambda tensors: tensors.update({name: torch.ones(1, dtype=torch.bfloat16)}))
    with pytest.raises(TargetError) as caught:
        graphq.convert_checkpoint(folder, "ascend", tmp_path / "out")
    assert str(caught.value).startswith(
        f"{folder}: {name}: the scales of a quantized cache (1 tensors): is not converted; "
    )


def test_what_is_no_quantized_checkpoint(shared: Path, tmp_path: Path) -> None:
    folder = source(tmp_path / "float", num_hidden_layers=1)
    for place, target, message in (
        (folder, "ascend", f"{folder}: is no quantized checkpoint; graphq compile quantizes float models"),
        (tmp_path / "none", "ascend", f"{tmp_path / 'none'}: no such directory"),
        (shared, "onnx", "onnx: is no checkpoint that codes are carried over to; compile for it: graphq compile"),
        (shared, "gguf", "gguf: no such target; there are torch, onnx, compressed-tensors, ascend"),
    ):
        with pytest.raises(TargetError) as caught:
            graphq.convert_checkpoint(place, target, tmp_path / "out")
        assert str(caught.value) == message


def test_what_stands_there_stays(shared: Path, tmp_path: Path) -> None:
    """An artifact is replaced by an artifact; a damaged checkpoint leaves it alone."""
    out = tmp_path / "out"
    graphq.convert_checkpoint(shared, "ascend", out, consumer="any")
    before = held(out)
    with pytest.raises(TargetError, match="exists"):
        graphq.convert_checkpoint(shared, "ascend", out, consumer="any")
    copied = Path(shutil.copytree(shared, tmp_path / "copied"))
    layer = "model.layers.1.self_attn.q_proj"
    scale = load_file(copied / "model.safetensors")[f"{layer}.weight_scale"]
    scale[0, 0] = torch.inf
    changed(copied, lambda tensors: tensors.update({f"{layer}.weight_scale": scale}))
    with pytest.raises(GraphqError, match=f"{layer}: int-quantized: a scale is NaN or Inf"):
        graphq.convert_checkpoint(copied, "ascend", out, consumer="any", overwrite=True)
    assert same_bytes(held(out), before) == []
    graphq.convert_checkpoint(shared, "ascend", out, consumer="any", overwrite=True)
