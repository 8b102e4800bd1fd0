"""A decoder of one block, small enough to read, into which tests put what a rotation must notice."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


class RMS(nn.Module):
    """An RMS norm as transformers write it."""

    def __init__(self, width: int, one: float = 0.0) -> None:
        super().__init__()
        self.weight, self.one = nn.Parameter(torch.ones(width)), one

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (self.one + self.weight) if self.one else self.weight * x


class Decoder(nn.Module):
    """Two heads that share one key and value; an MLP with a gate. ``twists``: what is done to a value, by its name.

    ``embedded``, ``normed``, ``query``, ``key``, ``value``, ``attended``, ``written``, ``hidden`` and ``last`` are these
    names; those in ``returned`` are outputs, too.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = RMS,
        bias: bool = False,
        width: int = 12,
        returned: tuple[str, ...] = (),
        **twists: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.norm_1, self.norm_2, self.norm_3 = norm(8), norm(8), norm(8)
        self.q, self.k, self.v = nn.Linear(8, 8, bias=bias), nn.Linear(8, 4, bias=bias), nn.Linear(8, 4, bias=bias)
        self.o = nn.Linear(8, 8, bias=bias)
        self.gate, self.up = nn.Linear(8, width, bias=bias), nn.Linear(8, width, bias=bias)
        self.down = nn.Linear(width, 8, bias=bias)
        self.head = nn.Linear(8, 16, bias=False)
        self.extra, self.extra_2 = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)  # for twists
        self.table = nn.Parameter(torch.empty(1, 8))
        self.twists, self.returned = twists, returned
        self.seen: dict[str, Tensor] = {}

    def twist(self, name: str, x: Tensor) -> Any:
        self.seen[name] = self.twists[name](self, x) if name in self.twists else x
        return self.seen[name]

    def attention(self, h: Tensor) -> Tensor:
        batch, length, _ = h.shape
        q = self.twist("query", self.q(h).view(batch, length, 2, 4).transpose(1, 2))
        k = self.twist("key", self.k(h).view(batch, length, 1, 4).transpose(1, 2))
        v = self.twist("value", self.v(h).view(batch, length, 1, 4).transpose(1, 2))
        k, v = (one.expand(batch, 2, length, 4) for one in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.twist("attended", y).transpose(1, 2).reshape(batch, length, 8)

    def forward(self, tokens: Tensor) -> Any:
        self.seen_tokens = tokens
        x = self.twist("embedded", self.embedding(tokens))
        x = x + self.twist("written", self.o(self.attention(self.norm_1(x))))
        h = self.twist("normed", self.norm_2(x))
        hidden = self.twist("hidden", F.silu(self.gate(h)) * self.up(h))
        x = self.twist("last", x + self.down(hidden))
        y = self.head(self.norm_3(x))
        return (y, *(self.seen[name] for name in self.returned)) if self.returned else y
