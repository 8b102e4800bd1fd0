"""A program gives what its graph gives, calls what it must, and sees what becomes of the graph."""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphq
from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.errors import GraphqError
from graphq.lowering.torch.pack import pack
from graphq.runtime import kernels, program
from graphq.runtime.kernels import native
from graphq.runtime.model import CompiledModel
from graphq.runtime.program import Program
from tests import models
from tests.compiled import compile_captured
from tests.models import DECODERS, MLP, capture, tiny

aten: Any = torch.ops.aten
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
needs_library = pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)
W8A8 = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"}


def packed_mlp() -> fx.GraphModule:
    torch.manual_seed(0)
    return pack(graphq.compile(MLP().eval(), W8A8, inputs=X).graph)


def test_golden() -> None:
    with kernels.using("torch"):
        code = Program(packed_mlp()).code
    assert_expected_inline(
        code,
        """\
def run(root, append, v0):
    m1 = root._modules['up']
    m2 = root._modules['down']
    v1 = c0(v0, c1, [1, -1])  # quantize_dynamic_default: graphq.quantize_dynamic.default
    del v0
    v2 = v1[0]  # getitem_3: <built-in function getitem>
    v3 = v1[1]  # getitem_4: <built-in function getitem>
    del v1
    v4 = m1(v2, v3, None)  # up: up
    del v2, v3
    v5 = c2(v4)  # relu: aten.relu.default
    del v4
    v6 = c0(v5, c3, [1, -1])  # quantize_dynamic_default_1: graphq.quantize_dynamic.default
    del v5
    v7 = v6[0]  # getitem_5: <built-in function getitem>
    v8 = v6[1]  # getitem_6: <built-in function getitem>
    del v6
    v9 = m2(v7, v8, None)  # down: down
    del v7, v8
    return (v9, )
""",
    )


@needs_library
def test_golden_with_a_region() -> None:
    assert_expected_inline(
        Program(packed_mlp()).code,
        """\
def ops0(m0, m1, v0):
    v1 = c0(v0, c1, [1, -1])  # quantize_dynamic_default: graphq.quantize_dynamic.default
    del v0
    v2 = v1[0]  # getitem_3: <built-in function getitem>
    v3 = v1[1]  # getitem_4: <built-in function getitem>
    del v1
    v4 = m0(v2, v3, None)  # up: up
    del v2, v3
    v5 = c2(v4)  # relu: aten.relu.default
    del v4
    v6 = c0(v5, c3, [1, -1])  # quantize_dynamic_default_1: graphq.quantize_dynamic.default
    del v5
    v7 = v6[0]  # getitem_5: <built-in function getitem>
    v8 = v6[1]  # getitem_6: <built-in function getitem>
    del v6
    v9 = m1(v7, v8, None)  # down: down
    del v7, v8
    return (v9, )
def run(root, append, v0):
    m1 = root._modules['up']
    m2 = root._modules['down']
    v9, = c4(ops0, (m1, m2, ), (v0, ))  # quantize_dynamic_default to down
    del v0
    return (v9, )
""",
    )


