"""Float parameters in artifacts: the source's own bytes, or what a fold made of them, and the QDQ form's own numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import graphq
from graphq.capture.source import KEY, record_stored, source_of
from graphq.compiler import Compiled
from graphq.ir import edit
from graphq.ir.text import dump
from graphq.ir.views import view
from graphq.lowering.stored import hold_stored, stored
from graphq.lowering.torch.pack import pack
from graphq.runtime.modules import Int8Linear
from graphq.runtime.onnx_session import OnnxSession
from graphq.state import put_tensor, tensor_of
from graphq.verifier import verify
from tests.checkpoints import write_tokenizer
from tests.models import MLP, Tied, capture, random_inputs, tiny

STDLIB = Path(__file__).parents[2] / "examples" / "models" / "stdlib-llama"
TOKENS = torch.tensor([[0, 3, 15], [7, 7, 1]])
W4 = [{"match": "blocks", "weight": "int4/g16"}]
W8A8 = [{"match": "blocks", "weight": "int8/channel", "input": "int8/tensor"}]


def qdq(
    model: nn.Module, x: Tensor, rules: list[dict[str, str]], dtype: torch.dtype = torch.bfloat16
) -> fx.GraphModule:
    """The QDQ form of a model of ``dtype`` that was captured in float32."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).to(dtype).float()
    gm = graphq.compile(model.eval(), {"graphq": 1, "rules": rules}, inputs=x, calibration=[x]).graph
    gm.meta[KEY] = dataclasses.replace(source_of(gm), dtype=dtype)
    record_stored(gm)
    return gm


def dtypes(gm: fx.GraphModule) -> dict[str, str]:
    return {name: str(t.dtype).removeprefix("torch.") for name, t in gm.state_dict().items() if t.is_floating_point()}


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_casts_stand_in_front_of_their_readers() -> None:
    x = torch.ones(3, 8)
    gm = qdq(MLP(), x, [{"match": "up", "weight": "int4/g4"}])
    before = dump(gm)
    packed = pack(gm)
    assert_expected_inline(
        dump(packed),
        """\
%x: f32[batch, 8] = input
%1: f32[batch, 12] = @up(%x)
%2: f32[batch, 12] = aten.relu(%1)
%3: f32[8, 12] = aten.to.dtype(@down.weight, f32)
%4: f32[8] = aten.to.dtype(@down.bias, f32)
%5: f32[batch, 8] = aten.linear(%2, %3, %4)  # down: float (no rule matches it)
return [%5]
""",
    )
    assert dump(gm) == before
    assert dtypes(packed) == {
        "up.weight_scale": "float32",
        "up.bias": "bfloat16",
        "down.weight": "bfloat16",
        "down.bias": "bfloat16",
    }
    with torch.no_grad():
        assert torch.equal(packed(x)[0], gm(x)[0])


