"""What a factor of each channel goes through, and what it does not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.source import KEY, CachePair, source_of
from graphq.ir.channels import Flow, Flows, move_factors
from graphq.ir.effects import Stopped
from graphq.ir.index import GraphIndex
from tests.ir.test_channels import BOTH, IMAGE, SHARED_READER, SUM, Net, X, check, extra, linears, producer, text_of, up
from tests.lifted import lifted
from tests.models import MoE, capture


def between(f: Callable[..., Any], **more: Any) -> Net:
    """``f`` between two linears."""
    return Net(lambda m, x: m.down(f(m.up(x))), **up(**more))


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (F.relu, BOTH),
        (lambda h: -F.leaky_relu(h) / 3, BOTH),
        (lambda h: h.abs() * h.shape[1], BOTH),
        (lambda h: F.pad(h, (0, 0, 1, 1)), "the channels of linear_1 are mixed"),
        (lambda h: h.flip(1), BOTH),
        (lambda h: torch.stack([h, h], 1), "aten.stack.default reads it"),
        (lambda h: h.expand(3, *h.shape)[0], BOTH),
        (lambda h: h.movedim((0, 1), (1, 0)).movedim(0, 1), BOTH),
        (lambda h: h.amax(1), BOTH),
        (lambda h: h.amax(-1, keepdim=True) * torch.ones(12), "a mean mixes its channels"),
        (lambda h: h * torch.sum(h.abs(), dim=None), "a mean mixes its channels"),
        (lambda h: h.std(1), "aten.std.dim reads it"),
        (lambda h: torch.linalg.vector_norm(h, 2, 1), BOTH),
        (lambda h: torch.linalg.vector_norm(h, 0, 1), "aten.linalg_vector_norm.default reads it"),
        (lambda h: torch.baddbmm(h, h, h.new_ones(h.shape[0], 12, 12)), "aten.baddbmm.default reads it"),
        (lambda h: h.mean(1), BOTH),
        (lambda h: h.transpose(1, 2).unflatten(1, (3, 4)).flatten(1, 2).transpose(1, 2), BOTH),
        (lambda h: h + h * 2, BOTH),
        (lambda h: F.pad(h, (0, 0, 1, 1), mode="replicate"), "aten.pad.default reads it"),
        (lambda h: h.double().float(), BOTH),
        (F.silu, "aten.silu.default reads it"),
        (F.gelu, "aten.gelu.default reads it"),
        (torch.square, "aten.square.default reads it"),
        (lambda h: h * h, "it is multiplied by itself"),
        (lambda h: h * -h, "it is multiplied by itself"),
        (lambda h: 1 / h.abs(), "aten.reciprocal.default reads it"),
        (lambda h: torch.ones_like(h) / h, "it is a divisor"),
        (lambda h: h + 1, "a sum reads it beside what has no factors"),
        (lambda h: h.int().float(), "aten._to_copy.default makes it torch.int32"),
        (lambda h: h * h.mean(-1, keepdim=True), "a mean mixes its channels"),
        (lambda h: F.pad(h, (0, 0, 1, 1), value=1.0), "aten.pad.default reads it"),
        (lambda h: torch.cat([h[..., 6:], h[..., :6]], -1), BOTH),
        (lambda h: h + h.flip(-1).flip(-1)[..., :12], BOTH),
        (lambda h: h + h.flip(-1), "it is added to other channels"),
        (lambda h: 1 - h, "aten.rsub.Scalar reads it"),
        (lambda h: h + torch.cat([h[..., 6:], h[..., :6]], -1), "it is added to other channels"),
        (lambda h: h.repeat(1, 2, 1), BOTH),
        (lambda h: F.max_pool1d(h, 3, 1, 1), "aten.max_pool1d.default mixes its channels"),
        (lambda h: h.softmax(-1), "aten.softmax.int reads it"),
        (lambda h: h.softmax(1) @ torch.ones(12, 12), "aten.softmax.int reads it"),
        (lambda h: h @ torch.ones(12, 12), "it is multiplied by what is no weight"),
        (lambda h: h.transpose(1, 2) @ h, "it is multiplied by what is no weight"),
    ],
)
def test_between_two_linears(f: Callable[..., Any], expected: str) -> None:
    assert check(between(f), torch.ones(2, 5, 8)) == expected


HALF = "down.weight <- up.weight up.bias 6/12"


def gated(m: Any, x: Tensor) -> Tensor:
    gate, up = m.up(x).chunk(2, -1)
    return m.down(F.silu(gate) * up)


def gated_alone(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        # some of the labels
        (linears(gated, down=nn.Linear(6, 8)), HALF),
        (linears(gated_alone, gate=nn.Linear(8, 12)), BOTH),
        (between(lambda h: F.pad(h[..., :6], (0, 6))), HALF),
        (between(lambda h: h[..., :6].repeat(1, 1, 2)), HALF),
        (between(lambda h: h[..., :6].repeat_interleave(2, -1)), HALF),
        (between(lambda h: torch.cat([h[..., :6].relu(), h[..., 6:].sigmoid()], -1)), HALF),
        # products
        (linears(lambda m, x: m.down(m.mix(x).mT.softmax(-1) @ m.up(x)), mix=nn.Linear(8, 7)), BOTH),
        # other readers
        (linears(lambda m, x: (m.down(h := m.up(x)), h)), "it is an output of the model"),
        (linears(lambda m, x: (m.down(h := m.up(x)), h[..., 6:])), HALF),
        (linears(lambda m, x: m.up(x)), "it is an output of the model"),
        (linears(lambda m, x: m.down(m.up(x)) + m.up.weight.sum()), "up.weight has other readers"),
        (
            linears(lambda m, x: m.down(m.up(x)) + m.up.bias.sum()),
            "the bias of linear is no parameter that it alone has",
        ),
        (linears(lambda m, x: m.down(m.up(x)) + m.down.weight.sum()), SHARED_READER),
        (linears(lambda m, x: m.down(m.up(x)) + m.down.bias.sum()), "down.weight <- up.weight up.bias"),
        (linears(lambda m, x: m.down(m.down(m.up(x))), up=nn.Linear(8, 8), down=nn.Linear(8, 8)), SHARED_READER),
        (
            linears(lambda m, x: m.down(m.up(m.up(x))), up=nn.Linear(8, 8), down=nn.Linear(8, 8)),
            "up.weight has other readers",
        ),
        (linears(lambda m, x: m.down(x) + m.up(m.down(x)), up=nn.Linear(8, 8), down=nn.Linear(8, 8)), SUM),
        # weights that are computed
        (linears(lambda m, x: F.linear(m.up(x), m.down.weight * 2)), SHARED_READER),
        (linears(lambda m, x: m.down(F.linear(x, m.up.weight * 2))), "aten.mul.Tensor has no weights of its own"),
        # parameters on the way
        (linears(lambda m, x: m.down(m.up(x) + m.extra), extra=extra(12)), f"{BOTH} extra"),
        (linears(lambda m, x: m.down(m.up(x) - m.extra), extra=extra(12)), f"{BOTH} extra"),
        (linears(lambda m, x: m.down(m.up(x) + m.extra) + m.extra.sum(), extra=extra(12)), SUM),
        (linears(lambda m, x: m.down(m.up(x) + m.extra), extra=extra(1)), SUM),
        (linears(lambda m, x: m.down(m.up(x) + m.extra), extra=extra(5, 12)), SUM),
        (linears(lambda m, x: m.down(m.up(x) * m.extra), extra=extra(12)), BOTH),
        (linears(lambda m, x: m.down(m.up(x) + m.other(x)), other=nn.Linear(8, 12)), SUM),
        (
            linears(
                lambda m, x: m.down(torch.cat([m.up(x), m.other(x)], -1)), other=nn.Linear(8, 4), down=nn.Linear(16, 8)
            ),
            BOTH,
        ),
        (
            linears(lambda m, x: m.down(torch.cat([m.up(x), m.other(x)], 1)), other=nn.Linear(8, 12)),
            "the channels of linear_2 are mixed",
        ),
    ],
)
def test_two_linears(net: Net, expected: str) -> None:
    assert check(net, X) == expected


def attention(f: Callable[..., Tensor], heads: int = 4, **more: Any) -> Net:
    """``f`` of query, key and value with ``heads`` heads of keys and values, and 4 of queries."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
        return m.down(f(q, k, v).transpose(1, 2).flatten(2))

    parts = {"q": nn.Linear(8, 16), "k": nn.Linear(8, heads * 4), "v": nn.Linear(8, heads * 4)}
    return Net(forward, **(parts | {"down": nn.Linear(16, 8)} | more))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3)).softmax(-1) @ v


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in m.qkv(x).split(8, -1))
    return m.down(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


VALUES = "down.weight <- v.weight v.bias"
COMPARED = "attention compares it"


@pytest.mark.parametrize(
    ("net", "name", "expected"),
    [
        (attention(F.scaled_dot_product_attention), "v.weight", VALUES),
        (attention(F.scaled_dot_product_attention), "q.weight", COMPARED),
        (attention(F.scaled_dot_product_attention), "k.weight", COMPARED),
        (attention(lambda q, k, v: F.scaled_dot_product_attention(q, v, v)), "v.weight", COMPARED),
        (attention(lambda q, k, v: F.scaled_dot_product_attention(q, q, v, k @ k.mT)), "v.weight", VALUES),
        (attention(lambda q, k, v: F.scaled_dot_product_attention(q, q, v, k[..., :1])), "k.weight", COMPARED),
        (attention(by_hand), "v.weight", VALUES),
        (attention(by_hand), "k.weight", "a product mixes its channels"),
        (attention(by_hand), "q.weight", "it is multiplied by what is no weight"),
        (attention(repeated, 2), "v.weight", VALUES),
        (attention(grouped, 2), "v.weight", VALUES),
        (attention(grouped, 1), "v.weight", VALUES),
        (
            Net(fused, qkv=nn.Linear(8, 24), down=nn.Linear(8, 6)),
            "qkv.weight",
            "down.weight <- qkv.weight qkv.bias 8/24",
        ),
    ],
)
def test_attention(net: Net, name: str, expected: str) -> None:
    assert check(net, X, name) == expected


def test_heads_that_share_values_share_factors() -> None:
    for f in (repeated, grouped):
        gm = capture(attention(f, 2), X)
        found = Flows(gm).out_of(producer(gm, "v.weight"))
        assert isinstance(found, Flow)
        assert found.readers[0].channels.tolist() == [*range(4)] * 2 + [*range(4, 8)] * 2


class Recurrent(nn.Module):
    """A linear that reads what another gave, behind ``state``; ``next_of(state, new)`` is the output ``present_state``."""

    def __init__(self, next_of: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.next_of = next_of
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, state: Tensor, x: Tensor) -> Any:
        new = self.up(x)
        read = torch.cat([state, new], 1)
        return {"y": self.down(read), **self.next_of(state, new, read)}


def recurrent(next_of: Callable[[Tensor, Tensor, Tensor], Any], *caches: CachePair) -> fx.GraphModule:
    gm = capture(Recurrent(next_of), torch.ones(2, 3, 8), torch.ones(2, 5, 8))
    gm.meta[KEY] = replace(source_of(gm), caches=caches)
    return gm


STATE = CachePair("state", "present_state")
GIVEN = "it is an output of the model"
NOT_GIVEN_BACK = "a cache that is not given back holds it"


@pytest.mark.parametrize(
    ("next_of", "caches", "expected"),
    [
        (lambda s, new, read: {"present_state": read}, (STATE,), "down.weight <- up.weight up.bias"),
        # names make no cache: what is no declared pair is an input and an output as all others
        (lambda s, new, read: {"present_state": read}, (), "the channels of linear_1 are mixed"),
        (lambda s, new, read: {"present_state": new}, (), "the channels of linear_1 are mixed"),
        (lambda s, new, read: {}, (), "the channels of linear_1 are mixed"),
        # pairs that do not hold what the model will read
        (lambda s, new, read: {"present_state": new}, (STATE,), NOT_GIVEN_BACK),
        (lambda s, new, read: {"present_state": torch.cat([s, s], 1)}, (STATE,), NOT_GIVEN_BACK),
        (lambda s, new, read: {"present_state": torch.cat([new, s], 1)}, (STATE,), NOT_GIVEN_BACK),
        (lambda s, new, read: {"present_state": read, "z": read}, (STATE,), "the channels of linear_1 are mixed"),
        (lambda s, new, read: {"present_state": read, "z": s.sum()}, (STATE,), "its cache has other readers"),
        (lambda s, new, read: {"present_state": read, "z": torch.zeros_like(s)}, (STATE,), BOTH),
        (lambda s, new, read: {"present_state": read, "z": read * 2}, (STATE,), GIVEN),
    ],
)
def test_caches_are_declared_pairs(next_of: Any, caches: tuple[CachePair, ...], expected: str) -> None:
    gm = recurrent(next_of, *caches)
    assert text_of(Flows(gm).out_of(producer(gm, "up.weight"))) == expected


class Replaced(nn.Module):
    """A state that is not grown, but made anew."""

    def __init__(self, next_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.next_of = next_of
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, state: Tensor, x: Tensor) -> dict[str, Tensor]:
        new = self.up(x)
        return {"y": self.down(new) + state.sum(), "present_state": self.next_of(state, new)}


@pytest.mark.parametrize("next_of", [lambda s, new: new, lambda s, new: torch.cat([s * 1, new], 1)])
def test_a_state_that_is_made_anew_keeps_its_units(next_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = capture(Replaced(next_of), torch.ones(2, 3, 8), torch.ones(2, 5, 8))
    gm.meta[KEY] = replace(source_of(gm), caches=(STATE,))
    assert Flows(gm).out_of(producer(gm, "up.weight")) == Stopped(GIVEN)


def test_a_cache_is_in_the_units_of_what_is_added_to_it() -> None:
    before, after = (lifted(recurrent(lambda s, new, read: {"present_state": read}, STATE)) for _ in range(2))
    flow = Flows(after).out_of(producer(after, "up.weight"))
    assert isinstance(flow, Flow)
    factors = torch.arange(1.0, 9)
    move_factors(GraphIndex(after), flow, factors, "test")
    state, x = torch.zeros(2, 3, 8).double(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).double()
    (y, held), (smoothed, divided) = before(state, x), after(state, x)
    assert torch.allclose(y, smoothed, rtol=0, atol=1e-12 * float(y.abs().max()))
    assert torch.allclose(held, divided * factors, rtol=0, atol=1e-12 * float(held.abs().max()))


def convolutions(f: Callable[..., Any], first: int = 1, second: int = 1, **more: Any) -> Net:
    """``f`` between two convolutions of so many groups."""
    parts = {
        "up": nn.Conv2d(4, 8, 3, groups=first),
        "down": nn.Conv2d(8, 6 if second < 8 else 8, 3, padding=1, groups=second),
    }
    return Net(lambda m, x: m.down(f(m.up(x))), **(parts | more))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (convolutions(F.relu), BOTH),
        (convolutions(lambda h: F.max_pool2d(h.relu(), 3, 1, 1)), BOTH),
        (convolutions(lambda h: F.avg_pool2d(h, 2)), BOTH),
        (convolutions(F.relu, 2, 2), BOTH),
        (convolutions(F.relu, 4, 8), BOTH),
        (convolutions(F.relu6), "aten.relu6.default reads it"),
        (convolutions(F.relu, down=nn.Conv2d(8, 6, 3, padding="same", bias=False)), BOTH),
        (convolutions(lambda h: F.adaptive_avg_pool2d(h, 1).flatten(1), down=nn.Linear(8, 3)), BOTH),
        (convolutions(lambda h: h.mean((2, 3)), down=nn.Linear(8, 3)), BOTH),
        (convolutions(lambda h: h.relu().flatten(1), down=nn.Linear(128, 3)), BOTH),
        (convolutions(lambda h: h, down=nn.Linear(4, 3)), "the channels of linear are mixed"),
        (convolutions(lambda h: h.transpose(1, 2), down=nn.Conv2d(4, 3, 1)), "the channels of conv2d_1 are mixed"),
        (
            convolutions(lambda h: F.conv_transpose2d(h, torch.ones(8, 8, 1, 1))),
            "the weight of conv_transpose2d has other readers",
        ),
    ],
)
def test_convolutions(net: Net, expected: str) -> None:
    assert check(net, IMAGE) == expected


