"""A pass that reports no change has made none: what nothing reads stays, too, but for the one pass that counts it."""

import pytest
import torch
from torch import fx

from graphq.ir.pipeline import Pass, Pipeline
from graphq.lowering.profiles import GENERIC_INT8
from graphq.passes.auto_round import AutoRound
from graphq.passes.awq import AWQ
from graphq.passes.blockwise import Blockwise
from graphq.passes.correct_bias import CorrectBias
from graphq.passes.decompose import Decompose
from graphq.passes.fold_batch_norm import FoldBatchNorm
from graphq.passes.fold_norms import FoldNorms
from graphq.passes.gptq import GPTQ
from graphq.passes.observe import Observe
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_biases import QuantizeBiases
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.raise_grouped_linear import RaiseGroupedLinear
from graphq.passes.raise_linear import RaiseLinear
from graphq.passes.remove_no_ops import RemoveNoOps
from graphq.passes.rotate import Rotate
from graphq.passes.split_gate_up import SplitGateUp
from graphq.passes.stop_observing import StopObserving
from graphq.passes.unroll_recurrent import UnrollRecurrent
from graphq.passes.untie import Untie
from tests.graphs import annotated
from tests.models import MLP, capture

X = torch.ones(2, 8)


def with_leftovers() -> fx.GraphModule:
    """A graph of float layers, with a node, the tensor that it alone reads, and a tensor that nothing reads."""
    gm = annotated(capture(MLP(), X), up="float", down="float")
    gm.register_buffer("unread", torch.ones(2))
    gm.register_buffer("read", torch.ones(2))
    last = next(node for node in reversed(gm.graph.nodes) if node.op == "call_function")
    with gm.graph.inserting_after(last):
        held = gm.graph.get_attr("read")
    with gm.graph.inserting_after(held):
        dead = gm.graph.call_function(torch.ops.aten.relu.default, (held,))
    fake = last.meta["val"].fake_mode
    held.meta["val"] = dead.meta["val"] = fake.from_tensor(torch.ones(2), static_shapes=True)
    return gm


@pytest.mark.parametrize(
    "step",
    [
        RaiseLinear(),
        RaiseGroupedLinear(),
        SplitGateUp(),
        FoldNorms(),
        FoldBatchNorm(),
        Rotate(kind="hadamard"),
        Untie(),
        Observe(),
        Decompose(GENERIC_INT8),
        UnrollRecurrent(GENERIC_INT8),
        QuantizeBiases(GENERIC_INT8),
        AWQ(),
        GPTQ(),
        AutoRound(),
        QuantizeWeights(),
        CorrectBias(),
        QuantizeActivations(),
        StopObserving(),
        Blockwise((QuantizeWeights(),)),
    ],
    ids=lambda step: step.name,
)
def test_a_pass_that_finds_nothing_leaves_leftovers(step: Pass) -> None:
    assert Pipeline([step], strict=True).run(with_leftovers(), [(X,)]) == {step.name: 0}


def test_leftovers_are_counted_where_they_go() -> None:
    gm = with_leftovers()
    assert Pipeline([RemoveNoOps()], strict=True).run(gm) == {"remove-no-ops": 4}  # two nodes, two tensors
    assert not {"read", "unread"} & gm.state_dict().keys()
