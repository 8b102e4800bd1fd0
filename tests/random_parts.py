"""Parts of random models, each in one of the ways in which models are written; ``repr`` says which."""

import importlib
import random
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from graphq.runtime import ops
from tests.models import route

# Choices that no graph has: each stands here until the passes know it.
UNKNOWN: Final = frozenset[object]()


@final
class Dice(random.Random):
    """What choices are drawn from. ``tidy``: without those that stop a rotation, and with norms of one kind."""

    tidy = False
    norm = ""


_UNTIDY: Final = frozenset[object](
    {"computed", "plain layer", "plain rms", "addmm alpha beta", "layer without bias", "group", "batch"}
) | {
    *("two axes", "part", "none", "gate", "norms of heads", "again", "scaled", "hidden", "normed"),
}


class Part(nn.Module):
    """A module that draws how it is made; ``drawn`` is printed."""

    def __init__(self, dice: Dice) -> None:
        super().__init__()
        self.dice = dice
        self.drawn: dict[str, Any] = {}

    def draw(self, name: str, *choices: Any) -> Any:
        barred = UNKNOWN | _UNTIDY if self.dice.tidy else UNKNOWN
        self.drawn[name] = self.dice.choice([choice for choice in choices if choice not in barred])
        return self.drawn[name]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.drawn.items())


class Project(Part):
    """A linear: whole, as GPT-2's ``Conv1D``, spelt out, or with a computed weight."""

    def __init__(self, dice: Dice, width: int, out: int, is_vector: bool = False) -> None:
        super().__init__(dice)
        others = (
            ("x @ w.T", "x @ w", "computed")
            if is_vector
            else ("addmm", "addmm", "addmm alpha beta", "x @ w.T", "x @ w", "computed")
        )
        self.way = self.draw("way", "linear", "linear", "linear", "linear", "linear", *others)
        self.drawn["shape"] = [out, width]
        is_transposed = self.way in ("addmm", "addmm alpha beta", "x @ w")
        self.weight = nn.Parameter(torch.empty([width, out] if is_transposed else [out, width]))
        self.bias = (
            nn.Parameter(torch.empty(out)) if self.way.startswith("addmm") or self.draw("bias", True, False) else None
        )
        self.scale = nn.Parameter(torch.empty(out, 1)) if self.way == "computed" else None

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "addmm" | "addmm alpha beta":
                factors: Any = {"beta": 0.5, "alpha": 2.0} if self.way == "addmm alpha beta" else {}
                bias: Any = self.bias
                flat = x.reshape(-1, x.shape[-1])
                return torch.addmm(bias, flat, self.weight, **factors).view(*x.shape[:-1], -1)
            case "x @ w.T" | "x @ w":
                y = x @ (self.weight.T if self.way == "x @ w.T" else self.weight)
                return y if self.bias is None else y + self.bias
            case _:
                w = self.weight if self.scale is None else self.weight * self.scale
                return F.linear(x, w, self.bias)


