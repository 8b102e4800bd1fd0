"""Which calls of a packed graph become one."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import graphq
from graphq.lowering.torch.pack import pack
from graphq.runtime.regions import Region, ordered, regions
from tests.compiled import compile_captured
from tests.models import DECODERS

aten: Any = torch.ops.aten
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
W8A8: dict[str, Any] = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"}
W4: dict[str, Any] = {"graphq": 1, "weight": "int4/g16"}


class Gated(nn.Module):
    """Two linears of one input, a gate, a linear, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def packed(spec: dict[str, Any] = W4, model: nn.Module | None = None, inputs: Any = X) -> fx.GraphModule:
    torch.manual_seed(0)
    return pack(graphq.compile((model or Gated()).eval(), spec, inputs=inputs).graph)


def told(found: list[Region]) -> str:
    """A line for each region: what it takes, what it calls, what it gives."""
    return "\n".join(
        f"{', '.join(n.name for n in region.inputs)} -> {', '.join(n.name for n in region.nodes)}"
        f" -> {', '.join(n.name for n in region.outputs)}"
        for region in found
    )


def test_golden() -> None:
    assert_expected_inline(
        told(regions(packed())),
        """x -> gate, silu, up, mul, down, add -> add""",
    )


def test_golden_with_quantized_inputs() -> None:
    assert_expected_inline(
        told(regions(packed(W8A8))),
        """x -> quantize_dynamic_default, getitem_3, getitem_4, gate, silu, up, mul, quantize_dynamic_default_1, getitem_5, getitem_6, down, add -> add""",
    )


def test_between_two_attentions_a_decoder_is_one_region() -> None:
    gm = pack(compile_captured("llama", W8A8).graph)
    found = regions(gm)
    assert [len(region.modules) for region in found] == [3, 7, 4]  # of two layers; the head is no layer of the spec
    assert found[-1].nodes[-1].target is aten.linear.default
    assert found[1].modules == (
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkv"),
    )
    assert len(found[1].outputs) == 4  # queries, keys, values, and the residual stream


@pytest.mark.parametrize(
    "family", [f if f != "deepseek" else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS]
)
def test_nothing_is_read_before_it_is_there(family: str) -> None:
    gm = pack(compile_captured(family, W8A8).graph)
    found = regions(gm)
    assert found
    there: set[fx.Node] = set()
    for item in ordered(gm, found):
        read = item.inputs if isinstance(item, Region) else item.all_input_nodes
        assert all(n in there for n in read)
        there |= set(item.outputs) if isinstance(item, Region) else {item}
    nodes = [n for region in found for n in region.nodes]
    assert len(set(nodes)) == len(nodes)
    assert there | set(nodes) == set(gm.graph.nodes)


# -- near misses: a graph that differs only there ------------------------------------------------------------------


def changed(place: str, target: Any, *more: Any, **options: Any) -> list[Region]:
    """The regions of ``packed()`` where another op reads what the node named ``place`` gives, and its readers read that."""
    gm = packed()
    node = next(n for n in gm.graph.nodes if n.name == place)
    with gm.graph.inserting_after(node):
        made = gm.graph.call_function(target, (node, *more), options)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return regions(gm)


def size(found: list[Region]) -> list[int]:
    return [len(region.nodes) for region in found]


def test_an_op_without_steps_ends_a_region() -> None:
    assert size(regions(packed())) == [6]
    assert size(changed("silu", aten.silu.default)) == [7]
    assert size(changed("silu", aten.erf.default)) == [3, 2]  # the product reads it, and the next begins at a linear


@pytest.mark.parametrize(
    ("target", "arguments", "options"),
    [
        (aten.pow.Tensor_Scalar, (3,), {}),
        (aten.mean.dim, ([-1], False), {}),
        (aten.mean.dim, ([0], True), {}),
        (aten.gelu.default, (), {}),
        (aten.add.Tensor, (1,), {"alpha": 2}),
        (aten._to_copy.default, (), {"dtype": torch.float16}),
        (aten._to_copy.default, (), {"dtype": torch.float32, "device": torch.device("meta")}),
        (aten.transpose.int, (0, 1), {}),
        (aten.roll.default, ([1], [0]), {}),
    ],
)
def test_ops_with_other_arguments_have_no_steps(target: Any, arguments: Any, options: Any) -> None:
    assert size(changed("silu", target, *arguments, **options)) == [3, 2]


def test_what_writes_to_its_arguments_ends_a_region() -> None:
    assert size(changed("silu", aten.relu_.default)) == [2, 4]


def test_a_linear_alone_is_no_region() -> None:
    assert regions(packed(model=nn.Linear(32, 32))) == []


def test_a_linear_in_float_joins_and_does_not_begin() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    gm = packed({"graphq": 1, "rules": [{"match": "1", "weight": "int4/g16"}]}, model)
    assert [[n.name for n in region.nodes] for region in regions(gm)] == [["_1", "linear_2"]]
    half = packed({"graphq": 1, "rules": [{"match": "1", "weight": "int4/g16"}]}, model.double(), X.double())
    assert size(regions(half)) == []
