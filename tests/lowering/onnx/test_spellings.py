"""Spellings of linears: the graph's text, the ops that ONNX Runtime makes of it, and the same function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from expecttest import assert_expected_inline
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import graphq
from graphq.compiler import Compiled
from graphq.errors import SpecError, TargetError
from graphq.ir.text import dump
from graphq.lowering.onnx.form import onnx_form
from graphq.lowering.onnx.spellings import spell
from graphq.lowering.onnx.tensors import initializers
from graphq.lowering.profiles import profile_named
from tests.compiled import compile_captured
from tests.lowering.onnx.sessions import relative, run
from tests.models import Tied, random_inputs

ORT = profile_named("ort-cpu")
SHAPES = {2: (5, 64), 3: (2, 5, 64), 4: (2, 3, 5, 64)}
W8A8 = ("int8/channel", "uint8/tensor")
DYNAMIC = ("int8/channel", "int8/token/dynamic")


def sample(rank: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(SHAPES[rank], generator=torch.Generator().manual_seed(seed)) + 0.2


class Chain(nn.Module):
    """Two linears that share an input, and one without a bias."""

    def __init__(self, bias: bool = True, k: int = 64, n: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = nn.Linear(k, n, bias=bias), nn.Linear(k, n, bias=bias)
        self.down = nn.Linear(n, k, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.up(x)) * self.gate(x))


class GPT2(nn.Module):
    """A linear as GPT-2 has it, the weight ``[K, N]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(64, 48)), nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 64), self.weight).view(*x.shape[:-1], 48)


def compiled(model: nn.Module, weight: str, input: str | None, x: Tensor) -> Compiled:
    rule = {"match": "*", "weight": weight} | ({"input": input} if input else {})
    return graphq.compile(model.eval(), {"graphq": 1, "rules": [rule]}, inputs=x, calibration=[x])


def text(weight: str, input: str | None, rank: int = 3, model: nn.Module | None = None) -> str:
    """The graph as it is spelled for ONNX Runtime, without what stays of the layer's plan."""
    made = compiled(nn.Sequential(nn.Linear(64, 48)) if model is None else model, weight, input, sample(rank))
    return (
        "\n".join(line.partition("  #")[0] for line in dump(spell(onnx_form(made.graph), ORT, [].append)).splitlines())
        + "\n"
    )


def emitted(made: Compiled, folder: Path, profile: str | None = "ort-cpu") -> Path:
    made.emit("onnx", folder, profile=profile)
    assert graphq.verify(folder).ok
    return folder


def integers_are_alike(spelled: Path, portable: Path) -> None:
    """Codes, scales and zero points of both files, by their names."""
    ours, theirs = initializers(spelled), initializers(portable)
    names = [name for name in theirs if "weight" in name or "input" in name]
    assert names
    for name in names:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


# -- matmul ------------------------------------------------------------------------------------------------------------


