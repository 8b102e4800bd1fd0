"""Biases corrected by what was kept of a correction, without the data."""

import copy
import re

import pytest
import torch

from graphq.errors import GraphError
from graphq.ir.choices import Choices
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.calibrate import Calibrate
from graphq.passes.correct_bias import CorrectBias
from graphq.passes.observe_means import ObserveMeans
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.repeat_biases import RepeatBiases
from tests.graphs import annotated
from tests.models import MLP, Twice, capture

BATCHES = [(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)) + 0.5,)]


@pytest.mark.parametrize("model", [MLP(), MLP(bias=False), Twice()])
def test_the_same_biases(model: torch.nn.Module) -> None:
    choices = Choices("2 correct-bias", {})
    plain = annotated(capture(model, torch.ones(2, 8)), blocks="int3/channel")
    once, again = copy.deepcopy(plain), copy.deepcopy(plain)
    steps = [ObserveMeans(), Calibrate(), QuantizeWeights(), CorrectBias(choices=choices)]
    count = Pipeline(steps).run(once, BATCHES)["correct-bias"]
    assert count == len(choices.tensors) > 0
    steps = [QuantizeWeights(), RepeatBiases(choices)]
    assert Pipeline(steps, strict=True).run(again)["repeat-biases"] == count
    assert dump(again) == dump(once)
    for name, tensor in once.state_dict().items():
        # a float32 bias is the one before and what was added, in float64, and rounded once more
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=2**-23, atol=0)
    assert Pipeline([RepeatBiases(choices)], strict=True).run(again) == {"repeat-biases": 0}


def test_what_is_added_is_kept() -> None:
    """So that another bias of the source is another one here."""
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up="int3/channel", down="float")
    QuantizeWeights().run(gm)
    before = gm.state_dict()["up.bias"].clone()
    added = torch.arange(12, dtype=torch.float64)
    tensors = {"0 a bias up.bias": added, "1 a bias down.bias": added, "0 a bias other.bias": added}
    assert RepeatBiases(Choices("0 a", tensors)).run(gm) == 1
    assert torch.equal(gm.state_dict()["up.bias"], (before.double() + added).float())


def test_what_is_of_another_layer() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up="int3/channel")
    QuantizeWeights().run(gm)
    step = RepeatBiases(Choices("0 a", {"0 a bias up.bias": torch.ones(3)}))
    with pytest.raises(GraphError, match=f"^{re.escape('bias up.bias: [3] are not 12 numbers')}$"):
        step.run(gm)