def test_a_batch_norm() -> None:
    net = convolutions(F.relu, 1, 8, norm=nn.BatchNorm2d(8))
    net.run = lambda m, x: m.down(F.relu(m.norm(m.up(x))))
    assert check(net, IMAGE, "norm.weight") == "down.weight <- norm.weight norm.bias"
    assert check(net, IMAGE) == "aten.batch_norm.default reads it"


@pytest.mark.parametrize(
    "net",
    [
        convolutions(F.relu),
        convolutions(F.relu, 2, 2),
        convolutions(lambda h: F.max_pool2d(h, 3, 1, 1)),
        convolutions(lambda h: F.avg_pool2d(h, 3, 1, 1)),
        convolutions(lambda h: F.adaptive_avg_pool2d(h, 3)),
    ],
)
def test_one_image_without_batches(net: Net) -> None:
    forward = net.run
    net.run = lambda m, x: forward(m, x[0])
    assert check(net, torch.ones(2, 4, 10, 10)) == BOTH  # as many rows as channels between them


def test_convolutions_of_one_axis() -> None:
    parts = {"up": nn.Conv1d(4, 6, 3), "down": nn.Conv1d(6, 4, 3, padding="same", groups=2)}
    assert check(Net(lambda m, x: m.down(m.up(x).relu()), **parts), torch.ones(2, 4, 8)) == BOTH


ORDER = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda h: h[ORDER], BOTH),
        (lambda h: h[:, ORDER], "rows are picked across its channels"),
        (lambda h: h[ORDER, ORDER][:, None] * torch.ones(1, 8), "rows are picked across its channels"),
        (lambda h: h.index_select(0, ORDER), BOTH),
        (lambda h: h.index_select(1, ORDER), "rows are picked across its channels"),
        (lambda h: h.index_select(-1, ORDER), "rows are picked across its channels"),
        (lambda h: h[h.argsort(0)[:, 0]], "aten.argsort.default reads it"),
        (lambda h: torch.ones(9, 8)[h[:, 0].to(torch.int64).clamp(0, 8)], "aten._to_copy.default makes it torch.int64"),
    ],
)
def test_rows(f: Callable[..., Any], expected: str) -> None:
    net = between(f, up=nn.Linear(8, 8), down=nn.Linear(8, 8))
    assert check(net, torch.ones(8, 8)) == expected


def test_experts() -> None:
    net = MoE()
    net.__class__ = type("Experts", (MoE,), {})  # no copy
    assert check(net, torch.ones(5, 8), "experts.gate_up_proj") == "experts.down_proj <- experts.gate_up_proj 6/12"