def test_matmul() -> None:
    assert_expected_inline(
        text(*W8A8),
        """\
%input_1: f32[batch, sequence, 64] = input
%1: u8[batch, sequence, 64] = graphq.quantize(%input_1, @0.input_scale, @0.input_zero_point, None, 'uint8', [-1, -1, -1])
%2: f32[batch, sequence, 64] = graphq.dequantize(%1, @0.input_scale, @0.input_zero_point, None, 'uint8', [-1, -1, -1], f32)
%3: f32[64, 48] = graphq.dequantize(@0.weight, @0.weight_scale, None, None, 'int8', [-1, 1], f32)
%4: f32[batch, sequence, 48] = aten.matmul(%2, %3)
%5: f32[1, 48] = aten.unsqueeze(@0.bias, 0)
%6: f32[1, 1, 48] = aten.unsqueeze(%5, 0)
%7: f32[batch, sequence, 48] = aten.add.Tensor(%4, %6)
return [%7]
""",
    )
    assert_expected_inline(
        text("int8/asym/tensor", "uint8/tensor", 2),
        """\
%input_1: f32[batch, 64] = input
%1: u8[batch, 64] = graphq.quantize(%input_1, @0.input_scale, @0.input_zero_point, None, 'uint8', [-1, -1])
%2: f32[batch, 64] = graphq.dequantize(%1, @0.input_scale, @0.input_zero_point, None, 'uint8', [-1, -1], f32)
%3: f32[64, 48] = graphq.dequantize(@0.weight, @0.weight_scale, @0.weight_zero_point, None, 'int8/asym', [-1, -1], f32)
%4: f32[batch, 48] = aten.matmul(%2, %3)
%5: f32[1, 48] = aten.unsqueeze(@0.bias, 0)
%6: f32[1, 1, 48] = aten.unsqueeze(%5, 0)
%7: f32[1, batch, 48] = aten.add.Tensor(%4, %6)
%8: f32[batch, 48] = aten.squeeze.dim(%7, 0)
return [%8]
""",
    )


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("rank", SHAPES)
def test_static_linears_run_in_integers(rank: int, bias: bool, static: bool, tmp_path: Path) -> None:
    x = sample(rank)
    made = compiled(Chain(bias), *W8A8, x)
    folder = emitted(made, tmp_path / "a")
    names = [d for d in _dimensions(folder) if isinstance(d, str)]
    sizes = dict(zip(names, x.shape, strict=False)) if static else None
    (found,), ops = run(folder, x, sizes=sizes)
    assert (ops["MatMulIntegerToFloat"], ops["MatMul"], ops["Gemm"]) == (3, 0, 0)
    assert relative(found, made.graph(x)[0]) <= 1e-6  # integers are summed exactly, their scaling is rounded
    (plain,), ops = run(folder, x, optimize=False, sizes=sizes)
    assert ops["MatMul"] == 3
    assert relative(plain, made.graph(x)[0]) <= 1e-6  # sums of float32 in another order


def _dimensions(folder: Path) -> list[str | int]:
    (x,) = onnx.load(folder / "model.onnx").graph.input
    return [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]


@pytest.mark.parametrize("weight", ["int8/asym/channel", "int5/channel", "uint8/channel", "int8/tensor"])
def test_other_weights_of_static_linears(weight: str, tmp_path: Path) -> None:
    x = sample()
    made = compiled(Chain(), weight, "uint8/tensor", x)
    (found,), ops = run(emitted(made, tmp_path / "a"), x)
    assert ops["MatMulIntegerToFloat"] == 3
    assert relative(found, made.graph(x)[0]) <= 1e-6  # as above
    integers_are_alike(tmp_path / "a", emitted(made, tmp_path / "b", None))


@pytest.mark.parametrize(
    ("weight", "input", "op", "count"),
    [
        ("int8/channel", "uint8/tensor", "MatMulIntegerToFloat", 1),
        ("int8/channel", "int8/token/dynamic", "MatMulInteger", 1),
        ("int4/asym/g16", None, "MatMulNBits", 1),
    ],
)
def test_transposed_linears(weight: str, input: str | None, op: str, count: int, tmp_path: Path) -> None:
    x = sample()
    made = compiled(nn.Sequential(GPT2()), weight, input, x)
    (found,), ops = run(emitted(made, tmp_path / "a"), x)
    assert ops[op] == count
    assert relative(found, made.graph(x)[0]) <= 1e-6  # as above
    integers_are_alike(tmp_path / "a", emitted(made, tmp_path / "b", None))


# -- matmul_integer ----------------------------------------------------------------------------------------------------


