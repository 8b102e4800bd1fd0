"""What folds change and stays float is a number of the stored dtype; nothing else is touched."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphq.capture.source import KEY, record_stored, source_of, stored_dtype
from graphq.errors import GraphError
from graphq.ir import edit
from graphq.ir.pipeline import Pipeline
from graphq.ir.views import ops_of
from graphq.passes.blockwise import Blockwise
from graphq.passes.equalize import Equalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.round_to_stored import RoundToStored, rounded
from graphq.passes.split_gate_up import SplitGateUp
from graphq.passes.untie import Untie
from graphq.state import tensor_of
from tests.graphs import annotated, without_data
from tests.models import MLP, Blocks, MoE, Tied, capture

X = torch.ones(2, 8)


def graph(
    model: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.bfloat16, wide: tuple[str, ...] = (), **rules: Any
) -> fx.GraphModule:
    """A graph in float32 of a source of ``dtype``, whose parameters but for ``wide`` hold its numbers."""
    gm = capture(model, *inputs)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name not in wide:
                parameter.copy_(parameter.to(dtype))
    gm.meta[KEY] = dataclasses.replace(source_of(gm), dtype=dtype)
    SplitGateUp().run(gm)
    record_stored(gm)
    return annotated(gm, **rules)


def third(gm: fx.GraphModule, *names: str) -> None:
    """Parameters are divided by three, as if by a fold."""
    for name in names:
        edit.set_param(gm, name, lambda w: w / 3, by="fold")


def is_exact(tensor: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    return torch.equal(tensor.to(dtype).float(), tensor)


def rounds(gm: fx.GraphModule) -> int:
    """How many parameters are rounded; a second run finds none."""
    counts = Pipeline([RoundToStored()], strict=True).run(gm)
    assert Pipeline([RoundToStored()], strict=True).run(gm) == {"round-to-stored": 0}
    return counts["round-to-stored"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_stays_float_is_rounded(dtype: torch.dtype) -> None:
    gm = graph(MLP(), X, dtype=dtype, up="int8/channel")
    third(gm, "up.weight", "up.bias", "down.weight")
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    assert rounds(gm) == 2
    state = gm.state_dict()
    for name in ("up.bias", "down.weight"):
        assert torch.equal(state[name], before[name].to(dtype).float())
        assert not torch.equal(state[name], before[name])
        assert isinstance(tensor_of(gm, name), nn.Parameter)
    for name in ("up.weight", "down.bias"):  # planned; not changed
        assert torch.equal(state[name], before[name])
    assert not is_exact(state["up.weight"], dtype)


def test_what_passes_do_not_change_is_left_alone() -> None:
    gm = graph(MLP(), X, up="int8/channel")
    assert rounds(gm) == 0
    with torch.no_grad():
        tensor_of(gm, "down.bias").div_(3)  # by no pass: it would be found in the source
    assert rounds(gm) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sources_of_float32_stay_as_they_are(dtype: torch.dtype) -> None:
    gm = graph(MLP(), X, dtype=dtype, up="int8/channel")
    third(gm, "up.bias", "down.weight")
    assert source_of(gm).stored is None
    assert rounds(gm) == 0


def test_parameters_that_the_source_holds_in_float32_keep_it() -> None:
    gm = graph(MLP(), X, wide=("down.bias",), up="int8/channel")
    assert source_of(gm).wide == {"down.bias"}
    third(gm, "up.bias", "down.bias")
    assert rounds(gm) == 1
    assert is_exact(gm.state_dict()["up.bias"])
    assert not is_exact(gm.state_dict()["down.bias"])


def test_buffers_are_no_parameters() -> None:
    gm = graph(MLP(), X, up="int8/channel")
    first = next(op for op in ops_of(gm) if op.node.op == "call_function")
    edit.add_tensor(gm, first, "up.table", torch.full((3,), 1 / 3), by="fold")
    edit.add_tensor(gm, first, "up.gain", nn.Parameter(torch.full((3,), 1 / 3), requires_grad=False), by="fold")
    assert rounds(gm) == 1
    assert is_exact(gm.state_dict()["up.gain"])
    assert not is_exact(gm.state_dict()["up.table"])


def test_experts_that_stay_float() -> None:
    gm = graph(MoE(), torch.ones(3, 8), experts__1="int8/channel", experts__2="int8/channel")
    name = next(name for name in gm.state_dict() if "down_proj" in name)
    third(gm, name)
    assert rounds(gm) == 1
    assert [is_exact(expert) for expert in gm.state_dict()[name]] == [True, False, False, True]
    QuantizeWeights().run(gm)
    kept = [name for name, _ in gm.named_parameters() if ".part" in name]
    assert kept
    assert all(is_exact(gm.state_dict()[name]) for name in kept)


@pytest.mark.parametrize("by_block", [False, True])
def test_experts_that_the_source_holds_in_float32_keep_it(by_block: bool) -> None:
    plans: dict[str, Any] = {"experts__1": "int8/channel", "experts__2": "int8/channel"}
    gm = graph(MoE(), torch.ones(3, 8), wide=("experts.down_proj",), **plans)
    assert source_of(gm).wide == {"experts.down_proj"}
    before = gm.state_dict()["experts.down_proj"].clone()
    Pipeline([Blockwise((QuantizeWeights(),)) if by_block else QuantizeWeights()]).run(gm)
    kept = {name: tensor for name, tensor in gm.named_parameters() if ".part" in name}
    assert [name for name, tensor in kept.items() if not is_exact(tensor)] == ["experts.down_proj.part0.weight"]
    assert source_of(gm).wide == {"experts.down_proj", "experts.down_proj.part0.weight"}
    assert rounds(gm) == 0
    assert torch.equal(gm.state_dict()["experts.down_proj.part0.weight"], before[[0, 3]])


def test_tied_tensors_stay_tied_where_nothing_changes() -> None:
    gm = graph(Tied(), torch.tensor([[1, 2]]), embedding="float")
    assert rounds(gm) == 0
    third(gm, "embedding.weight")
    Untie().run(gm)
    assert rounds(gm) == 1


def test_numbers_that_float16_does_not_hold() -> None:
    gm = graph(MLP(), X, dtype=torch.float16, up="int8/channel")
    edit.set_param(gm, "up.bias", lambda w: torch.full_like(w, 70000.0), by="fold")
    expected = (
        "up.bias: 70000 is too large for float16, which the source's parameters are stored in; compile with"
        " dtype=torch.float32, which stores them in float32"
    )
    with pytest.raises(GraphError) as caught:
        RoundToStored().run(gm)
    assert str(caught.value) == expected
    edit.set_param(gm, "up.bias", lambda w: torch.full_like(w, -65519.0), by="fold")
    assert rounds(gm) == 1
    assert gm.state_dict()["up.bias"][0] == -65504


def test_rounded_members() -> None:
    x = torch.tensor([[1 + 2.0**-9], [1 + 2.0**-9], [1 + 3 * 2.0**-9]])
    assert rounded(x, torch.bfloat16).flatten().tolist() == [1, 1, 1 + 2.0**-7]
    assert rounded(x, torch.bfloat16, [0]).flatten().tolist() == [1, 1 + 2.0**-9, 1 + 3 * 2.0**-9]


def test_the_dtype_of_a_parameter() -> None:
    source = source_of(graph(MLP(), X, wide=("down.bias",), up="float"))
    parameter = nn.Parameter(torch.ones(1))
    assert stored_dtype(source, "up.bias", parameter) == torch.bfloat16
    assert stored_dtype(source, "down.bias", parameter) == torch.float32
    assert stored_dtype(source, "up.bias", torch.ones(1)) == torch.float32
    assert stored_dtype(source, "up.bias", nn.Parameter(torch.ones(1, dtype=torch.float64))) == torch.float64
    assert stored_dtype(dataclasses.replace(source, stored=None), "up.bias", parameter) == torch.float32


def test_after_a_fold_without_data() -> None:
    gm = graph(Blocks(), X, blocks="int8/channel")
    assert Equalize().run(gm) > 0
    assert rounds(gm) == 2  # the biases of both first layers
    assert all(is_exact(gm.state_dict()[f"blocks.{i}.up.bias"]) for i in (0, 1))


def test_a_graph_without_data_has_nothing_to_round() -> None:
    gm = graph(MLP(), X, up="int8/channel")
    third(gm, "up.bias", "down.weight")
    assert rounds(without_data(gm)) == 0
