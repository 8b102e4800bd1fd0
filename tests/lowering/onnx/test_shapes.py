"""ONNX files of fixed sizes: every dimension a number, nothing computed from sizes, and the QDQ form's numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.artifacts import manifest
from graphq.artifacts.inspect import inspect
from graphq.capture.source import source_of
from graphq.compiler import Compiled
from graphq.data.batches import complete
from graphq.errors import SpecError, TargetError
from graphq.runtime.onnx_session import OnnxSession
from tests.capture.test_sizes import Recurrent, Timed
from tests.lowering.onnx import families
from tests.models import ConvBnRelu, tiny

RULES: dict[str, Any] = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}]}
OF_SHAPES = ("Shape", "Size", "Range", "ConstantOfShape", "NonZero", "Loop", "If")


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def emitted(made: Compiled, path: Path, **options: Any) -> tuple[onnx.ModelProto, OnnxSession]:
    """The model that was written, and a session of it by what its manifest says."""
    made.emit("onnx", path, **options)
    onnx.checker.check_model(str(path / "model.onnx"), full_check=True)
    source = manifest.source_of_artifact(path, manifest.read(path))
    return onnx.load(path / "model.onnx"), OnnxSession(path / "model.onnx", source)


def sizes(value: onnx.ValueInfoProto) -> list[int | str]:
    """A value's sizes; ? where the file says nothing of one."""
    tensor = value.type.tensor_type
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]


def assert_static(model: onnx.ModelProto) -> None:
    """Every value has numbers for sizes, and no node computes a size, or a constant from constants."""
    graph = model.graph
    known = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    constants = {i.name for i in graph.initializer if i.name.startswith(("val_", "constants."))}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    for node in graph.node:
        assert node.op_type not in OF_SHAPES
        for name in filter(None, node.output):
            assert name in known, f"{node.op_type} {name}"
            assert known[name].type.tensor_type.HasField("shape"), f"{node.op_type} {name}"
            assert all(isinstance(size, int) for size in sizes(known[name])), f"{name} {sizes(known[name])}"
        reads = [name for name in node.input if name]
        assert node.op_type == "Constant" or not constants.issuperset(reads), f"{node.op_type} {node.output[0]}"


def assert_equal(made: Compiled, session: OnnxSession, *inputs: Tensor, bound: float = 1e-5) -> None:
    """The session gives what the QDQ form gives, by the largest number of each output."""
    with torch.no_grad():
        expected = made.graph(*inputs)
    taken = [i.name for i in source_of(made.graph).inputs]
    found = session._run(tuple(x for x, name in zip(inputs, taken, strict=True) if name in session_names(session)))
    for name, a, b in zip(source_of(made.graph).outputs, expected, found, strict=True):
        assert a.shape == b.shape, name
        assert (a - b).abs().max() <= bound * a.abs().max(), name


def session_names(session: OnnxSession) -> set[str]:
    return {i.name for i in session.source.inputs}


