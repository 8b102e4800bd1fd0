"""A spec that quantizes nothing is refused where it asks for more, and says so loudly where it does not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.errors import SpecError
from tests.models import MLP

LOUD = "NOTHING IS QUANTIZED: all rules of the spec keep layers float"
X = torch.ones(2, 3, 8)


class Disguised(nn.Linear):
    """Falcon's own class."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Heads(nn.Module):
    """Weights that are no layers: a stack of matrices, and one that is larger than what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(2, 8, 4))
        self.o = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("btd,hdk->bthk", x, self.q)
        return heads.flatten(2) @ torch.tanh(self.o).repeat(1, 2)


def only_if(*constraints: str) -> dict[str, Any]:
    return {"graphq": 1, "rules": [{"match": "blocks", "weight": "int8/channel", "only_if": list(constraints)}]}


def refused(model: nn.Module, spec: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        graphq.compile(model, spec, inputs=X)
    return caught.value.problems


def test_a_linear_in_disguise_is_a_layer() -> None:
    model = nn.Sequential(Disguised(8, 8), nn.ReLU(), nn.Linear(8, 8))
    made = graphq.compile(model, {"graphq": 1, "weight": "int8/channel"}, inputs=X)
    assert [(row.layer.fqn, str(row.weight)) for row in made.report.layers] == [
        ("0", "int8/channel"),
        ("2", "int8/channel"),
    ]
    assert {name.rpartition(".")[2]: t.dtype for name, t in made.graph.state_dict().items() if name[0] == "0"} == {
        "weight": torch.int8,
        "weight_scale": torch.float32,
        "bias": torch.float32,
    }
    with torch.no_grad():
        expected, found = model(X), made(X)
    assert isinstance(found, Tensor)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()  # of 8 bits


def test_no_layer_is_what_the_rules_constrain() -> None:
    assert refused(MLP(), only_if("K % 64")) == (
        "the spec asks for quantization, but quantizes no layer of this model",
        "up: stays float: needs K % 64: K is 8",
        "down: stays float: needs K % 64: K is 12",
    )
    explained = graphq.explain(MLP(), only_if("K % 64"), inputs=X)
    assert "compile refuses: the spec asks for quantization, but quantizes no layer of this model" in explained.notes
    assert LOUD not in explained.notes


def test_one_layer_is_enough() -> None:
    report = graphq.compile(MLP(), only_if("K % 12"), inputs=X).report
    assert [row.weight is None for row in report.layers] == [True, False]
    assert not [note for note in report.notes if "NOTHING" in note]


def test_a_model_without_layers_names_its_weights() -> None:
    lenient = {"match": "*", "weight": "int8/channel", "may_match_nothing": True}
    assert refused(Heads(), {"graphq": 1, "rules": [lenient]}) == (
        "the spec asks for quantization, but quantizes no layer of this model",
        "the model has no layer that a rule can name",
        "q: stays float: multiplied by aten.einsum as a tensor of 3 axes; no rule can name it",
        "o: stays float: multiplied by aten.matmul behind aten.repeat; no rule can name it",
    )
    assert refused(Heads(), {"graphq": 1, "weight": "int8/channel"}) == (
        (
            "weight: blocks matches no layer; q is multiplied by aten.einsum as a tensor of 3 axes; no rule can name it"
            " (and 1 more)"
        ),
    )
    explained = graphq.explain(Heads(), {"graphq": 1, "rules": [lenient]}, inputs=X)
    assert explained.layers == ()
    assert [(row["layer"], row["kind"], row["bytes"]) for row in explained.rows()] == [
        ("q", "parameter", 256),
        ("o", "parameter", 256),
    ]


def test_many_layers_are_counted() -> None:
    model = nn.Sequential(*(MLP() for _ in range(8)))
    found = refused(model, only_if("K % 64"))
    assert found[0] == "the spec asks for quantization, but quantizes no layer of this model"
    assert (len(found), found[-1]) == (11, "7 more stay float")


@pytest.mark.parametrize("algorithms", [[], ["fold-batch-norm"]])
def test_rules_that_ask_for_nothing(algorithms: list[str]) -> None:
    spec = {"graphq": 1, "rules": [{"match": "*", "float": "a baseline"}], "algorithms": algorithms}
    made = graphq.compile(MLP(), spec, inputs=X)
    assert LOUD in made.report.notes
    assert LOUD in graphq.explain(MLP(), spec, inputs=X).notes