def test_matmul_integer() -> None:
    assert_expected_inline(
        text(*DYNAMIC),
        """\
%input_1: f32[batch, sequence, 64] = input
%1: (f32, i8) = graphq.choose_scale(%input_1, 'int8', [1, 1, -1])
%2: f32[batch, sequence, 1] = item(%1, 0)
%3: u8[] = aten.full([], 128, dtype=u8)
%4: u8[batch, sequence, 64] = graphq.quantize(%input_1, %2, %3, None, 'uint8', [1, 1, -1])
%5: i32[batch, sequence, 48] = graphq.integer_matmul(%4, @0.weight, None, 128, 'int8')
%6: f32[batch, sequence, 48] = aten.to.dtype(%5, f32)
%7: f32[batch, sequence, 48] = aten.mul.Tensor(%6, @0.weight_scale)
%8: f32[batch, sequence, 48] = aten.mul.Tensor(%7, %2)
%9: f32[batch, sequence, 48] = aten.add.Tensor(%8, @0.bias)
return [%9]
""",
    )
    assert_expected_inline(
        text("int8/asym/channel", "int8/asym/token/dynamic"),
        """\
%input_1: f32[batch, sequence, 64] = input
%1: (f32, i8) = graphq.choose_scale(%input_1, 'int8/asym', [1, 1, -1])
%2: f32[batch, sequence, 1] = item(%1, 0)
%3: i8[batch, sequence, 1] = item(%1, 1)
%4: i32[batch, sequence, 1] = aten.to.dtype(%3, i32)
%5: i32[batch, sequence, 1] = aten.add.Tensor(%4, 128)
%6: u8[batch, sequence, 1] = aten.to.dtype(%5, u8)
%7: u8[batch, sequence, 64] = graphq.quantize(%input_1, %2, %6, None, 'uint8', [1, 1, -1])
%8: i32[batch, sequence, 48] = graphq.integer_matmul(%7, @0.weight, @0.weight_zero_point, 128, 'int8/asym')
%9: i32[batch, sequence, 1] = aten.to.dtype(%3, i32)
%10: i32[batch, sequence, 48] = aten.mul.Tensor(%9, @0.weight_sums)
%11: i32[batch, sequence, 48] = aten.sub.Tensor(%8, %10)
%12: f32[batch, sequence, 48] = aten.to.dtype(%11, f32)
%13: f32[batch, sequence, 48] = aten.mul.Tensor(%12, @0.weight_scale)
%14: f32[batch, sequence, 48] = aten.mul.Tensor(%13, %2)
%15: f32[batch, sequence, 48] = aten.add.Tensor(%14, @0.bias)
return [%15]
""",
    )


DYNAMICS = (
    DYNAMIC,
    ("int8/asym/channel", "int8/asym/token/dynamic"),
    ("int8/tensor", "uint8/token/dynamic"),
    ("uint8/channel", "int8/half/token/dynamic"),
    ("int4/channel", "int8/by_sign/token/dynamic"),
    ("int2/channel", "int8/token/dynamic"),
    ("int4/asym/channel", "int8/asym/joint/token/dynamic"),
    ("int8/channel", "int8/tensor/dynamic"),
    ("int8/channel", "int8/asym/tensor/dynamic"),
)


@pytest.mark.parametrize("optimize", [True, False], ids=["default", "as-written"])
@pytest.mark.parametrize(("weight", "input"), DYNAMICS)
def test_rows_of_unequal_scale_keep_their_bias(weight: str, input: str, optimize: bool, tmp_path: Path) -> None:
    # With y * (scale * weight_scale) + bias, ONNX Runtime 1.31 fuses and loses the bias.
    x = sample() * torch.tensor([1e-3, 1.0, 30.0, 0.0, 5.0])[:, None]
    made = compiled(nn.Sequential(nn.Linear(64, 48)), weight, input, x)
    (found,), ops = run(emitted(made, tmp_path / "a"), x, optimize=optimize)
    assert ops["MatMulInteger"] + ops["MatMulIntegerToFloat"] == 1
    assert relative(found, made.graph(x)[0]) <= 1e-6  # integers are summed exactly, their scaling is rounded
    integers_are_alike(tmp_path / "a", emitted(made, tmp_path / "b", None))


