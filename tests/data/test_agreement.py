"""KL divergence and top-1 agreement are those of the definition, over all batches together."""

import math

import pytest
import torch

from graphq.data.agreement import AgreementOver
from graphq.errors import GraphError


def test_kl_and_top1_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.7, 0.1, 0.2]])
    over = AgreementOver()
    over.add(p[:1].log() + 3, q[:1].log() - 2)  # logits are known up to a constant
    over.add(p[1:].log(), q[1:].log())
    found = over.found()
    kl = 0.5 * math.log(2) - 0.25 * math.log(2) + 0.2 * math.log(2) - 0.1 * math.log(2)
    assert found.kl == pytest.approx(kl / 2, rel=1e-6)
    assert (found.top1, found.tokens) == (0.5, 2)
    assert str(found) == f"KL divergence {kl / 2:.6g}, top-1 agreement 50.00% (2 tokens)"
    assert found.to_json() == {"kl": found.kl, "top1": 0.5, "tokens": 2}


def test_many_rows_are_taken_in_parts():
    x = torch.randn(700, 5, generator=torch.Generator().manual_seed(0))
    over = AgreementOver()
    over.add(x.view(7, 100, 5), x.view(7, 100, 5))
    assert over.found() == type(over.found())(0.0, 1.0, 700)


def test_what_is_no_number_and_other_shapes():
    over = AgreementOver()
    over.add(torch.zeros(1, 3), torch.full((1, 3), float("nan")))
    assert over.found().kl == math.inf
    assert over.found().to_json()["kl"] is None
    with pytest.raises(GraphError, match=r"logits of shape \[1, 4\] beside \[1, 3\]"):
        over.add(torch.zeros(1, 3), torch.zeros(1, 4))
