"""A small attention with caches, declared as such, for tests of what is done to caches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.export import FlatModel, export_flat
from graphq.capture.source import KEY, PAST, CachePair, TensorInput, source_of

PAIRS = (CachePair("key", "present_key"), CachePair("value", "present_value"))
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))
EMPTY = torch.zeros(2, 2, 0, 4)


class CachedAttention(nn.Module):
    """Four query heads that share two of keys and values, which are put behind what was kept of earlier tokens."""

    def __init__(self, appended: Callable[[Tensor, Tensor], Any] = lambda past, new: torch.cat([past, new], 2)) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 16, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.appended = appended

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.k, self.v))
        keys, values = self.appended(key, k), torch.cat([value, v], 2)
        wide_keys, wide_values = (one.repeat_interleave(2, 1) for one in (keys, values))
        return {
            "y": F.scaled_dot_product_attention(q, wide_keys, wide_values),
            "present_key": keys,
            "present_value": values,
        }


def cached(model: nn.Module | None = None, *pairs: CachePair) -> fx.GraphModule:
    """The graph of an attention with these caches (none given: its keys and values)."""
    model = (model or CachedAttention()).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    past = [TensorInput(name, torch.float32, ("batch", 2, PAST, 4)) for name in ("key", "value")]
    inputs = [TensorInput("x", torch.float32, ("batch", "sequence", 8)), *past]
    flat = FlatModel(model, [one.name for one in inputs], lambda module, tensors: module(**tensors))
    gm = export_flat(flat, inputs, (X, *(torch.ones(2, 2, 5, 4) for _ in past)), {}, {})
    gm.meta[KEY] = replace(source_of(gm), caches=pairs or PAIRS)
    return gm


def reference(gm: fx.GraphModule, x: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What the attention gives for first tokens whose keys and values come back as ``read`` says."""
    from graphq.state import tensor_of

    w = {name: tensor_of(gm, f"{name}.weight").detach() for name in "qkv"}
    q, k, v = (F.linear(x, w[name]).unflatten(-1, (-1, 4)).transpose(1, 2) for name in "qkv")
    k, v = (read(one).repeat_interleave(2, 1) for one in (k, v))
    return F.scaled_dot_product_attention(q, k, v)