@pytest.mark.parametrize("input", ["int8/token/dynamic", "int8/half/token/dynamic", "int8/asym/token/dynamic"])
def test_the_codes_of_dynamic_inputs_are_the_same(input: str, tmp_path: Path) -> None:
    """Identity weights show the codes themselves; halves between two codes and a token of zeros are among them."""
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = torch.eye(64)
    rows = torch.arange(-63.5, 64.0, 1.0)[None].repeat(3, 1)[:, ::2] * torch.tensor([[1.0], [0.0], [0.37]])
    rows[0, 0] = -127.0  # the scale is 1 where it is absmax / 127: every element is a half
    made = compiled(nn.Sequential(layer), "int8/tensor", input, rows)
    (found,), ops = run(emitted(made, tmp_path / "a"), rows)
    assert ops["MatMulInteger"] == 1
    expected = made.graph(rows)[0]
    assert expected[1].eq(0).all()
    assert relative(found, expected) <= 1e-6  # a code off by one is 4e-3 and more


def test_one_quantizer_serves_all_its_linears(tmp_path: Path) -> None:
    x = sample()
    made = compiled(Chain(), *DYNAMIC, x)
    emitted(made, tmp_path / "a")
    ops = [node.op_type for node in onnx.load(tmp_path / "a" / "model.onnx").graph.node]
    assert (ops.count("MatMulInteger"), ops.count("Round"), ops.count("ReduceMax")) == (3, 2, 2)


# -- matmul_nbits ------------------------------------------------------------------------------------------------------


def test_matmul_nbits() -> None:
    assert_expected_inline(
        text("int4/asym/g16", None),
        """\
%input_1: f32[batch, sequence, 64] = input
%1: f32[batch, sequence, 48] = graphq.nbits_matmul(%input_1, @0.weight, @0.weight_scale, @0.weight_zero_point, @0.bias, 64, 48, 4, 16, 0)
return [%1]
""",
    )
    assert_expected_inline(
        text("int3/channel", None),
        """\
%input_1: f32[batch, sequence, 64] = input
%1: f32[48, 1] = aten.reshape(@0.weight_scale, [-1, 1])
%2: f32[48, 1] = aten.expand(%1, [48, 1])
%3: f32[batch, sequence, 48] = graphq.nbits_matmul(%input_1, @0.weight, %2, None, @0.bias, 64, 48, 4, 64, 0)
return [%3]
""",
    )
    assert_expected_inline(
        text("int4/g32", "int8/token/dynamic"),
        """\
%input_1: f32[batch, sequence, 64] = input
%1: f32[batch, sequence, 48] = graphq.nbits_matmul(%input_1, @0.weight, @0.weight_scale, None, @0.bias, 64, 48, 4, 32, 4)
return [%1]
""",
    )


@pytest.mark.parametrize(
    ("weight", "k"),
    [
        ("int4/g16", 64),
        ("int4/asym/g32", 80),  # a short last block
        ("int4/16x16", 64),
        ("int4/asym/g16", 48),  # an odd number of blocks: half a byte of zero points is left over
        ("int4/g64", 256),
        ("int4/asym/g128", 256),
        ("int4/g256", 512),
        ("int3/asym/g32", 64),
        ("int2/g32", 64),
        ("int4/channel", 72),
        ("int4/asym/channel", 256),
        ("int3/asym/tensor", 64),
    ],
)
@pytest.mark.parametrize("input", [None, "uint8/tensor", "int16/tensor"])
def test_narrow_weights_leave_their_input_alone(weight: str, input: str | None, k: int, tmp_path: Path) -> None:
    x = torch.randn(7, k, generator=torch.Generator().manual_seed(0))
    made = compiled(nn.Sequential(nn.Linear(k, 48)), weight, input, x)
    folder = emitted(made, tmp_path / "a")
    for rows in (x, x[:1]):  # decoding has a kernel of its own
        (found,), ops = run(folder, rows)
        assert ops["MatMulNBits"] == 1
        assert relative(found, made.graph(rows)[0]) <= 1e-6  # 3e-3 where the input is rounded to 8 bits
    integers_are_alike(folder, emitted(made, tmp_path / "b", None))


