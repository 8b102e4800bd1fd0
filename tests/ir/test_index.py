"""Who reads a parameter, which are tied, and which outputs are caches of which inputs."""

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from graphq.capture.source import KEY, SHARED, CachePair, source_of
from graphq.ir.index import GraphIndex
from graphq.ir.views import Param, view
from graphq.state import put_tensor, tensor_of
from tests.models import MLP, Blocks, Twice, capture, captured

X = torch.ones(3, 8)


def param(gm: fx.GraphModule, fqn: str) -> Param:
    found = view(gm.graph.find_nodes(op="get_attr", target=fqn)[0])
    assert isinstance(found, Param)
    return found


def test_own_parameters() -> None:
    gm = capture(MLP(), X)
    assert GraphIndex(gm).is_own(param(gm, "up.weight"))
    gm.meta[SHARED] = frozenset({"up.weight"})
    assert not GraphIndex(gm).is_own(param(gm, "up.weight"))
    twice = capture(Twice(), X)
    assert not GraphIndex(twice).is_own(param(twice, "shared.weight"))
    tied = capture(Blocks(), X)
    put_tensor(tied, "blocks.0.up.weight", nn.Parameter(tensor_of(tied, "blocks.1.up.weight").detach()))
    index = GraphIndex(tied)
    assert not index.is_own(param(tied, "blocks.0.up.weight"))
    assert index.is_own(param(tied, "blocks.0.up.bias"))
    assert index.why_shared("blocks.0.up.weight", set(tied.graph.nodes)) == (
        "blocks.0.up.weight: it is tied to blocks.1.up.weight"
    )
    assert index.why_shared("blocks.0.up.bias", set(tied.graph.nodes)) is None
    assert index.why_shared("blocks.0.up.bias", set()) == "blocks.0.up.bias: blocks.0.up reads it, too"


class State(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        new = a + 1
        return {"present.0": new, "y": b * 2, "z": new}


def test_caches() -> None:
    gm = capture(State(), X, X)
    assert GraphIndex(gm).caches == {}, "no name makes a cache"
    gm.meta[KEY] = replace(source_of(gm), caches=(CachePair("a", "present.0"), CachePair("b", "y")))
    index = GraphIndex(gm)
    # What is given back under another name, too, is no cache.
    assert [(index.output_names[new], index.input_names[old]) for new, old in index.caches.items()] == [(["y"], "b")]
    assert [index.input_names[node] for node in index.pasts] == ["b"]
    llama = GraphIndex(captured("llama"))
    assert [(llama.output_names[new], llama.input_names[old]) for new, old in llama.caches.items()] == [
        ([f"present.{i}.{part}"], f"past_key_values.{i}.{part}") for i in (0, 1) for part in ("key", "value")
    ]