def inputs_of(gm: fx.GraphModule, batch: int = 2, sequence: int = 3, past: int = 4) -> tuple[Tensor, ...]:
    """A batch with numbers in its caches."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"batch": batch, "past_sequence": past}
    given: dict[str, Tensor] = {"input_ids": torch.randint(3, 60, (batch, sequence), generator=generator)}
    for wanted in source_of(gm).inputs:
        if wanted.is_cache:
            shape = [sizes[d] if isinstance(d, str) else d for d in wanted.shape]
            given[wanted.name] = torch.randn(shape, generator=generator).to(wanted.dtype)
    return complete(source_of(gm), given)


@pytest.mark.parametrize(
    "family", [f if f != "deepseek" else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS]
)
def test_gives_what_the_graph_gives(family: str) -> None:
    gm = models._captured(family)
    for batch in (inputs_of(gm), inputs_of(gm, 1, 1)):
        with torch.no_grad():
            for ours, its in zip(Program(gm, source_of(gm))(*batch), gm(*batch), strict=True):
                assert torch.equal(ours, its)


@pytest.mark.parametrize(
    "spec",
    [
        W8A8,
        {"graphq": 1, "weight": "int4/g32"},
        {"graphq": 1, "weight": "int4/g32", "input": "int8/asym/token/dynamic"},
    ],
)
def test_gives_what_the_packed_graph_gives(spec: dict[str, Any]) -> None:
    gm = pack(compile_captured("llama", spec).graph)
    for batch in (inputs_of(gm), inputs_of(gm, 1, 1)):
        with torch.no_grad(), kernels.using("torch"):  # its regions: test_region_call.py
            for ours, its in zip(Program(gm, source_of(gm))(*batch), gm(*batch), strict=True):
                assert torch.equal(ours, its)


T, M = torch.rand(2, 3, 4) + 0.5, torch.rand(2, 4, 4)
CALLS: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.add.Tensor: ((T, T), {"alpha": 2}),
    aten.bmm.default: ((T, M), {}),
    aten.cat.default: (([T, T], -1), {}),
    aten.clone.default: ((T,), {"memory_format": torch.contiguous_format}),
    aten.cos.default: ((T,), {}),
    aten.div.Tensor: ((T, 3), {}),
    aten.embedding.default: ((T[0], torch.tensor([[1, 0]]), 1), {}),
    aten.exp.default: ((T,), {}),
    aten.expand.default: ((T, [5, -1, -1, 4]), {}),
    aten.gelu.default: ((T,), {"approximate": "tanh"}),
    aten.layer_norm.default: ((T, [4], T[0, 0], None, 1e-3, False), {}),
    aten.linear.default: ((T, M[0], T[0, 0]), {}),
    aten.matmul.default: ((T, M), {}),
    aten.mean.dim: ((T, [-1, 0], True), {"dtype": torch.float64}),
    aten.mul.Tensor: ((T, 2.5), {}),
    aten.neg.default: ((T,), {}),
    aten.permute.default: ((T, [2, 0, 1]), {}),
    aten.pow.Tensor_Scalar: ((T, 3), {}),
    aten.relu.default: ((T,), {}),
    aten.reshape.default: ((T, [-1, 2]), {}),
    aten.roll.default: ((T, [1], [-1]), {}),
    aten.rsqrt.default: ((T,), {}),
    aten.scaled_dot_product_attention.default: ((T[None], T[None], T[None], None, 0.0, True), {"scale": 0.3}),
    aten.select.int: ((T, -1, 2), {}),
    aten.sigmoid.default: ((T,), {}),
    aten.silu.default: ((T,), {}),
    aten.sin.default: ((T,), {}),
    aten.sub.Tensor: ((T, 1), {"alpha": 3}),
    aten.tanh.default: ((T,), {}),
    aten.transpose.int: ((T, 0, -1), {}),
    aten.unsqueeze.default: ((T, -1), {}),
    aten.view.default: ((T, [6, -1]), {}),
}


class Called(TorchDispatchMode):
    """The ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append((func, repr((args, kwargs))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", program._ALIKE, ids=str)
def test_pythons_interface_calls_the_same_op(target: Any) -> None:
    args, kwargs = CALLS[target]
    found: list[tuple[Tensor, list[Any]]] = []
    for function in (target, program._ALIKE[target]):
        with torch.no_grad(), Called() as called:
            found.append((function(*args, **kwargs), called.ops))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0].dtype == found[1][0].dtype
    assert [op for op, _ in found[0][1]] == [op for op, _ in found[1][1]]


def test_numbers_are_left_to_the_schema() -> None:
    """Python's interface takes a number as the first factor of no product; the schema makes a tensor of it."""
    gm = capture(MLP(), X)
    size = gm.graph.find_nodes(op="placeholder")[0]
    output: Any = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        rows = gm.graph.call_function(aten.sym_size.int, (size, 0))
        product = gm.graph.call_function(aten.mul.Tensor, (rows, output.args[0][0]))
        half = gm.graph.call_function(aten.mul.Tensor, (0.5, product))
    output.args = ((half,),)
    gm.recompile()
    assert torch.equal(Program(gm)(X)[0], gm(X)[0])


# -- the graph and its tensors as they are now


def model_of(gm: fx.GraphModule) -> CompiledModel:
    return CompiledModel(gm).eval()


def test_tensors_are_those_of_the_module_now() -> None:
    model = graphq.compile(
        MLP().eval(), {"graphq": 1, "rules": [{"match": "up", "weight": "int8/channel"}]}, inputs=X
    ).module
    first = model(X)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: t * 2 if t.is_floating_point() else t for name, t in state.items()})
    assert not torch.equal(model(X), first)
    assert (model(X) - model.graph(X)[0]).abs().max() <= 1e-6 * first.abs().max()
    model.load_state_dict(state)
    assert torch.equal(model(X), first)
    copied = copy.deepcopy(model)
    copied.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
    assert torch.equal(model(X), first)
    assert not copied(X).any()