@pytest.mark.parametrize("weight", ["int4/g32", "int4/asym/g16", "int8/g32", "int8/asym/g64"])
def test_inputs_by_token_are_rounded_by_group(weight: str, tmp_path: Path) -> None:
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(256, 48)
    made = compiled(nn.Sequential(layer), weight, "int8/token/dynamic", x)
    folder = emitted(made, tmp_path / "a")
    note = "onnx: ort-cpu: 0: MatMulNBits rounds its input to int8 by group, not by token"
    assert [found for found in made.report.notes if found.startswith("onnx")] == [note]
    (found,), ops = run(folder, x)
    assert ops["MatMulNBits"] == 1
    expected = made.graph(x)[0]
    assert 1e-6 < relative(found, expected) <= 2e-2  # another rounding of the input
    exact = compiled(nn.Sequential(layer), weight, None, x).graph(x)[0]
    assert (found - exact).norm() <= (expected - exact).norm()  # groups have smaller scales than tokens
    integers_are_alike(folder, emitted(made, tmp_path / "b", None))


# -- what stays as it is -----------------------------------------------------------------------------------------------

STAYS: tuple[tuple[str, str | None], ...] = (
    ("int8/channel", None),  # 8 bits alone are slower
    ("int8/g16", None),
    ("int8/channel", "int16/tensor"),
    ("int8/g16", "uint8/tensor"),
    ("int8/channel", "float8_e4m3fn/tensor"),
    ("int8/channel", "int6/token/dynamic"),
    ("int8/channel", "int8/g16/dynamic"),
    ("float8_e4m3fn/channel", "float8_e4m3fn/tensor"),
    ("int4/over_int8/g8", "int8/token/dynamic"),
)


@pytest.mark.parametrize(("weight", "input"), STAYS)
def test_what_has_no_spelling_stays(weight: str, input: str | None) -> None:
    form, notes = onnx_form(compiled(Chain(), weight, input, sample()).graph), list[str]()
    assert dump(spell(form, ORT, notes.append)) == dump(form)
    assert notes == []


@pytest.mark.parametrize("weight", ["int4/g24", "int4/asym/g8"])
def test_groups_that_the_op_lacks(weight: str) -> None:
    form = onnx_form(compiled(nn.Sequential(nn.Linear(64, 48)), weight, None, sample()).graph)
    notes: list[str] = []
    assert dump(spell(form, ORT, notes.append)) == dump(form)
    note = "onnx: ort-cpu: 0: MatMulNBits has groups of 16, 32, 64, 128, 256 alone: computed in float"
    assert notes == [note]


class Row(nn.Module):
    """A linear of one row, without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[0, 0])


@pytest.mark.parametrize("model", ["conv", "row", "bfloat16"])
def test_other_ops_stay(model: str) -> None:
    x = torch.randn(2, 64, 9) if model == "conv" else sample()
    layer = {"conv": nn.Conv1d(64, 48, 1), "row": Row()}.get(model, nn.Linear(64, 48))
    if model == "bfloat16":
        x, layer = x.bfloat16(), layer.bfloat16()
    form = onnx_form(compiled(nn.Sequential(layer), "int8/channel", "uint8/tensor", x).graph)
    assert dump(spell(form, ORT, [].append)) == dump(form)


@pytest.mark.parametrize("profile", ["qnn-htp", "generic-int8"])
def test_gemm_is_the_portable_form(profile: str) -> None:
    form = onnx_form(compiled(Chain(), *W8A8, sample()).graph)
    assert dump(spell(form, profile_named(profile), [].append)) == dump(form)


# -- weights with several readers --------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One linear, called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


class Pair(nn.Module):
    """Two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("model", [Shared, Pair])
