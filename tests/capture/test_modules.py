"""Capture of any module: the same numbers for every size, its own names, no leftovers of the trace, and clear refusals."""

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.capture.modules import capture_module
from graphq.capture.source import TensorInput, source_of
from graphq.capture.structure import flatten
from graphq.errors import GraphError
from graphq.ir.layers import layers
from graphq.ir.text import dump
from graphq.state import tensor_of
from tests.models import MLP, Attention, Blocks, ConvBnRelu, MoE, Tied, Twice


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0))


def made(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = model()
    for parameter in module.parameters():  # some are left empty by their modules
        parameter.data = torch.randn(parameter.shape)
    return module


def parameters_read(gm: fx.GraphModule) -> list[str]:
    return sorted(str(node.target) for node in gm.graph.nodes if node.op == "get_attr")


# -- the same function -------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[Tensor, ...]]] = {
    "mlp": (MLP, floats(3, 8), (floats(1, 8), floats(7, 8))),
    "mlp of sequences": (MLP, floats(3, 5, 8), (floats(1, 1, 8), floats(2, 9, 8), floats(4, 1, 8))),
    "blocks": (Blocks, floats(2, 8), (floats(1, 8), floats(6, 8))),
    "attention": (Attention, floats(2, 3, 8), (floats(1, 1, 8), floats(3, 4, 8))),
    "one module called twice": (Twice, floats(2, 8), (floats(1, 8), floats(5, 8))),
    "tied weights": (Tied, tokens(2, 3), (tokens(1, 1), tokens(4, 7))),
    "convolutions": (ConvBnRelu, floats(2, 4, 6, 6), (floats(1, 4, 6, 6), floats(3, 4, 6, 6))),
    "experts": (MoE, floats(6, 8), (floats(1, 8), floats(9, 8))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_gives_what_the_model_gives(case: str) -> None:
    factory, sample, others = CASES[case]
    model = made(factory).eval()
    gm = capture_module(model, sample)
    for x in (sample, *others):
        with torch.no_grad():
            (output,) = gm(x)
            expected = model(x)
        assert output.dtype == expected.dtype
        assert torch.equal(output, expected)  # the same ops on the same numbers
    assert parameters_read(gm) == sorted(
        dict(model.named_parameters(remove_duplicate=False)) | dict(_read_buffers(model))
    )


def _read_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]


def test_golden() -> None:
    assert_expected_inline(
        dump(capture_module(made(MLP), floats(2, 3, 8))),
        """\
%x: f32[batch, sequence, 8] = input
%1: f32[batch, sequence, 12] = aten.linear(%x, @up.weight, @up.bias)
%2: f32[batch, sequence, 12] = aten.relu(%1)
%3: f32[batch, sequence, 8] = aten.linear(%2, @down.weight, @down.bias)
return [%3]
""",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = made(MLP).to(dtype).eval()
    x = floats(3, 8).to(dtype)
    gm = capture_module(model, x)
    assert source_of(gm).dtype == dtype
    assert {node.meta["val"].dtype for node in gm.graph.nodes if node.op != "output"} == {dtype}
    with torch.no_grad():
        assert torch.equal(gm(x)[0], model(x))


def test_a_batch_of_1_is_no_constant() -> None:
    model = made(MLP).eval()
    gm = capture_module(model, floats(1, 8))
    with torch.no_grad():
        assert torch.equal(gm(floats(5, 8))[0], model(floats(5, 8)))
        assert torch.equal(gm(floats(1, 8))[0], model(floats(1, 8)))
    assert source_of(gm).inputs == (TensorInput("x", torch.float32, ("batch", 8)),)
    assert source_of(gm).ranges == (("batch", 1, 1 << 20),)


class Difference(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - 2 * b


def test_one_tensor_given_for_two_inputs_is_two_inputs() -> None:
    x, y = floats(3, 8), floats(3, 8, seed=1)
    gm = capture_module(Difference(), {"a": x, "b": x})
    assert torch.equal(gm(x, y)[0], x - 2 * y)


# -- inputs and outputs ------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> dict[str, Any]:
        x = self.up(x)
        x = x if mask is None else x * mask
        return {"first": x if scale is None else x * scale, "second": x.sum(-1), "third": None}


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (floats(2, 8), ["x"]),
        ((floats(2, 8),), ["x"]),
        ([floats(2, 8), floats(2, 8)], ["x", "mask"]),
        ({"x": floats(2, 8), "scale": torch.tensor(2.0)}, ["x", "scale"]),
        ({"mask": floats(2, 8), "x": floats(2, 8)}, ["x", "mask"]),  # in the order of forward, whatever the dict's
    ],
)
def test_inputs_by_position_and_by_name(inputs: Any, names: list[str]) -> None:
    model = made(Mixed)
    gm = capture_module(model, inputs)
    source = source_of(gm)
    assert [i.name for i in source.inputs] == names
    assert (source.output_kind, source.outputs) == ("structured", ("first", "second"))  # None is no tensor
    shapes: dict[str, tuple[int, ...]] = {"x": (5, 8), "mask": (5, 8), "scale": ()}
    given = {name: floats(*shapes[name], seed=i) for i, name in enumerate(names)}
    with torch.no_grad():
        for ours, theirs in zip(gm(*given.values()), model(**given).values(), strict=False):
            assert torch.equal(ours, theirs)


class Returns(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.up(x)
        match self.kind:
            case "tensor":
                return y
            case "tuple":
                return y, x
            case "list":
                return [y, x + 1]
            case "dict":
                return {"y": y, "none": None}
            case "nested":
                return y, [x, {"z": x + 1, "none": None}]
            case "number":
                return {"y": y, "count": 3}
            case "size":
                return y, x.shape[0]
            case "infinite":
                return y, float("inf")
            case "set":
                return {"y": y, "rest": ({x},)}
            case "twice":
                return {"a.b": y, "a": {"b": x}}
            case _:
                return ("no tensor", None)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tensor", ("tensor", ("output",))),
        ("tuple", ("tuple", ("output_0", "output_1"))),
        ("list", ("structured", ("output_0", "output_1"))),
        ("dict", ("structured", ("y",))),
        ("number", ("structured", ("y",))),
        ("nested", ("structured", ("output_0", "output_1.0", "output_1.1.z"))),
    ],
)
def test_structure_of_outputs(kind: str, expected: tuple[str, tuple[str, ...]]) -> None:
    model = Returns(kind)
    gm = capture_module(model, floats(2, 8))
    assert (source_of(gm).output_kind, source_of(gm).outputs) == expected
    x = floats(4, 8)
    flat = flatten(model(x), "")[1].values()
    assert all(torch.equal(a, b) for a, b in zip(gm(x), flat, strict=True))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "set",
            "Returns: output rest.0 is a set; outputs must be tensors, or tuples, lists, dicts and dataclasses of them",
        ),
        (
            "size",
            "Returns: output output_1 is a number that depends on the inputs; outputs must be tensors, or fixed",
        ),
        ("infinite", "Returns: output output_1 is inf; numbers among the outputs must be finite"),
        ("twice", "Returns: two outputs are called a.b; rename one"),
        ("text", "Returns returns a tuple without a tensor; outputs must be tensors"),
    ],
)
def test_outputs_that_are_no_tensors_are_refused(kind: str, message: str) -> None:
    with pytest.raises(GraphError, match=re.escape(message)):
        capture_module(Returns(kind), floats(2, 8))


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