def test_hooks_and_other_modules_are_seen() -> None:
    model = model_of(packed_mlp())
    first = model(X)
    calls: list[int] = []
    handle = model.get_submodule("up").register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model(X), first)
    assert calls == [1]
    handle.remove()

    class Zeros(nn.Module):
        def forward(self, q: Tensor, *_: object) -> Tensor:
            return torch.zeros(q.shape[0], 12)

    model.graph.up = Zeros()
    assert torch.equal(model(X), model.graph(X)[0])
    assert not torch.equal(model(X), first)


def test_a_changed_graph_has_a_program_of_its_own() -> None:
    model = model_of(packed_mlp())
    first = model(X)
    made = model._program
    assert torch.equal(model(X), first)
    assert model._program is made
    output: Any = model.graph.graph.output_node()
    with model.graph.graph.inserting_before(output):
        output.args = ((model.graph.graph.call_function(aten.neg.default, (output.args[0][0],)),),)
    model.graph.recompile()
    assert torch.equal(model(X), -first)
    assert model._program is not made


def test_an_error_names_its_node() -> None:
    gm = packed_mlp()
    output: Any = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = ((gm.graph.call_function(aten.new_zeros.default, (output.args[0][0], [1 << 58])),),)
    gm.recompile()
    with pytest.raises(
        GraphqError, match=r"^new_zeros_default: aten.new_zeros.default: needs more memory than there is$"
    ):
        model_of(gm)(X)


def test_torch_compile_and_export_see_the_graph() -> None:
    model = model_of(capture(MLP(), X))
    expected = model(X)
    assert torch.equal(torch.compile(model, backend="eager")(X), expected)
    exported = torch.export.export(model.graph, (X,), strict=False)
    assert torch.equal(exported.module()(X)[0], expected)


# -- what a step calls


def step(spec: str, layers: int) -> tuple[CompiledModel, tuple[Tensor, ...]]:
    """A Llama of so many layers, and one token behind four."""
    gm = graphq.compile(tiny("llama", num_hidden_layers=layers), spec).module.graph
    return model_of(gm), inputs_of(gm, 1, 1)


def counted(call: Callable[[], object]) -> tuple[Counter[str], int]:
    """The ops that are called, by name, and how many functions of Python."""
    call()
    with torch.inference_mode(), Called() as called:
        call()
    names = Counter(str(op).partition(".")[2] for op, _ in called.ops)
    functions = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal functions
        functions += event == "call"

    with torch.inference_mode():
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
    return names, functions


def test_a_step_calls_no_more_than_it_must() -> None:
    """Each layer of a step costs so many ops and calls of Python functions, the rest of the model so many."""
    costs: list[tuple[Counter[str], int]] = []
    with kernels.using("torch"):  # what there is on every machine
        for layers in (1, 2):
            model, batch = step("w8a8", layers)
            costs.append(counted(partial(model._run, batch)))
    each = costs[1][0] - costs[0][0]
    assert_expected_inline(
        "\n".join(f"{count} {name}" for name, count in sorted(each.items(), key=lambda one: (-one[1], one[0]))),
        """\
16 mul.Tensor
10 view.default
8 div.Tensor
8 reshape.default
8 to.dtype
7 _int_mm.default
7 flatten.using_ints
7 mul_.Tensor
7 t.default
6 add.Tensor
4 abs.default
4 add_.Tensor
4 amax.default
4 clamp_.default
4 logical_not.default
4 round_.default
4 transpose.int
4 zeros.default
2 cat.default
2 mean.dim
2 pow.Tensor_Scalar
2 roll.default
2 rsqrt.default
1 scaled_dot_product_attention.default
1 silu.default""",
    )
    # Of 7 linears, two functions of torch, one of ours, and two that ask for a kernel; of 4 quantizers, which ask, too; of
    # 2 caches.
    assert costs[1][1] - costs[0][1] <= 7 * 5 + 4 * 8 + 4
