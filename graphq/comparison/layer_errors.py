"""What is found out about one layer as batches go by: its errors, its dead channels, its worst tokens."""

import heapq
import math
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from graphq.numerics.error import decibels

_AT_A_TIME: Final = 1 << 20  # elements that are held in float64


def finite(value: float) -> float | None:
    """The number; None for one that JSON does not have."""
    return value if math.isfinite(value) else None


@final
class Sums:
    """Of rows of a reference x and of what stands for them, y: how many, and the sums of x^2, y^2, x y, (x - y)^2."""

    def __init__(self) -> None:
        self.rows = 0
        self.x = self.y = self.product = self.noise = 0.0

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Rows ``[N, C]`` of both; the squared error of each row ``[N]``, in float64."""
        noise: list[Tensor] = []
        count = max(1, _AT_A_TIME // max(x.shape[-1], 1))
        for a, b in zip(x.split(count), y.split(count), strict=True):
            a, b = a.double(), b.double()
            self.x += float(a.square().sum())
            self.y += float(b.square().sum())
            self.product += float((a * b).sum())
            noise.append((a - b).square().sum(-1))
            self.noise += float(noise[-1].sum())
        self.rows += x.shape[0]
        return torch.cat(noise)

    @property
    def share(self) -> float:
        """The squared error as a share of the reference's squares; infinite where that is no number."""
        if self.noise == 0:
            return 0.0
        share = self.noise / self.x if self.x > 0 else math.inf
        return share if share == share else math.inf

    @property
    def sqnr_db(self) -> float:
        """10 log10(sum x^2 / sum (x - y)^2); infinite where they are equal."""
        return -math.inf if self.share == math.inf else decibels(self.share)

    @property
    def cosine(self) -> float:
        """Of the angle between both; 1 where they are equal, 0 where it is no number."""
        if self.noise == 0:
            return 1.0
        size = math.sqrt(self.x * self.y)
        return self.product / size if 0 < size < math.inf else 0.0

    def to_json(self) -> dict[str, float | None]:
        """Plain data: ``sqnr_db``, ``cosine``, ``error``, the share; null where a number is not finite."""
        return {"sqnr_db": finite(self.sqnr_db), "cosine": self.cosine, "error": finite(self.share)}


@final
@dataclass(frozen=True, order=True)
class Row:
    """A row of a layer's output, a token mostly: its squared error, over the mean square of the reference's rows.

    ``at``: its indices in the output of this batch, without the channels. ``token``: its id, -1 where it has none.
    """

    error: float
    batch: int
    at: tuple[int, ...]
    token: int = -1

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``token`` is null where it has none."""
        token = self.token if self.token >= 0 else None
        return {"batch": self.batch, "at": list(self.at), "token": token, "error": finite(self.error)}


@final
@dataclass(frozen=True)
class Places:
    """Where the compared rows of a batch stand. shape: of all rows. rows: the indices of those that count; None: all.
    tokens: their ids by row, if they have any.
    """

    batch: int
    shape: tuple[int, ...]
    rows: Tensor | None
    tokens: Tensor | None

    def row(self, index: int, error: float) -> Row:
        """The row of this index among those that count."""
        flat = index if self.rows is None else int(self.rows[index])
        token = -1 if self.tokens is None else int(self.tokens.reshape(-1)[flat])
        at: list[int] = []
        for size in reversed(self.shape):
            flat, place = divmod(flat, size)
            at.insert(0, place)
        return Row(error, self.batch, tuple(at), token)


@final
class LayerErrors:
    """The errors of one layer so far. ``local``: of its output for the reference's input. ``cumulative``: for the input
    that the compared graph gives it. Of neither there may be rows.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.local, self.cumulative = Sums(), Sums()
        self._worst: list[Row] = []
        self._extremes: list[Tensor] = []  # the least and the largest of each channel: of the reference, of the other

    def add_local(self, want: Tensor, got: Tensor, places: Places) -> None:
        """Rows of the output ``[N, C]`` for the reference's input."""
        noise = self.local.add(want, got)
        top = noise.topk(min(self.most, noise.numel()))
        for error, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            if error > 0:
                heapq.heappush(self._worst, places.row(index, error))
        while len(self._worst) > self.most:
            heapq.heappop(self._worst)

    def add_cumulative(self, want: Tensor, got: Tensor) -> None:
        """Rows of the output ``[N, C]`` for the compared graph's own input."""
        self.cumulative.add(want, got)
        if want.shape[0]:
            found = [*want.aminmax(dim=0), *got.aminmax(dim=0)]
            pick = (torch.minimum, torch.maximum, torch.minimum, torch.maximum)
            held = self._extremes or found
            self._extremes = [f(a, b) for f, a, b in zip(pick, held, found, strict=True)]

    @property
    def worst(self) -> tuple[Row, ...]:
        """The rows of the largest local errors, the largest first."""
        mean = self.local.x / max(self.local.rows, 1)
        return tuple(
            Row(one.error / mean if mean > 0 else math.inf, one.batch, one.at, one.token)
            for one in sorted(self._worst, reverse=True)
        )

    @property
    def dead_channels(self) -> tuple[int, ...]:
        """The channels of the output that are constant where those of the reference are not."""
        if not self._extremes:
            return ()
        low, high, other_low, other_high = self._extremes
        return tuple(((low < high) & (other_low == other_high)).nonzero().flatten().tolist())
