"""Names in the user's model that are also names of arguments, of graphq's own modules or of torch's, or Python's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphq
from graphq.capture.source import source_of
from graphq.errors import GraphError, TargetError
from graphq.runtime.onnx_session import OnnxSession
from graphq.verifier import verify

W8: dict[str, Any] = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}]}
W8A8: dict[str, Any] = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel", "input": "int8/token/dynamic"}]}


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = floats(3, 8)


def assert_everywhere(model: nn.Module, spec: dict[str, Any], inputs: dict[str, Tensor], path: Path) -> None:
    """The compiled model, its copies and its artifacts compute what the QDQ form does, and that what ``model`` does."""
    compiled = graphq.compile(model.eval(), spec, inputs=inputs)
    with torch.no_grad():
        expected, found = model(**inputs), compiled(**inputs)
        assert isinstance(found, Tensor)
        # int8 by channel: within 2 % of the largest output.
        assert 0 < (found - expected).abs().max() <= 0.02 * expected.abs().max()
        (qdq,) = compiled.graph(*(inputs[i.name] for i in source_of(compiled.graph).inputs))
    compiled.save(path / "torch")
    compiled.emit("onnx", path / "onnx")
    loaded = graphq.load(path / "torch")
    session = OnnxSession(path / "onnx" / "model.onnx", loaded.source)
    for call in (compiled, loaded, copy.deepcopy(loaded), session):
        assert (call(**inputs) - qdq).abs().max() <= 1e-5 * qdq.abs().max()
    assert verify(path / "torch").ok
    assert verify(path / "onnx").ok


# -- arguments of forward ----------------------------------------------------------------------------------------------


class OwnArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(floats(1, 8, seed=1))
        self.l = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x * self.x)


class DottedArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x: Tensor, l_bias: Tensor) -> Tensor:
        return self.l(x) + l_bias


class BufferArgument(nn.Module):
    """Its parameters have names that torch's exporter gives to results in between."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)
        self.register_buffer("mask", floats(8, seed=2))
        self.output, self.val_0, self.mul = (nn.Parameter(floats(8, seed=s)) for s in (3, 4, 5))

    def forward(self, x: Tensor, mask: Tensor, torch: Tensor) -> Tensor:
        own: Any = self.mask
        return self.l(x) * own * mask + self.output * self.val_0 * torch + self.mul


class AnyArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, **given: Tensor) -> Tensor:
        return self.l(given["a.b"]) + 2 * given["a_b"] - given["class"] * given["a b"] + given["input"]


ARGUMENTS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "a parameter": (OwnArgument, ("x",)),
    "a layer's bias": (DottedArgument, ("x", "l_bias")),
    "a buffer, a module of Python's": (BufferArgument, ("x", "mask", "torch")),
    "words, and one name twice but for a dot": (AnyArgument, ("a.b", "a_b", "class", "a b", "input")),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_named_like(case: str, tmp_path: Path) -> None:
    model, names = ARGUMENTS[case]
    torch.manual_seed(0)
    inputs = {name: floats(3, 8, seed=10 + i) for i, name in enumerate(names)}
    assert_everywhere(model(), W8, inputs, tmp_path)