@pytest.mark.parametrize(("weight", "input"), [W8A8, DYNAMIC, ("int4/asym/g16", None)])
def test_a_weight_of_two_linears(
    weight: str, input: str | None, model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    x = sample()
    made = compiled(model(), weight, input, x)
    (found,), ops = run(emitted(made, tmp_path / "a"), x)
    assert ops["MatMulIntegerToFloat"] + ops["MatMulInteger"] + ops["MatMulNBits"] == 2
    assert relative(found, made.graph(x)[0]) <= 1e-6  # as above
    integers_are_alike(tmp_path / "a", emitted(made, tmp_path / "b", None))
    weights = [[name for name in initializers(tmp_path / file) if name.endswith(".weight")] for file in "ab"]
    assert weights[0] == weights[1]  # one where it is one in the QDQ form: a bias may have given each its scales


def test_a_tied_head_and_embedding_stay(tmp_path: Path) -> None:
    tokens = torch.arange(6).reshape(2, 3)
    rules = [{"match": name, "weight": "int4/channel"} for name in ("embedding", "head")]
    made = graphq.compile(Tied().eval(), {"graphq": 1, "rules": rules}, inputs=tokens)
    (found,), ops = run(emitted(made, tmp_path / "a"), tokens)
    assert ops["MatMulNBits"] == 0
    assert [note for note in made.report.notes if note.startswith("onnx")] == [
        "onnx: ort-cpu: head: other ops read its weight, too: spelled as for any consumer"
    ]
    assert relative(found, made.graph(tokens)[0]) <= 1e-6  # sums of float32 in another order


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "weight", "input", "op"),
    [
        ("llama", "int4/asym/g32", None, "MatMulNBits"),
        pytest.param("opt", *W8A8, "MatMulIntegerToFloat", marks=pytest.mark.slow),
        pytest.param("gpt2", *DYNAMIC, "MatMulInteger", marks=pytest.mark.slow),
    ],
)
def test_language_models(family: str, weight: str, input: str | None, op: str, tmp_path: Path) -> None:
    rule = {"match": "blocks", "weight": weight} | ({"input": input} if input else {})
    made = compile_captured(family, {"graphq": 1, "rules": [rule]})
    inputs = random_inputs(made.graph, 2, 5)
    found, ops = run(emitted(made, tmp_path / "a"), *inputs)
    assert ops[op] == sum(layer.weight is not None for layer in made.report.layers)
    with torch.no_grad():
        expected = made.graph(*inputs)[0]
    # Of float inputs: another order of sums. Of 8 bits: codes off by one, of inputs that differ in their last bits.
    assert (found[0] - expected).abs().max() <= (1e-5 if input is None else 2e-2) * expected.abs().max()
    integers_are_alike(tmp_path / "a", emitted(made, tmp_path / "b", None))


@pytest.mark.parametrize(("weight", "input"), [W8A8, DYNAMIC])
def test_the_standard_operators_in_their_own_reference(weight: str, input: str, tmp_path: Path) -> None:
    x = sample()
    made = compiled(Chain(), weight, input, x)
    made.emit("onnx", tmp_path / "a", profile="ort-cpu", opset=21)  # the reference has no DequantizeLinear of 13
    model: Any = onnx.load(tmp_path / "a" / "model.onnx")
    (found,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})  # type: ignore[misc]
    assert relative(torch.from_numpy(found), made.graph(x)[0]) <= 1e-6  # sums of float32 in another order


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_a_profile_that_there_is_not(tmp_path: Path) -> None:
    made = compiled(nn.Sequential(nn.Linear(64, 48)), *W8A8, sample())
    with pytest.raises(SpecError, match=r"^profile: npu: no such profile; there are ort-cpu, "):
        made.emit("onnx", tmp_path / "a", profile="npu")
    with pytest.raises(TargetError, match=r"^onnx: opset 26: ort-cpu reads 13 to 25$"):
        made.emit("onnx", tmp_path / "a", profile="ort-cpu", opset=26)
    assert list(tmp_path.iterdir()) == []