X = floats(2, 8)
DECLARED = '{"batch": 2}'


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "inputs: none given; pass example inputs of Mixed.forward as a tuple or dict"),
        ({}, "inputs: none given; pass example inputs of Mixed.forward as a tuple or dict"),
        ((floats(2, 8),) * 3, "inputs: 3 given, Mixed.forward takes 2: x, mask"),
        ({"y": floats(2, 8)}, "inputs: Mixed.forward has no argument y; it takes x, mask, scale"),
        ((floats(2, 8), 3), "inputs: mask is a int; graphs take tensors"),
        ({"x": [floats(2, 8), 3]}, "inputs: x.1 is a int; graphs take tensors"),
        ({"x": {"a": [floats(2, 8), ()]}}, "inputs: x.a.1 is empty; leave it out"),
        ({"x": [Pair(X, X)]}, "inputs: x.0 is neither a tensor nor a list, tuple or dict of tensors"),
        (
            {"x": [{1, 2}]},
            "inputs: input x.0 is a set; inputs must be tensors, or tuples, lists, dicts and dataclasses of them",
        ),
        (
            (floats(2, 8), floats(3, 8)),
            (
                "inputs: the first dimensions differ (x (2, 8), mask (3, 8)); every input starts with the batch, unless it is "
                f"fixed: declare its one size with shapes={DECLARED}"
            ),
        ),
    ],
)
def test_inputs_that_no_graph_takes(inputs: Any, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        capture_module(Mixed(), inputs)
    assert str(caught.value) == message


# -- sizes -------------------------------------------------------------------------------------------------------------


class Sized(nn.Module):
    """What ``body`` does to its input, behind a linear."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.up(x))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: x.reshape(3, -1), "Sized: the model's code fixes dimension batch at 3"),
        (
            lambda x: x.reshape(-1, 3, 4),
            "Sized: the model's code restricts dimension batch: ((4*size 0 of x) % 12) == 0",
        ),
        (lambda x: x if x.shape[0] != 7 else -x, "Sized: the model's code restricts dimension batch: size 0 of x != 7"),
    ],
)
def test_a_model_that_restricts_its_batch_is_refused(body: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(GraphError) as caught:
        capture_module(Sized(body), floats(3, 4))
    assert str(caught.value).replace(".;", ";") == f'{message}; declare its one size with shapes={{"batch": 3}}'


def test_a_batch_that_is_never_restricted_is_not() -> None:
    """The near misses of the above: conditions that hold for every size."""
    for body in (lambda x: x.reshape(-1, 2, 2), lambda x: x if x.shape[0] >= 1 else -x):
        gm = capture_module(Sized(body), floats(3, 4))
        assert source_of(gm).inputs[0].shape == ("batch", 4)


def test_a_sequence_that_the_model_fixes_is_a_note() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.position = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.position

    model = Positions()
    gm = capture_module(model, floats(3, 6, 4))
    source = source_of(gm)
    assert source.inputs[0].shape == ("batch", 6, 4)
    assert source.notes == (
        "dimension 1 of the inputs is fixed: Positions: the model's code fixes dimension sequence at 6",
    )
    with torch.no_grad():
        assert torch.equal(gm(floats(5, 6, 4))[0], model(floats(5, 6, 4)))


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (tokens(3, 5), ("batch", "sequence")),
        (floats(3, 5, 4), ("batch", "sequence", 4)),
        (floats(3, 4), ("batch", 4)),  # features
        (tokens(3, 1), ("batch", 1)),  # one token: export would take it for a constant
        (floats(3, 2, 5, 4), ("batch", 2, 5, 4)),  # an image
    ],
)
def test_which_dimensions_are_dynamic(x: Tensor, shape: tuple[Any, ...]) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1)

    assert source_of(capture_module(Sum(), x)).inputs[0].shape == shape


# -- what cannot be traced ---------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.up(x).sum() > 0:
            return x
        return -x


def test_a_path_that_depends_on_values_names_layer_and_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"gate": Inner()})["gate"])
    with pytest.raises(GraphError) as caught:
        capture_module(model, floats(3, 4))
    text = re.sub(r"\(.*?test_modules\.py:\d+", "(test_modules.py:N", str(caught.value))
    assert text == (
        "1 (test_modules.py:N: if self.up(x).sum() > 0:): "
        "the path taken depends on the values of a tensor, which a graph cannot hold"
    )


def test_an_error_of_the_model_names_layer_and_line() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("the message\nwith a second line")

    model = nn.Sequential(nn.Linear(4, 4), Broken())
    with pytest.raises(GraphError) as caught:
        capture_module(model, floats(3, 4))
    text = re.sub(r"\(.*?test_modules\.py:\d+", "(test_modules.py:N", str(caught.value))
    assert text == (
        '1 (test_modules.py:N: raise RuntimeError("the message\\nwith a second line")): cannot be captured: the message'
    )


@pytest.mark.parametrize("what", ["buffer", "input"])
def test_a_model_that_changes_what_it_is_given_or_holds_is_refused(what: str) -> None:
    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if what == "buffer":
                self.count += 1
            else:
                x.add_(1)
            return x + self.count

    name = "count" if what == "buffer" else "x"
    with pytest.raises(GraphError) as caught:
        capture_module(Counting(), floats(3, 4))
    assert str(caught.value) == f"Counting changes {name} in place; a graph leaves its inputs and buffers alone"


# -- the graph itself --------------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y.relu_()
        y += 1
        y[:, 0] = 3
        return F.dropout(y, 0.5, self.training, inplace=True)


def test_no_op_of_the_graph_changes_its_input() -> None:
    model = made(InPlace).eval()
    gm = capture_module(model, floats(3, 4))
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.target
    with torch.no_grad():
        assert torch.equal(gm(floats(5, 4))[0], model(floats(5, 4)))


def test_no_guards_and_no_assertions_are_left() -> None:
    class Checked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check(x.shape[0] >= 1)
            return x.to(torch.float64).to(torch.float32) * 2

    gm = capture_module(Checked(), floats(3, 4))
    assert not [node for node in gm.graph.nodes if node.op == "call_module"]
    assert list(gm.children()) == []
    assert not [node for node in gm.graph.nodes if "assert" in str(node.target)]


def test_every_node_knows_value_layer_and_line() -> None:
    gm = capture_module(made(Blocks), floats(2, 8))
    assert all(node.meta["val"] is not None for node in gm.graph.nodes if node.op != "output")
    linears = [node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default]
    paths = [list(node.meta["nn_module_stack"].values())[-1][0] for node in linears]
    assert paths == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    assert all("models.py" in node.meta["stack_trace"] for node in linears)
    assert source_of(gm).blocks == ("blocks",)
    assert {fqn: layer.block for fqn, layer in layers(gm).items()} == {
        "blocks.0.up": 0,
        "blocks.0.down": 0,
        "blocks.1.up": 1,
        "blocks.1.down": 1,
        "head": None,
    }


def test_each_use_of_a_tied_weight_has_its_own_name() -> None:
    model = made(Tied)
    gm = capture_module(model, tokens(2, 3))
    assert parameters_read(gm) == ["embedding.weight", "head.weight"]
    shared = [tensor_of(gm, name).untyped_storage()._cdata for name in parameters_read(gm)]
    assert shared == [model.head.weight.untyped_storage()._cdata] * 2  # type: ignore[union-attr]


def test_a_module_of_two_names_and_a_weight_of_two_modules() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.c = nn.Linear(4, 4)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    model = Shared()
    gm = capture_module(model, floats(2, 4))
    read = set(parameters_read(gm))
    assert read <= set(dict(model.named_parameters(remove_duplicate=False)))
    assert {"a.weight", "a.bias", "c.weight", "c.bias"} <= read
    with torch.no_grad():
        assert torch.equal(gm(floats(5, 4))[0], model(floats(5, 4)))


def test_constants_of_the_code_are_held() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(4, 4)  # as the wrapper around every model is called, too
            self.plain = torch.tensor([1.0, 2.0, 3.0, 4.0])

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) * self.plain + torch.tensor([4.0, 3.0, 2.0, 1.0])

    model = Constant()
    gm = capture_module(model, floats(2, 4))
    with torch.no_grad():
        assert torch.equal(gm(floats(5, 4))[0], model(floats(5, 4)))
    assert {"model.weight", "model.bias", "plain"} <= set(parameters_read(gm))
    assert len(gm.state_dict()) == 4


def test_parameters_without_a_role_are_noted() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    gm = capture_module(Unused(), floats(2, 4))
    assert source_of(gm).notes == ("unused.weight has no role in the captured computation",)
    assert set(gm.state_dict()) == {"used.weight", "used.bias"}


# -- the caller's model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["captured", "refused"])
def test_the_model_is_left_as_it_was(outcome: str) -> None:
    convolutions = ConvBnRelu()
    model = nn.Sequential(convolutions, nn.Dropout(0.5), Sized(torch.neg) if outcome == "captured" else Inner()).train()
    convolutions.bn.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    x = floats(2, 4, 8, 6)
    given = x.clone()
    if outcome == "captured":
        capture_module(model, x)
    else:
        with pytest.raises(GraphError):
            capture_module(model, x)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert len(set(flags.values())) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(x, given)


def test_dropout_and_batch_norm_are_captured_in_evaluation() -> None:
    model = nn.Sequential(made(ConvBnRelu), nn.Dropout(0.5)).train()
    gm = capture_module(model, floats(2, 4, 6, 6))
    x = floats(3, 4, 6, 6)
    first = gm(x)[0]
    model.eval()
    with torch.no_grad():
        assert torch.equal(first, model(x))
    assert torch.equal(first, gm(x)[0])


def test_capture_prints_and_warns_nothing(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    capture_module(made(MLP), floats(2, 3, 8))
    with pytest.raises(GraphError):
        capture_module(Sized(lambda x: x.reshape(3, -1)), floats(3, 4))
    with pytest.raises(GraphError):
        capture_module(Inner(), floats(3, 4))
    printed = capfd.readouterr()
    assert (printed.out, printed.err, [str(w.message) for w in recwarn]) == ("", "", [])
