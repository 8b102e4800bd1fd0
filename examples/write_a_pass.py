"""A pass of one's own, with its test: a cast to a wider type and the cast back are gone.

Usage: python examples/write_a_pass.py, or: python -m pytest examples/write_a_pass.py
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx, nn

import graphq
from graphq.compiler import capture
from graphq.ir import edit
from graphq.ir.pipeline import Batches, Pass, Pipeline
from graphq.ir.views import Cast, Op, ops_of


@final
@dataclass(frozen=True)
class RemoveRoundTrips(Pass):
    """No value is cast to a type that holds all of its kind, and back."""

    name: ClassVar[str] = "remove-round-trips"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            match op:
                case Cast(Cast(Op() as x, torch.dtype() as middle), torch.dtype() as last) if (
                    last == x.val.dtype and last.is_floating_point and torch.promote_types(last, middle) == middle
                ):
                    edit.bypass(gm, op, x)
                    count += 1
                case _:
                    pass
        edit.drop_unused(gm)
        return count


class Casts(nn.Module):
    """A round trip, one through a narrower type, which rounds, and one that ends in another type."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.double().float() + 1, x.bfloat16().float(), x.double().bfloat16()


def test_only_exact_round_trips_go() -> None:
    """One change, the same function; a second run finds nothing."""
    gm, x = capture(Casts(), torch.randn(2, 8)), torch.randn(3, 8)
    before = gm(x)
    assert Pipeline([RemoveRoundTrips()], strict=True).run(gm) == {"remove-round-trips": 1}
    assert sum(isinstance(op, Cast) for op in ops_of(gm)) == 4
    assert all(torch.equal(a, b) for a, b in zip(gm(x), before, strict=True))
    assert Pipeline([RemoveRoundTrips()], strict=True).run(gm) == {"remove-round-trips": 0}


if __name__ == "__main__":
    gm = capture(Casts(), torch.randn(2, 8))
    print(graphq.dump(gm))
    print(Pipeline([RemoveRoundTrips()], strict=True).run(gm), end="\n\n")
    print(graphq.dump(gm), end="")