def test_an_output_named_like_a_tensor_and_one_like_an_input(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.l = nn.Linear(8, 8)
            self.scale = nn.Parameter(floats(8))
            self.name = name

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {self.name: self.l(x) * self.scale}

    compiled = graphq.compile(Named("scale"), W8, inputs=X)
    compiled.emit("onnx", tmp_path / "scale")
    session = OnnxSession(tmp_path / "scale" / "model.onnx", source_of(compiled.graph))
    found, expected = (cast_dict(call(X))["scale"] for call in (session, compiled))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(TargetError, match=r"^onnx: x is the name of an input and of an output"):
        graphq.compile(Named("x"), W8, inputs=X).emit("onnx", tmp_path / "x")


def cast_dict(outputs: Any) -> dict[str, Tensor]:
    assert isinstance(outputs, dict)
    return outputs


# -- tensors and modules beside a quantized weight ---------------------------------------------------------------------

# Every name that a packed weight or an integer linear has had, or could be thought to have.
BESIDE = [
    *("bias", "columns", "transposed", "has_bias", "per_channel", "symmetric", "shape", "block", "dtype", "format"),
    *("codes", "settings", "hold", "parsed", "bits", "rows_first", "row_axes", "prepared", "scale", "scales"),
]


class Beside(nn.Module):
    """A layer ``l`` with a weight, and a tensor or a linear of its own under ``name``."""

    def __init__(self, name: str, child: bool, bias: bool = False) -> None:
        super().__init__()
        self.l = nn.Module()
        self.l.weight = nn.Parameter(floats(8, 8))
        self.l.register_parameter("own_bias", nn.Parameter(floats(8, seed=3)) if bias else None)
        setattr(self.l, name, nn.Linear(8, 8) if child else nn.Parameter(floats(8, seed=1)))
        self.name, self.child = name, child

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.l
        y, own = F.linear(x, layer.weight, layer.own_bias), getattr(layer, self.name)
        return own(y) if self.child else y * own + own


@pytest.mark.parametrize("spec", [W8, W8A8], ids=["weight", "integer product"])
@pytest.mark.parametrize("child", [False, True], ids=["tensor", "child"])
def test_a_layer_holds_names_of_packed_modules(child: bool, spec: dict[str, Any], tmp_path: Path) -> None:
    from graphq.lowering.torch.pack import pack

    for name in BESIDE:
        torch.manual_seed(0)
        model = Beside(name, child).eval()
        compiled = graphq.compile(model, spec, inputs=X)
        expected = model(X)
        found, (qdq,) = compiled(X), compiled.graph(X)
        assert isinstance(found, Tensor)
        assert (found - expected).abs().max() <= 0.03 * expected.abs().max(), name  # two int8 layers, inputs too
        assert (found - qdq).abs().max() <= 1e-5 * qdq.abs().max(), name
        state = set(pack(compiled.graph).state_dict())
        own = {f"l.{name}.weight", f"l.{name}.weight_scale", f"l.{name}.bias"} if child else {f"l.{name}"}
        assert state == {"l.weight", "l.weight_scale"} | own
        compiled.save(tmp_path / name)
        assert torch.equal(cast_tensor(graphq.load(tmp_path / name)(X)), found), name
        assert verify(tmp_path / name).ok


def cast_tensor(output: Any) -> Tensor:
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("child", [False, True], ids=["tensor", "child"])
def test_a_bias_of_another_name_leaves_the_layers_bias_alone(child: bool) -> None:
    model = Beside("bias", child, bias=True).eval()
    compiled = graphq.compile(model, W8A8, inputs=X)
    expected, found = model(X), cast_tensor(compiled(X))
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()
    assert "Int8Linear" not in {type(m).__name__ for n, m in compiled.module.graph.named_modules() if n == "l"}


def test_a_bias_of_another_name_alone_is_the_products() -> None:
    model = Beside("scale", child=False, bias=True).eval()
    compiled = graphq.compile(model, W8A8, inputs=X)
    expected, found = model(X), cast_tensor(compiled(X))
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()
    assert type(compiled.module.graph.get_submodule("l")).__name__ == "Int8Linear"


@pytest.mark.parametrize("name", ["weight_scale", "weight_zero_point", "weight_global_scale"])
def test_a_name_that_a_quantized_weight_needs_is_refused(name: str) -> None:
    model = Beside(name, child=False)
    message = (
        rf"^l\.{name}: the model has a tensor of this name, which graphq gives to the quantized weight of l; rename it$"
    )
    with pytest.raises(GraphError, match=message):
        graphq.compile(model, W8, inputs=X)
    keep: dict[str, Any] = {"graphq": 1, "rules": [{"match": "*", "float": True}]}
    assert torch.equal(cast_tensor(graphq.compile(model, keep, inputs=X)(X)), model(X))


# -- names that no graph can hold --------------------------------------------------------------------------------------


class Holding(nn.Module):
    """A linear, or a parameter, under any name, here or in a submodule."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.owner = "self" if where.startswith("root") else "inner"
        owner = self if where.startswith("root") else self.inner
        if where.endswith("tensor"):
            owner._parameters[name] = nn.Parameter(floats(8, 8))
        elif where.endswith("linear"):
            owner._modules[name] = nn.Linear(8, 8)
        else:
            owner._modules[name] = nn.ReLU()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        owner = self if self.owner == "self" else self.inner
        tensor = owner._parameters.get(self.name)
        child = owner._modules.get(self.name)
        return F.linear(x, tensor) if tensor is not None else child(x) if child is not None else x


WORD, LINE = "this is a word of Python's grammar", "it has a character that ends a line or a text"
TORCH, GRAPH = "every module of torch has an attribute of this name", "graphs have an attribute of this name"
REFUSED = {
    ("in", "root linear"): f"'in' cannot be a name in a graph: {WORD}; rename it",
    ("not", "inner linear"): f"'inner.not' cannot be a name in a graph: {WORD}; rename it",
    ("class", "inner tensor"): f"'inner.class' cannot be a name in a graph: {WORD}; rename it",
    ("graph", "root linear"): f"'graph' cannot be a name in a graph: {GRAPH}; rename it",
    ("meta", "root tensor"): f"'meta' cannot be a name in a graph: {GRAPH}; rename it",
    ("code", "root linear"): f"'code' cannot be a name in a graph: {GRAPH}; rename it",
    ("type", "inner linear"): f"'inner.type' cannot be a name in a graph: {TORCH}; rename it",
    ("train", "root linear"): f"'train' cannot be a name in a graph: {TORCH}; rename it",
    ("half", "inner relu"): f"'inner.half' cannot be a name in a graph: {TORCH}; rename it",
    ('a"b', "inner linear"): f"'inner.a\"b' cannot be a name in a graph: {LINE}; rename it",
    ("a\nb", "inner linear"): f"'inner.a\\nb' cannot be a name in a graph: {LINE}; rename it",
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_no_graph_can_hold(case: tuple[str, str]) -> None:
    with pytest.raises(GraphError) as caught:
        graphq.compile(Holding(*case), W8, inputs=X)
    assert str(caught.value) == REFUSED[case]


@pytest.mark.parametrize(
    "case",
    [
        *(("graph", "inner linear"), ("code", "inner tensor"), ("in_", "root linear"), ("self", "root tensor")),
        *(("source", "root linear"), ("generate", "root linear"), ("a b", "inner linear"), ("ü", "root tensor")),
    ],
)
def test_names_that_only_look_like_these(case: tuple[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert_everywhere(Holding(*case), W8, {"x": X}, tmp_path)


def test_a_module_without_tensors_may_have_a_word_for_a_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.add_module("in", nn.ReLU())
    assert (cast_tensor(graphq.compile(model, W8, inputs=X)(X)) >= 0).all()
