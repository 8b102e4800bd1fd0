"""The QDQ form in ONNX's terms: shapes of scales, rows of Conv1D, one weight for each expert, no cache; same numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graphq
from graphq import numerics
from graphq.capture.source import KEY, record_stored, source_of
from graphq.errors import PassError
from graphq.ir.text import dump
from graphq.ir.views import Dequantize, Param, ops_of
from graphq.lowering.experts import expert_linears
from graphq.lowering.onnx.form import OnnxBlock, onnx_block, onnx_form, onnx_scale
from graphq.spec.formats import Int
from graphq.state import tensor_of
from tests.compiled import blocks_spec, compile_captured
from tests.models import MLP, MoE, random_inputs

aten = torch.ops.aten
X = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))


def qdq(model: nn.Module, **spec: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    return graphq.compile(model.eval(), {"graphq": 1, **spec}, inputs=X, calibration=[X]).graph


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "shape", "form"),
    [
        ([-1, -1], [6, 8], OnnxBlock(None, None)),
        ([1, -1], [6, 8], OnnxBlock(0, None)),
        ([-1, 1], [6, 8], OnnxBlock(1, None)),
        ([1, 4], [6, 8], OnnxBlock(1, 4)),
        ([4, 1], [8, 6], OnnxBlock(0, 4)),
        ([1, 8], [6, 8], OnnxBlock(0, None)),  # one group: a channel's
        ([1, 100], [6, 8], OnnxBlock(0, None)),
        ([1, 4], [1, 8], OnnxBlock(1, 4)),  # one channel
        ([1, -1], [1, 8], OnnxBlock(None, None)),
        ([1, -1, -1, -1], [8, 4, 3, 3], OnnxBlock(0, None)),
        ([1, 2, -1, -1], [8, 4, 3, 3], OnnxBlock(1, 2)),
        ([1, 1], [6, 8], OnnxBlock(1, 1)),  # a scale for each element
        ([1, 1, -1], [4, 6, 8], OnnxBlock(2, 8)),  # two axes are cut: blocks as long as the third
    ],
)
def test_where_onnx_wants_scales(block: list[int], shape: list[int], form: OnnxBlock) -> None:
    assert onnx_block(block, shape) == form


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([-1, 1, 2, 3, 7])), min_size=1, max_size=3))
def test_onnx_dequantizes_to_the_same_numbers(axes: list[tuple[int, int]]) -> None:
    """A foreign DequantizeLinear, with the scales as the form gives them, against ``numerics.dequantize``."""
    shape, block = [size for size, _ in axes], [b for _, b in axes]
    if sum(1 < b < size for size, b in axes) > 1:
        return  # no format of graphq has blocks along two axes
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale, zero_point, _ = numerics.choose_scale(w, Int(8, symmetric=False), block)
    codes = numerics.quantize(w, numerics.Scales(scale, zero_point), Int(8, symmetric=False), block)
    assert zero_point is not None
    form = onnx_block(block, shape)
    inputs = [codes.numpy(), *(onnx_scale(part, block, shape).numpy() for part in (scale, zero_point))]
    found = _dequantize_linear(inputs, form)
    assert np.array_equal(
        found, numerics.dequantize(codes, numerics.Scales(scale, zero_point), Int(8, symmetric=False), block).numpy()
    )


def _dequantize_linear(inputs: list[np.ndarray], form: OnnxBlock) -> Any:
    """ONNX Runtime's."""
    node: Any = onnx.helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"])
    for name, value in (("axis", form.axis), ("block_size", form.size)):
        if value is not None:
            node.attribute.append(onnx.helper.make_attribute(name, value))
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
    given = zip("xsz", kinds, inputs, strict=True)
    taken = [onnx.helper.make_tensor_value_info(name, kind, x.shape) for name, kind, x in given]
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, inputs[0].shape)
    opsets = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", taken, [y]), opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, dict(zip("xsz", inputs, strict=True)))[0]


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_golden() -> None:
    down = {"match": "down", "weight": "int8/channel", "input": "int8/asym/tensor"}
    gm = qdq(MLP(), rules=[{"match": "up", "weight": "int4/asym/g4"}, down])
    before = {key: value.shape for key, value in gm.state_dict().items()}
    text = dump(gm)
    made = onnx_form(gm)
    assert_expected_inline(
        dump(made),
        """\
%x: f32[batch, 8] = input
%1: f32[12, 8] = graphq.dequantize(@up.weight, @up.weight_scale, @up.weight_zero_point, None, 'int4/asym', [1, 4], f32)
%2: f32[batch, 12] = aten.linear(%x, %1, @up.bias)  # up: weight int4/asym/g4
%3: f32[batch, 12] = aten.relu(%2)
%4: i8[batch, 12] = graphq.quantize(%3, @down.input_scale, @down.input_zero_point, None, 'int8/asym', [-1, -1])
%5: f32[batch, 12] = graphq.dequantize(%4, @down.input_scale, @down.input_zero_point, None, 'int8/asym', [-1, -1], f32)
%6: f32[8, 12] = graphq.dequantize(@down.weight, @down.weight_scale, None, None, 'int8', [1, -1], f32)
%7: f32[batch, 8] = aten.linear(%5, %6, @down.bias)  # down: weight int8/channel, input int8/asym/tensor
return [%7]
""",
    )
    shapes = {key: tuple(value.shape) for key, value in made.state_dict().items() if "bias" not in key}
    assert shapes == {
        "up.weight": (12, 8),
        "up.weight_scale": (12, 2),
        "up.weight_zero_point": (12, 2),
        "down.weight": (8, 12),
        "down.weight_scale": (8,),
        "down.input_scale": (),
        "down.input_zero_point": (),
    }
    assert dump(gm) == text
    assert {key: value.shape for key, value in gm.state_dict().items()} == before


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 12))
        self.bias = nn.Parameter(torch.empty(12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("weight", ["int8/channel", "int8/tensor", "int4/asym/g4"])
def test_conv1d_is_stored_as_rows(weight: str) -> None:
    gm = qdq(nn.Sequential(Conv1D()), weight=weight)
    made = onnx_form(gm)
    assert torch.equal(tensor_of(made, "0.weight"), tensor_of(gm, "0.weight").t())
    assert tensor_of(gm, "0.weight").shape == (8, 12)
    assert [n.target for n in made.graph.nodes if n.op == "call_function"] == [
        Dequantize.target,
        aten.t.default,
        aten.addmm.default,
    ]
    read = next(op for op in ops_of(made) if isinstance(op, Dequantize))
    assert isinstance(read.codes, Param)
    whole = tensor_of(made, "0.weight_scale")
    expected = tensor_of(gm, "0.weight_scale")
    assert whole.numel() == expected.numel()
    assert torch.equal(whole.flatten(), expected.t().flatten())


def test_embeddings_and_linears_keep_their_layout() -> None:
    gm = qdq(MLP(), weight="int8/channel")
    made = onnx_form(gm)
    for name in ("up.weight", "down.weight", "up.bias"):
        assert tensor_of(made, name).data_ptr() == tensor_of(gm, name).data_ptr()  # nothing is copied


# -- experts -----------------------------------------------------------------------------------------------------------


def test_each_expert_has_its_own_weight() -> None:
    rules: list[dict[str, Any]] = [
        {"match": "experts", "weight": "int4/asym/g4"},
        {"match": "experts.1", "weight": "int8/channel"},
        {"match": "experts.3.down_proj", "float": True},
    ]
    model = MoE()
    gm = qdq(model, rules=rules)
    made = onnx_form(gm)
    state = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    gate = {
        **{f"experts.{e}.gate_proj.weight{part}": shape for e in (0, 2, 3) for part, shape in _GROUPED.items()},
        "experts.1.gate_proj.weight": (6, 8),
        "experts.1.gate_proj.weight_scale": (6,),
    }
    assert {key: shape for key, shape in state.items() if "gate_proj" in key} == gate
    assert state["experts.3.down_proj.weight"] == (8, 6)
    assert not [key for key in state if ".part" in key or "expert_order" in key]
    # Each holds what it holds in the stack: the weight that its codes stand for is the expert's, rounded.
    for expert in range(4):
        w = model.experts["down_proj"][expert].detach()
        assert (_value(made, f"experts.{expert}.down_proj") - w).abs().max() <= (0 if expert == 3 else 0.5)
        others = [model.experts["down_proj"][e].detach() for e in range(4) if e != expert]
        assert min((_value(made, f"experts.{expert}.down_proj") - o).abs().max() for o in others) > 0.5
    products = [n for n in made.graph.nodes if n.target is expert_linears]
    assert [len(n.args[1]) for n in products] == [4, 4, 4]


@pytest.mark.parametrize(
    "rules", [[{"match": "experts.1", "weight": "int8/channel"}], [{"match": "router", "weight": "int8/channel"}]]
)
def test_float_experts_are_stored_as_the_source_s_weights(rules: list[dict[str, Any]]) -> None:
    """In 16 bits where these hold their numbers, whether others of their stack are codes or none."""
    gm = qdq(MoE(), rules=rules)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            parameter.copy_(parameter.bfloat16())
            if "down_proj" in name:
                parameter[0] += 2.0**-20
    gm.meta[KEY] = replace(source_of(gm), dtype=torch.bfloat16)
    record_stored(gm)
    made = onnx_form(gm)
    for role, stored in (("gate_proj", torch.bfloat16), ("up_proj", torch.bfloat16), ("down_proj", torch.float32)):
        for expert in (0, 2, 3):
            held = tensor_of(made, f"experts.{expert}.{role}.weight")
            assert held.dtype == stored, f"{expert} {role}"


def test_products_by_experts_of_another_dtype_are_refused() -> None:
    x, offsets = torch.ones(3, 8), torch.tensor([1, 3])
    with FakeTensorMode(allow_non_fake_inputs=True):
        expert_linears(x, [torch.ones(4, 8)] * 2, offsets)
        with pytest.raises(PassError, match=r"rows torch.float32 for experts' weights torch.float16, torch.float32"):
            expert_linears(x, [torch.ones(4, 8), torch.ones(4, 8, dtype=torch.float16)], offsets)


class MoETwice(nn.Module):
    """One layer of experts, called on two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE()

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.moe(x))


@pytest.mark.parametrize("weight", ["int8/channel", None])
def test_experts_that_are_called_twice_are_held_once(weight: str | None) -> None:
    rules: list[dict[str, Any]] = [
        {"match": "moe.experts", "weight": weight} if weight else {"match": "*", "float": True}
    ]
    made = onnx_form(qdq(MoETwice(), rules=rules))
    products = [n for n in made.graph.nodes if n.target is expert_linears]
    down = [n for n in products if n.args[1][0].meta["val"].shape == (8, 6)]
    assert len(down) == 2
    assert down[0].args[1] == down[1].args[1]


_GROUPED = {"": (6, 8), "_scale": (6, 2), "_zero_point": (6, 2)}


def _value(gm: fx.GraphModule, path: str) -> Tensor:
    """The weight that an expert's codes stand for, with scales in ONNX's shapes."""
    held = {
        key: tensor_of(gm, f"{path}.{key}")
        for key in ("weight", "weight_scale", "weight_zero_point")
        if _has(gm, f"{path}.{key}")
    }
    if "weight_scale" not in held:
        return held["weight"]
    codes = held["weight"].float()
    scale = held["weight_scale"]
    if scale.dim() == 1:
        return codes * scale[:, None]
    times = torch.arange(codes.shape[1]) // 4
    return (codes - held["weight_zero_point"].float()[:, times]) * scale[:, times]


def _has(gm: fx.GraphModule, name: str) -> bool:
    return name in gm.state_dict()


# -- caches ------------------------------------------------------------------------------------------------------------


class Present(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.layer(x), "present.0.key": x * 2}


def test_no_output_is_a_cache_for_its_name() -> None:
    made = onnx_form(qdq(Present(), weight="int8/channel"), cache=False)
    assert source_of(made).outputs == ("y", "present.0.key")
    assert len(made.graph.output_node().args[0]) == 2  # type: ignore[arg-type]


def test_without_a_cache() -> None:
    gm = compile_captured("llama", blocks_spec("int8/channel")).graph
    made = onnx_form(gm, cache=False)
    source = source_of(made)
    assert [(i.name, i.shape) for i in source.inputs] == [
        (name, ("batch", "sequence")) for name in ("input_ids", "attention_mask", "position_ids")
    ]
    assert (source.outputs, [r[0] for r in source.ranges]) == (("logits",), ["batch", "sequence"])
    assert [n.name for n in made.graph.nodes if n.op == "placeholder"] == [i.name for i in source.inputs]
    assert len(source_of(gm).inputs) == 3 + 4  # the given graph is another
    ids, mask, positions, *_ = random_inputs(gm, 2, 6)
    text = {n.target for n in made.graph.nodes}
    assert Dequantize.target in text
    with torch.no_grad():
        # Scales are in ONNX's shapes, which graphq's own kernels do not take: their shapes are given back.
        for op in ops_of(made):
            if isinstance(op, Dequantize) and isinstance(op.scale, Param):
                owner, _, name = op.scale.fqn.rpartition(".")
                made.get_submodule(owner).register_buffer(name, tensor_of(gm, op.scale.fqn))
        found = made(ids, mask, positions)
        expected = gm(*random_inputs(gm, 2, 6))[0]
    assert len(found) == 1
    assert (found[0] - expected).abs().max() <= 1e-6  # attention sums in another order