def test_rows_are_looked_up_before_they_are_cast_and_tied_tensors_stay_one() -> None:
    gm = qdq(Tied(), TOKENS, [{"match": "head", "weight": "int8/channel"}])
    gm.meta[KEY] = dataclasses.replace(source_of(gm), stored=torch.float16, wide=frozenset())
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.copy_(parameter.half())
    packed = pack(gm)
    assert_expected_inline(
        dump(packed),
        """\
%tokens: i64[batch, sequence] = input
%1: f16[batch, sequence, 8] = aten.embedding(@embedding.weight, %tokens)  # embedding: float (embedding: quantized only when a rule names it)
%2: f32[batch, sequence, 8] = aten.to.dtype(%1, f32)
%3: f32[batch, sequence, 8] = aten.silu(%2)
%4: f32[batch, sequence, 16] = @head(%3)
return [%4]
""",
    )
    assert dtypes(packed)["embedding.weight"] == "float16"
    with torch.no_grad():
        wanted = gm(TOKENS)[0]
        assert (packed(TOKENS)[0] - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_tied_tensors_stay_one() -> None:
    gm = qdq(Tied(), TOKENS, [{"match": "head", "weight": "int8/channel"}])
    shared = tensor_of(gm, "embedding.weight")
    op = next(node for node in gm.graph.nodes if node.op == "call_function")
    put_tensor(gm, "second.weight", shared)
    with gm.graph.inserting_before(op):
        read = gm.graph.get_attr("second.weight")
    read.meta["val"] = edit.fake_mode_of(gm).from_tensor(shared.detach(), static_shapes=True)
    user = view(op)
    made = edit.insert(gm, edit.following(user), torch.ops.aten.mul.Tensor, view(read), 2.0, by="test")
    output = next(node for node in gm.graph.nodes if node.op == "output")
    output.args = ((*output.args[0], made.node),)
    packed = pack(gm)
    assert tensor_of(packed, "second.weight").dtype == torch.bfloat16
    places = {tensor_of(packed, f"{name}.weight").data_ptr() for name in ("embedding", "second")}
    assert len(places) == 1


class ReadTwice(nn.Module):
    """Parameters of one shape that are not tied."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.empty(32, 32)) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for gain in self.gains:
            x = x * gain
        return x


def test_parameters_that_several_nodes_read_keep_their_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = capture(ReadTwice(), torch.ones(2, 32, 32))
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.copy_(torch.randn(parameter.shape).bfloat16())
    gm.meta[KEY] = dataclasses.replace(source_of(gm), dtype=torch.bfloat16)
    record_stored(gm)
    for node in gm.graph.find_nodes(op="get_attr"):
        (user,) = node.users
        with gm.graph.inserting_before(user):
            again = gm.graph.node_copy(node)
            twice = gm.graph.call_function(torch.ops.aten.mul.Tensor, (user.args[0], again))
        twice.meta = dict(user.meta)
        user.args = (twice, node)
    wanted = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    freed: list[Tensor] = []

    def stored_there(gm: fx.GraphModule, fqn: str) -> Tensor:
        """As if the allocator gave the narrow numbers the memory that the last wide ones had."""
        held = stored(gm, fqn)
        place = freed.pop().detach().view(torch.bfloat16).flatten()[: held.numel()] if freed else held.flatten()
        freed.append(tensor_of(gm, fqn))
        return nn.Parameter(place.view(held.shape).copy_(held), requires_grad=False)

    monkeypatch.setattr("graphq.lowering.stored.stored", stored_there)
    hold_stored(gm)
    found = gm.state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert [name for name in wanted if not torch.equal(found[name].float(), wanted[name])] == []


def test_numbers_that_the_dtype_does_not_hold_stay_as_they_are() -> None:
    gm = qdq(MLP(), torch.ones(3, 8), [{"match": "up", "weight": "int4/g4"}])
    with torch.no_grad():
        tensor_of(gm, "down.bias")[0] = 1 / 3
    assert dtypes(pack(gm)) == {
        "up.weight_scale": "float32",
        "up.bias": "bfloat16",
        "down.weight": "bfloat16",
        "down.bias": "float32",
    }
    assert stored(gm, "down.bias") is tensor_of(gm, "down.bias")


def test_an_integer_linear_holds_its_bias_in_16_bits() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    int8 = {"weight": "int8/channel", "input": "int8/token/dynamic"}
    gm = qdq(MLP(), x, [{"match": name, **int8} for name in ("up", "down")])
    packed = pack(gm)
    made: Any = packed.get_submodule("up")
    assert isinstance(made, Int8Linear)
    assert (made.get_buffer("bias").dtype, made.graphq_form.bias_dtype) == (torch.bfloat16, torch.bfloat16)
    with torch.no_grad():
        expected, found = gm(x)[0], packed(x)[0]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # integer sums


def test_float32_sources_are_left_alone() -> None:
    gm = qdq(MLP(), torch.ones(3, 8), [{"match": "up", "weight": "int4/g4"}], torch.float32)
    packed = pack(gm)
    assert set(dtypes(packed).values()) == {"float32"}
    assert "aten.to" not in dump(packed)
    assert packed.get_parameter("down.weight").data_ptr() == gm.get_parameter("down.weight").data_ptr()


# -- artifacts ---------------------------------------------------------------------------------------------------------


def directory(path: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model directory of ``dtype``."""
    options = {"num_hidden_layers": 1} if family == "llama" else {}
    tiny(family, **options).to(dtype).save_pretrained(path)
    write_tokenizer(path)
    return path


def compiled(path: Path, rules: list[dict[str, str]], *algorithms: Any, **options: Any) -> Compiled:
    batches = [torch.randint(1, 100, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    spec = {"graphq": 1, "rules": rules, "algorithms": list(algorithms)}
    return graphq.compile(path, spec, calibration=batches, **options)


def initializers(path: Path) -> dict[str, int]:
    return {value.name: value.data_type for value in onnx.load(path / "model.onnx").graph.initializer}


def check_torch(made: Compiled, path: Path, narrow: torch.dtype) -> dict[str, Tensor]:
    """The artifact holds the QDQ form's parameters in ``narrow``, and verifies; all that it holds."""
    made.emit("torch", path / "torch")
    assert verify(path / "torch").ok
    held = graphq.load(path / "torch").graph.state_dict()
    for name, tensor in made.graph.named_parameters(remove_duplicate=False):
        assert held[name].dtype == narrow, name
        assert torch.equal(held[name].float(), tensor.detach()), name
    return held


def check_artifacts(made: Compiled, path: Path, narrow: torch.dtype, bound: float = 1e-5) -> dict[str, Tensor]:
    """Both artifacts hold the QDQ form's parameters in ``narrow``, verify, and give its logits; what torch's holds."""
    held = check_torch(made, path, narrow)
    made.emit("onnx", path / "onnx")
    kinds = initializers(path / "onnx")
    number = onnx.TensorProto.BFLOAT16 if narrow == torch.bfloat16 else onnx.TensorProto.FLOAT16
    names = {name for name, _ in made.graph.named_parameters(remove_duplicate=False)} & kinds.keys()
    assert {kinds[name] for name in names} == {number}
    assert "model.embed_tokens.weight" in names  # a tied head has no name of its own
    assert verify(path / "onnx").ok
    inputs = random_inputs(made.graph, 2, 7)
    session: Any = OnnxSession(path / "onnx" / "model.onnx", source_of(made.graph))
    with torch.no_grad():
        expected = made.graph(*inputs)[0]
        loaded = graphq.load(path / "torch").graph(*inputs)[0]
        assert (loaded - expected).abs().max() <= bound * expected.abs().max()
        found = session(*inputs)["logits"]
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    return held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_changed_has_the_sources_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    path = directory(tmp_path / "model", dtype=dtype)
    source = load_file(path / "model.safetensors")
    held = check_artifacts(compiled(path, W4), tmp_path, dtype)
    floats = [name for name in held if name in source and held[name].is_floating_point()]
    assert len(floats) == 5  # embedding, head, three norms
    assert all(torch.equal(held[name], source[name]) for name in floats)


@pytest.mark.parametrize(
    "algorithms",
    [("awq",), ("smooth-quant",), ("rotate", "gptq", "correct-bias")],
    ids="+".join,
)
def test_no_float_parameter_is_inexact_after_folds(algorithms: tuple[str, ...], tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    source = load_file(path / "model.safetensors")
    held = check_torch(compiled(path, W4, *algorithms), tmp_path, torch.bfloat16)
    changed = [name for name in held if name in source and not torch.equal(held[name], source[name])]
    assert any(held[name].dtype == torch.bfloat16 for name in changed)  # or folds were not tried


def test_quantized_inputs(tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    check_artifacts(compiled(path, W8A8, "smooth-quant"), tmp_path, torch.bfloat16, bound=0.05)  # codes off by one


def test_dtype_says_otherwise(tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    made = compiled(path, W4, "smooth-quant", dtype=torch.float32)
    assert source_of(made.graph).stored is None
    made.emit("torch", tmp_path / "a")
    held = load_file(tmp_path / "a" / "model.safetensors")
    assert held["model.norm.weight"].dtype == torch.float32
    assert any(not torch.equal(t.bfloat16().float(), t) for t in held.values() if t.dtype == torch.float32)


def test_the_report_counts_what_is_stored(tmp_path: Path) -> None:
    path = directory(tmp_path / "model")
    for options, size in (({}, 2), ({"dtype": torch.float32}, 4)):
        made = compiled(path, W4, **options)
        made.emit("torch", tmp_path / f"a{size}")
        held = load_file(tmp_path / f"a{size}" / "model.safetensors")
        found = {layer.layer.fqn: layer for layer in made.report.layers}
        for layer in ("lm_head", "model.embed_tokens"):
            weight = held[f"{layer}.weight"]
            assert weight.element_size() == size
            assert found[layer].nbytes == weight.numel() * size, layer
            assert found[layer].float_nbytes == weight.numel() * 2
        packed = "model.layers.0.mlp.up_proj"
        on_disk = sum(t.numel() * t.element_size() for name, t in held.items() if name.startswith(f"{packed}."))
        assert found[packed].nbytes == on_disk


def test_float32_parameters_of_a_16_bit_source(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", dtype=torch.float32)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    made = compiled(path, W4, "smooth-quant")
    assert "model.embed_tokens.weight" in source_of(made.graph).wide
    made.emit("torch", tmp_path / "a")
    held = load_file(tmp_path / "a" / "model.safetensors")
    source = load_file(path / "model.safetensors")
    assert torch.equal(held["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    found = {layer.layer.fqn: layer for layer in made.report.layers}
    assert found["lm_head"].nbytes == held["lm_head.weight"].numel() * 4


def test_the_example_model(tmp_path: Path) -> None:
    made = compiled(STDLIB, W4)
    held = check_artifacts(made, tmp_path, torch.bfloat16)
    source = load_file(STDLIB / "model.safetensors")
    floats = [name for name, tensor in held.items() if tensor.dtype == torch.bfloat16]
    assert floats
    assert all(torch.equal(held[name], source.get(name, source["model.embed_tokens.weight"])) for name in floats)
    assert [name for name, t in held.items() if t.dtype == torch.float32 and not name.endswith("_scale")] == [
        "model.rotary_emb.inv_freq"
    ]