class Norm(Part):
    """A norm of the last axis, of one of the kinds and with or without each parameter."""

    mean: Tensor
    var: Tensor

    def __init__(self, dice: Dice, width: int) -> None:
        super().__init__(dice)
        odd = (
            "plain layer",
            "plain rms",
            "addmm alpha beta",
            "layer without bias",
            "group",
            "batch",
            "two axes",
            "part",
            "none",
        )
        self.kind = self.draw("kind", "layer", "layer", "rms", "1 + rms", "nn.RMSNorm", "cast rms", *odd)
        if dice.tidy:
            self.kind = self.drawn["kind"] = dice.norm = dice.norm or self.kind
        self.width = width
        size = width // 2 if self.kind in ("two axes", "part") else width
        if self.kind not in ("plain layer", "plain rms", "none"):
            self.weight = nn.Parameter(torch.empty([2, size] if self.kind == "two axes" else [size]))
        has_bias = self.kind in ("layer", "group", "batch", "two axes")
        self.bias = nn.Parameter(torch.empty(self.weight.shape)) if has_bias else None
        if self.kind == "batch":
            self.register_buffer("mean", torch.empty(width))
            self.register_buffer("var", torch.empty(width))
        if self.kind == "part":
            self.rest = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "layer" | "layer without bias":
                return F.layer_norm(x, [self.width], self.weight, self.bias, 1e-5)
            case "plain layer":
                return F.layer_norm(x, [self.width])
            case "nn.RMSNorm":
                return F.rms_norm(x, [self.width], self.weight, 1e-6)
            case "two axes":
                split = x.unflatten(-1, (2, -1))
                return F.layer_norm(split, list(split.shape[-2:]), self.weight, self.bias).flatten(-2)
            case "part":
                left, right = x.chunk(2, -1)
                return torch.cat([F.rms_norm(left, [self.width // 2], self.weight, 1e-6), right * self.rest], -1)
            case "group":
                channels = x.reshape(-1, self.width)
                return F.group_norm(channels, 2, self.weight, self.bias).view(x.shape)
            case "batch":
                channels = x.reshape(-1, self.width)
                return F.batch_norm(channels, self.mean, self.var, self.weight, self.bias).view(x.shape)
            case "none":
                return x
            case _:
                y = x.to(torch.float32) if self.kind == "cast rms" else x
                y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
                y = y.to(x.dtype)
                if self.kind == "plain rms":
                    return y
                return y * (1 + self.weight) if self.kind == "1 + rms" else self.weight * y


def rotated(x: Tensor) -> Tensor:
    """``x[B, H, S, D]`` turned by its place, as rotary embeddings do."""
    half = x.shape[-1] // 2
    places = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.arange(1, half + 1, dtype=x.dtype) / half
    angles = torch.cat([places, places], -1)
    swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + swapped * angles.sin()


class Attention(Part):
    """Of one or several heads, with fewer keys and values or not, fused or spelt out."""

    def __init__(self, dice: Dice, width: int) -> None:
        super().__init__(dice)
        self.heads, self.kv = self.draw("heads", (1, 1), (2, 2), (2, 1), (4, 2))
        self.size = self.draw("size", 4, 8)
        self.fused = self.draw("fused", True, True, False)
        self.repeat = self.draw("repeat", "interleave", "expand")
        self.rotary = self.draw("rotary", True, False)
        self.packed = self.draw("packed", None, None, "split", "chunk", "slice") if self.kv == self.heads else None
        self.gated = self.draw("gated", None, None, "gate")
        q, kv = self.heads * self.size, self.kv * self.size
        if self.packed:
            self.qkv = Project(dice, width, 3 * q)
        else:
            self.q, self.k, self.v = Project(dice, width, q), Project(dice, width, kv), Project(dice, width, kv)
        norms = self.draw("norms", None, None, "norms of heads")
        self.q_norm, self.k_norm = (Norm(dice, self.size) if norms else nn.Identity() for _ in range(2))
        self.gate = Project(dice, width, q) if self.gated else None
        self.o = Project(dice, q, width)

    def apart(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.packed:
            return self.q(x), self.k(x), self.v(x)
        y, n = self.qkv(x), self.heads * self.size
        match self.packed:
            case "split":
                return y.split(n, -1)
            case "chunk":
                return y.chunk(3, -1)
            case _:
                return y[..., :n], y[..., n : 2 * n], y[..., 2 * n :]

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (y.reshape(b, s, -1, self.size).transpose(1, 2) for y in self.apart(x))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        if self.heads != self.kv:
            times = self.heads // self.kv
            if self.repeat == "interleave":
                k, v = (y.repeat_interleave(times, 1) for y in (k, v))
            else:
                k, v = (
                    y[:, :, None].expand(b, self.kv, times, s, self.size).reshape(b, -1, s, self.size) for y in (k, v)
                )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(2, 3) * self.size**-0.5
            y = scores.softmax(-1) @ v
        y = y.transpose(1, 2).reshape(b, s, -1)
        return self.o(y if self.gate is None else y * self.gate(x).sigmoid())


class MLP(Part):
    """With or without a gate, which is a linear of its own or half of one."""

    def __init__(self, dice: Dice, width: int) -> None:
        super().__init__(dice)
        hidden = self.draw("hidden", 8, 12, 16, 24)
        self.kind = self.draw("kind", "plain", "swiglu", "glu")
        self.act = self.draw("act", "relu", "relu", "leaky_relu", "silu", "gelu", "identity")
        self.up = Project(dice, width, 2 * hidden if self.kind == "glu" else hidden)
        self.gate = Project(dice, width, hidden) if self.kind == "swiglu" else None
        self.down = Project(dice, hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        act = (lambda y: y) if self.act == "identity" else getattr(F, self.act)
        match self.kind:
            case "plain":
                return self.down(act(self.up(x)))
            case "swiglu":
                assert self.gate is not None
                return self.down(act(self.gate(x)) * self.up(x))
            case _:
                gate, up = self.up(x).chunk(2, -1)
                return self.down(act(gate) * up)


class Experts(Part):
    """Rows go to the expert that a router scores highest."""

    def __init__(self, dice: Dice, width: int) -> None:
        super().__init__(dice)
        self.way = self.draw("way", "grouped_linear", "grouped_mm_fallback")
        self.fused = self.draw("fused", True, True, False)
        self.router = nn.Linear(width, 3, bias=False)
        self.experts = nn.ParameterDict({"down_proj": nn.Parameter(torch.empty(3, width, 6))})
        for name in ["gate_up_proj"] if self.fused else ["gate_proj", "up_proj"]:
            self.experts[name] = nn.Parameter(torch.empty(3, 12 if self.fused else 6, width))

    def product(self, x: Tensor, name: str, offsets: Tensor) -> Tensor:
        if self.way == "grouped_linear":
            return ops.grouped_linear(x, self.experts[name], offsets)
        importlib.import_module("transformers.integrations.moe")  # defines the op
        return torch.ops.transformers.grouped_mm_fallback(x, self.experts[name].transpose(1, 2), offsets)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        order, offsets = route(self.router(rows))
        rows = rows[order]
        if self.fused:
            gate, up = self.product(rows, "gate_up_proj", offsets).chunk(2, -1)
        else:
            gate, up = (self.product(rows, name, offsets) for name in ("gate_proj", "up_proj"))
        return self.product(F.silu(gate) * up, "down_proj", offsets)[order.argsort()].view(x.shape)


class Pieces(Part):
    """Pieces of the last axis, joined again in an order and with ops of their own."""

    def __init__(self, dice: Dice, width: int) -> None:
        super().__init__(dice)
        self.cut = self.draw("cut", "split", "chunk", "slice", "unbind")
        self.flip = self.draw("flip", True, False)
        self.ops = self.draw("left", "relu", "neg", "none"), self.draw("right", "half", "sin", "none")
        self.before, self.after = Project(dice, width, 12), Project(dice, 12, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        match self.cut:
            case "split":
                left, right = y.split([4, 8], -1)
            case "chunk":
                left, right = y.chunk(2, -1)
            case "slice":
                left, right = y[..., :4], y[..., 4:]
            case _:
                left, right = y.unflatten(-1, (2, -1)).unbind(-2)
        made = {"relu": F.relu, "neg": torch.neg, "half": lambda z: z * 0.5, "sin": torch.sin}
        left, right = (made.get(op, lambda z: z)(z) for op, z in zip(self.ops, (left, right), strict=True))
        return self.after(torch.cat([right, left] if self.flip else [left, right], -1))


class Along(Part):
    """A convolution along the sequence: whole, by groups, by channel, or of one sequence for the batch."""

    def __init__(self, dice: Dice, width: int) -> None:
        super().__init__(dice)
        self.groups = self.draw("groups", 1, 1, 2, width)
        self.batch = self.draw("batch", "batched", "unbatched")
        self.norm = self.draw("norm", True, False)
        self.ends = (0, 0)
        if self.draw("transposed", False, False, True):
            conv: nn.Module = nn.ConvTranspose1d(width, width, 3, padding=1, groups=self.groups)
        else:
            padding = self.draw("padding", 1, "same", "in front", "causal")
            self.ends = {"in front": (1, 1), "causal": (2, 0)}.get(padding, (0, 0))
            conv = nn.Conv1d(width, width, 3, padding=0 if any(self.ends) else padding, groups=self.groups)
        self.conv = weight_norm(conv) if self.draw("weight norm", False, False, True) else conv
        self.bn = nn.BatchNorm1d(width) if self.norm else None
        self.out = Project(dice, width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = y.mean(0) if self.batch == "unbatched" else y
        y = self.conv(F.pad(y, self.ends) if any(self.ends) else y)
        y = y[None] if self.batch == "unbatched" else y
        y = y if self.bn is None else self.bn(y)
        return self.out(F.relu(y).transpose(1, 2)).expand(x.shape)


class Scalars(Part):
    """A few ops with one number, between two linears."""

    def __init__(self, dice: Dice, width: int) -> None:
        super().__init__(dice)
        self.steps = [
            self.draw(f"step {i}", "* 0.5", "/ 3", "+ 1", "* s", "neg", "clone", "dropout", "* v") for i in range(2)
        ]
        self.s, self.v = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(width))
        self.before, self.after = Project(dice, width, width), Project(dice, width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for step in self.steps:
            match step:
                case "* 0.5":
                    x = x * 0.5
                case "/ 3":
                    x = x / 3
                case "+ 1":
                    x = x + 1
                case "* s":
                    x = x * self.s
                case "neg":
                    x = -x
                case "clone":
                    x = x.clone()
                case "dropout":
                    x = F.dropout(x, 0.1, self.training)
                case _:
                    x = x * self.v
        return self.after(x)


class Query(Part):
    """What a linear makes of a learned vector gates, shifts or reads the sequence."""

    def __init__(self, dice: Dice, width: int) -> None:
        super().__init__(dice)
        self.rank = self.draw("rank", "vector", "row")
        self.use = self.draw("use", "gate", "add", "pool", "feed")
        self.query = nn.Parameter(torch.empty([width] if self.rank == "vector" else [1, width]))
        self.of_query, self.of_x = Project(dice, width, width, is_vector=True), Project(dice, width, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.of_query(self.query)
        match self.use:
            case "gate":
                return self.of_x(x) * q
            case "add":
                return self.of_x(x + q)
            case "feed":
                return self.of_x(F.relu(q)) + x.mean(1, keepdim=True)
            case _:
                y = self.of_x(x)
                weights = (y * q).sum(-1, keepdim=True).softmax(1)
                return (weights * y).sum(1, keepdim=True).expand(x.shape)


class Volume(nn.Module):
    """A convolution of one image of a film, in three dimensions."""

    def __init__(
        self, width: int, out: int, groups: int, bias: bool, is_transposed: bool, padding: tuple[int, int]
    ) -> None:
        super().__init__()
        kind = nn.ConvTranspose3d if is_transposed else nn.Conv3d
        rows, columns = padding
        own = (0, 2 - rows, 2 - columns) if is_transposed else (0, rows, columns)
        self.conv: nn.Module = kind(width, out, (1, 3, 3), padding=own, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unsqueeze(-3)).squeeze(-3)


PADS: Final = {  # by name: the sizes of pads one after the other, and the padding that the convolution still has
    "none": ((), (1, 1)),
    "both axes": (((1, 1, 1, 1),), (0, 0)),
    "columns": (((1, 1),), (1, 0)),
    "a pad of a pad": (((1, 1), (0, 0, 1, 1)), (0, 0)),
    "by nothing": (((0, 0, 0, 0),), (1, 1)),
    "ends": (((0, 2, 0, 2),), (0, 0)),  # which no convolution of torch's can hold
    "ones": (((1, 1, 1, 1),), (0, 0)),
    "read twice": (((1, 1, 1, 1),), (0, 0)),
}


class Convolved(Part):
    """Images, which may be padded, through a convolution, with what stands behind one."""

    def __init__(self, dice: Dice, width: int, out: int) -> None:
        super().__init__(dice)
        kind = self.draw("kind", "plain", "plain", "groups", "depthwise", "transposed", "volume", "unbatched")
        self.kind = kind
        groups = {"groups": 2, "depthwise": width}.get(kind, 1)
        out = width if kind == "depthwise" else out
        self.out = self.drawn["out"] = out
        bias = self.draw("bias", True, False)
        self.pad = self.draw("pad", *["none"] * len(PADS), *PADS)
        self.pads, padding = PADS[self.pad]
        if kind == "transposed":
            self.conv: nn.Module = nn.ConvTranspose2d(
                *(width, out, 3),
                padding=(2 - padding[0], 2 - padding[1]),
                groups=self.draw("groups", 1, 2),
                bias=bias,
            )
        elif kind == "volume":
            is_transposed = self.draw("transposed", True, False)
            self.conv = Volume(width, out, self.draw("groups", 1, 2), bias, is_transposed, padding)
        else:
            mode = self.draw("mode", "zeros", "zeros", "zeros", "reflect") if any(padding) else "zeros"
            own = padding if any(padding) else self.draw("padding", 0, "valid")
            self.conv = nn.Conv2d(width, out, 3, padding=own, groups=groups, bias=bias, padding_mode=mode)
        if kind != "volume" and self.draw("weight norm", False, False, False, True):
            self.conv = weight_norm(self.conv)
        self.norm = {
            "batch": nn.BatchNorm2d(out),
            "plain batch": nn.BatchNorm2d(out, affine=False),
            "group": nn.GroupNorm(2, out),
        }.get(self.draw("norm", "batch", "batch", "batch", "plain batch", "group", "none"), nn.Identity())
        acts = {
            "relu": nn.ReLU(),
            "silu": nn.SiLU(),
            "leaky": nn.LeakyReLU(),
            "prelu": nn.PReLU(out),
            "none": nn.Identity(),
        }
        self.act = acts[self.draw("act", "relu", "relu", "silu", "leaky", "prelu", "none")]
        pools = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
        pool = pools.get(self.draw("pool", "none", "none", "max", "avg"))
        is_padded = pool is not None and self.draw("pool pad", True, False)
        self.pool = nn.Identity() if pool is None else pool(3, 1, 0 if is_padded else 1)
        self.pool_pad = nn.ZeroPad2d(1) if is_padded else nn.Identity()
        self.residual = self.draw("residual", True, False)
        self.twice = self.draw("twice", False, False, True)

    def forward(self, x: Tensor) -> Tensor:
        padded = x.mean(0) if self.kind == "unbatched" else x
        for sizes in self.pads:
            padded = F.pad(padded, sizes, value=1.0 if self.pad == "ones" else 0.0)
        y = self.conv(padded)
        if self.pad == "read twice":
            y = y + padded.mean()
        y = self.pool(self.pool_pad(self.act(self.norm(y[None] if self.kind == "unbatched" else y))))
        if self.kind == "unbatched":
            y = y.expand(x.shape[0], *y.shape[1:])
        if self.twice:  # two halves of the channels change places
            left, right = y.chunk(2, 1)
            y = torch.cat([right, left], 1)
        return x + y if self.residual and x.shape[1] == y.shape[1] else y
