"""An embedding shares its numbers with no other layer."""

import torch
from torch import fx, nn

from graphq.ir.pipeline import Pipeline
from graphq.passes.untie import Untie
from graphq.state import put_tensor, tensor_of, ties
from tests.graphs import run
from tests.models import Blocks, Tied, capture

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def tied() -> fx.GraphModule:
    gm = capture(Tied(), TOKENS)  # whose copy has two tensors
    shared = tensor_of(gm, "head.weight").detach()
    put_tensor(gm, "embedding.weight", nn.Parameter(shared, requires_grad=False))
    return gm


def test_untie() -> None:
    gm = tied()
    before = run(gm, TOKENS)
    assert ties(gm) == {"embedding.weight": ("head.weight",), "head.weight": ("embedding.weight",)}
    assert Pipeline([Untie()], strict=True).run(gm) == {"untie": 1}
    assert ties(gm) == {}
    assert torch.equal(run(gm, TOKENS), before)
    assert Pipeline([Untie()], strict=True).run(gm) == {"untie": 0}


def test_a_head_that_was_never_tied() -> None:
    gm = capture(Tied(), TOKENS)
    assert Untie().run(gm) == 0


def test_linears_stay_tied() -> None:
    gm = capture(Blocks(), torch.ones(2, 8))
    put_tensor(gm, "blocks.0.up.weight", nn.Parameter(tensor_of(gm, "blocks.1.up.weight"), requires_grad=False))
    assert ties(gm)["blocks.0.up.weight"] == ("blocks.1.up.weight",)
    assert Untie().run(gm) == 0


def test_parts_of_one_storage_are_not_tied() -> None:
    gm = tied()
    whole = torch.randn(32, 8)
    put_tensor(gm, "embedding.weight", nn.Parameter(whole[:16], requires_grad=False))
    put_tensor(gm, "head.weight", nn.Parameter(whole[16:], requires_grad=False))
    assert Untie().run(gm) == 0
