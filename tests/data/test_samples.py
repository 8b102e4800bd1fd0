"""Rows drawn from calibration batches are the batches' rows, with the numbers that go with them."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import pytest
import torch
from torch import Tensor, fx, nn

from graphq.data.samples import Pool, draw, in_turn, pools_of
from graphq.ir.pipeline import Batches, Pass, Pipeline
from graphq.passes.blockwise import Blockwise
from tests.graphs import annotated, run
from tests.models import MLP, capture, captured, random_inputs


def outputs(gm: fx.GraphModule) -> list[fx.Node]:
    given = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    return [cast(tuple[fx.Node, ...], given)[0]]


def test_batches_that_agree_are_one_pool() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    batches = [(torch.full((n, 8), float(n)),) for n in (3, 5)]
    (pool,) = pools_of(gm, batches, outputs(gm))
    assert pool.size == 8
    (x,) = pool.pick(torch.tensor([0, 2, 3, 7]))
    assert x[:, 0].tolist() == [3, 3, 5, 5]
    assert pool.of(torch.arange(8), torch.tensor([6, 1])).tolist() == [6, 1]


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_rows_of_a_model_give_the_rows_of_its_output(family: str) -> None:
    gm = captured(family)
    batches = [random_inputs(gm, seed=seed) for seed in range(2)]
    (pool,) = pools_of(gm, batches, outputs(gm))
    assert pool.size == 6
    rows = torch.tensor([1, 4, 5])
    whole = torch.cat([run(gm, *batch) for batch in batches])
    torch.testing.assert_close(run(gm, *pool.pick(rows)), pool.of(whole, rows), rtol=1e-4, atol=1e-5)


def test_batches_of_other_lengths_are_pools_of_their_own() -> None:
    gm = captured("llama")
    batches = [random_inputs(gm, sequence=sequence) for sequence in (4, 7, 4)]
    assert [pool.size for pool in pools_of(gm, batches, outputs(gm))] == [6, 3]


def test_numbers_that_depend_on_the_rows_are_made_anew() -> None:
    """A part of a model takes how many sequences there are, and how many rows the experts get, as numbers."""
    gm = annotated(captured("mixtral"), model__layers__1__self_attn__q_proj="int8/channel")
    look = Look([], [])
    with torch.no_grad():
        Pipeline([Blockwise((look,))]).run(gm, [random_inputs(gm, batch=3, sequence=5, seed=seed) for seed in range(2)])
    given, picked = look.given[0], look.pools[0].pick(torch.tensor([0, 2]))
    assert look.pools[0].size == 6
    numbers = {(a, b) for a, b in zip(given, picked, strict=True) if isinstance(a, int)}
    assert numbers == {
        (3, 2),
        (5, 5),
        (15, 10),
        (30, 20),
    }  # sequences, tokens of each, all tokens, two experts for each


@final
@dataclass(frozen=True)
class Look(Pass):
    """Keeps what a part of a graph is given."""

    given: list[tuple[Any, ...]]
    pools: list[Pool]
    name: ClassVar[str] = "look"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        self.given.extend(batches or ())
        floats = [n for n in gm.graph.output_node().args[0] if n.name.startswith("add")]  # type: ignore[union-attr]
        self.pools.extend(pools_of(gm, self.given, floats))
        return 0


class Mixed(nn.Module):
    """The output has no rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten()


def test_batches_that_cannot_be_taken_apart_are_drawn_whole() -> None:
    gm = capture(Mixed(), torch.ones(4, 8))
    batches = [(torch.full((n, 8), float(n)),) for n in (2, 4, 6)]
    pools = pools_of(gm, batches, outputs(gm))
    assert [(pool.is_whole, pool.size) for pool in pools] == [(True, 1)] * 3
    ((index, rows),) = draw(pools, 8, torch.Generator().manual_seed(0))
    (x,) = pools[index].pick(rows)
    assert torch.equal(x, batches[index][0])


def test_rows_are_drawn_once_each_by_the_seed() -> None:
    gm = captured("llama")
    pools = pools_of(gm, [random_inputs(gm, sequence=s) for s in (4, 7)], outputs(gm))
    first, again, other = (
        [(i, rows.tolist()) for i, rows in draw(pools, 4, torch.Generator().manual_seed(seed))] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sum(len(rows) for _, rows in first) == 4
    assert [(i, rows.tolist()) for i, rows in draw(pools, 99, torch.Generator())] == [(0, [0, 1, 2]), (1, [0, 1, 2])]
    assert [(i, rows.tolist()) for i, rows in in_turn(pools, 2)] == [(0, [0, 1]), (0, [2]), (1, [0, 1]), (1, [2])]


def test_what_is_picked_is_no_inference_tensor() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    with torch.inference_mode():
        batches = [(torch.ones(3, 8),)]
        (pool,) = pools_of(gm, batches, outputs(gm))
    assert not pool.pick(torch.tensor([0]))[0].is_inference()
