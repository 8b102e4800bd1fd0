"""An observer that knows its scales already."""

import torch

from graphq.numerics import Scales
from graphq.observers.known import KnownScales
from graphq.spec.quant import parse_quant


def test_it_gives_what_it_was_made_with() -> None:
    scales = Scales(torch.tensor(0.5), torch.tensor(3, dtype=torch.int8))
    quant = parse_quant("int8/asym/tensor")
    seen, later = KnownScales(quant, ("a",), scales), KnownScales(quant, ("a",), scales)
    x = torch.ones(2, 3) * 7
    assert torch.equal(seen(x), x)
    seen.merge(later)
    assert seen.has_observed
    assert seen.only is None
    assert seen.scales() is scales