class Attention(nn.Module):
    """Causal attention with positions: as much arithmetic of sizes as in a language model."""

    ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.positions = nn.Embedding(16, 8)
        self.register_buffer("ids", torch.arange(16)[None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.norm(x + self.positions(self.ids[:, :length]))
        q, k, v = self.qkv(h).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h.transpose(1, 2).flatten(2))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, int], dict[str, int]]] = {
    "attention": (Attention, (floats(2, 5, 8),), {}, {"batch": 1, "sequence": 7}),
    "convolutions": (ConvBnRelu, (floats(2, 4, 8, 6),), {}, {"batch": 3}),
    "recurrent": (Recurrent, (floats(1, 5, 4), floats(2, 1, 4)), {"batch": 1}, {}),
    "timestep": (Timed, (floats(1, 3, 6, 6), floats(1)), {"batch": 1}, {"batch": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_size_is_a_number(case: str, tmp_path: Path) -> None:
    factory, inputs, captured, shapes = CASES[case]
    torch.manual_seed(0)
    made = graphq.compile(factory().eval(), RULES, inputs=inputs, shapes=captured)
    model, session = emitted(made, tmp_path / "a", shapes=shapes)
    assert_static(model)
    fixed = captured | shapes
    declared = [[fixed[d] if isinstance(d, str) else d for d in i.shape] for i in source_of(made.graph).inputs]
    assert [sizes(value) for value in model.graph.input] == declared
    given = tuple(floats(*shape, seed=3) for shape in declared)
    assert_equal(made, session, *given)
    assert graphq.verify(tmp_path / "a").ok
    found = inspect(tmp_path / "a")
    assert list(found.to_json()["inputs"].values()) == declared
    assert f"batch {fixed['batch']}" in str(found)
    other = floats(fixed["batch"] + 1, *given[0].shape[1:])
    name = session.source.inputs[0].name
    with pytest.raises(SpecError, match=rf"^inputs: {name} has shape .*; batch is {fixed['batch']} in this graph$"):
        session(other, *given[1:])


def test_other_dimensions_stay_dynamic(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = graphq.compile(Attention().eval(), RULES, inputs=floats(2, 5, 8))
    model, session = emitted(made, tmp_path / "a", shapes={"sequence": 7})
    assert [sizes(value) for value in (*model.graph.input, *model.graph.output)] == [["batch", 7, 8]] * 2
    for batch in (1, 4):
        assert_equal(made, session, floats(batch, 7, 8))


@pytest.mark.parametrize(
    ("shapes", "lines"),
    [
        ({"b": 1}, ["onnx: shapes: no dimension b; there are batch, sequence"]),
        (
            {"batch": 0, "sequence": 17},
            ["onnx: shapes: batch: 0: it is 1 to 1,048,576", "onnx: shapes: sequence: 17: it is 1 to 16"],
        ),
        ({"batch": "1"}, ["onnx: shapes: {'batch': '1'} is not whole numbers by name or null"]),
        ([1], ["onnx: shapes: [1] is not whole numbers by name or null"]),
    ],
)
def test_sizes_that_cannot_be(shapes: Any, lines: list[str], attention: Compiled, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        attention.emit("onnx", tmp_path / "a", shapes=shapes)
    assert str(caught.value).splitlines() == lines
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def attention() -> Compiled:
    return graphq.compile(Attention().eval(), RULES, inputs=floats(2, 5, 8))


def test_the_other_target_has_no_shapes(attention: Compiled, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"^torch: no option shapes; there are overwrite$"):
        attention.emit("torch", tmp_path / "a", shapes={"batch": 1})


def test_prefill_and_decode(tmp_path: Path) -> None:
    """A language model as two files of fixed sizes, which give together what one graph gives."""
    made = graphq.compile(tiny("llama", num_hidden_layers=1).eval(), RULES)
    ids = torch.randint(0, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = made.graph(*complete(source_of(made.graph), ids))
    prefill, first = emitted(made, tmp_path / "prefill", shapes={"batch": 1, "sequence": 5, "past_sequence": 0})
    decode, then = emitted(made, tmp_path / "decode", shapes={"batch": 1, "sequence": 1, "past_sequence": 5})
    for model in (prefill, decode):
        assert_static(model)
    assert {v.name: sizes(v) for v in prefill.graph.input} == {
        "input_ids": [1, 5],
        "attention_mask": [1, 5],
        "position_ids": [1, 5],
    }
    shapes = {v.name: sizes(v) for v in (*decode.graph.input, *decode.graph.output)}
    assert shapes["attention_mask"] == [1, 6]
    assert shapes["past_key_values.0.key"] == [1, 2, 5, 16]
    assert shapes["present.0.key"] == [1, 2, 6, 16]
    start: Any = first(ids[:, :5])
    after: Any = then(ids[:, 5:], past_key_values=[(start["present.0.key"], start["present.0.value"])])
    logits = torch.cat([start.logits, after.logits], 1)
    assert (logits - whole[0]).abs().max() <= 1e-5 * whole[0].abs().max()
    assert (after["present.0.key"] - whole[1]).abs().max() <= 1e-5 * whole[1].abs().max()
    alone: Any = then(ids[:, :1])  # the mask hides a cache that nothing was written to
    assert (alone.logits - whole[0][:, :1]).abs().max() <= 1e-5 * whole[0].abs().max()
    with pytest.raises(SpecError, match=r"^inputs: input_ids has shape \(1, 2\); sequence is 1 in this graph$"):
        then(ids[:, :2])


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    model, inputs, shapes = families.FAMILIES[family]()
    made = graphq.compile(model.eval(), RULES, inputs=inputs, shapes=shapes)
    source = source_of(made.graph)
    fixed = {"batch": 1, "sequence": 7, "past_sequence": 5}
    named = {d: fixed[d] for d, low, high in source.ranges if low < high}
    static, session = emitted(made, tmp_path / "a", shapes=named)
    assert_static(static)
    given = families.given(source, fixed | source.fixed)
    made.save(tmp_path / "torch")
    loaded: Any = graphq.load(tmp_path / "torch")
    with torch.no_grad():
        expected, found, again = made.graph(*given), session._run(given), loaded.graph(*given)
    for name, a, b, c in zip(source.outputs, expected, found, again, strict=True):
        if family != "rt_detr" or name.startswith("encoder_last"):  # which of equal scores are the largest is not said
            assert (a - b).abs().max() <= 1e-5 * a.abs().max(), name
            assert (a - c).abs().max() <= 1e-5 * a.abs().max(), name
    assert graphq.verify(tmp_path / "a").ok
    named_inputs = dict(zip((i.name for i in source.inputs), given, strict=True))
    theirs, ours = model(**named_inputs), loaded(**named_inputs)
    assert list(ours.keys()) == list(theirs.keys()) if hasattr(theirs, "keys") else type(ours) is type(theirs)


def test_a_consumer_of_fixed_sizes_is_told_of_free_ones(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    made = graphq.compile(nn.Conv2d(3, 4, 3), profile="qnn-htp", inputs=x, calibration=[x])
    told = "onnx: qnn-htp wants sizes that are fixed, by shapes; these are free: batch"
    made.emit("onnx", tmp_path / "fixed", shapes={"batch": 1})
    assert told not in made.report.notes
    made.emit("onnx", tmp_path / "free")
    assert told in made.report.notes
    assert graphq.lint(tmp_path / "fixed", "qnn-htp").model == ()
    assert graphq.lint(tmp_path / "free", "qnn-htp").model != ()
