"""How far an approximation is from what it stands for."""

import math
from typing import Final, final

import torch
from torch import Tensor

_AT_A_TIME: Final = 1 << 18  # elements that are held in float64


@final
class Noise:
    """The signal to quantization noise ratio of a tensor that is seen in parts along its first axis, whatever parts."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # of each row: squares of the signal, and of the noise

    def add(self, x: Tensor, approximation: Tensor) -> None:
        """Further rows."""
        width = x.shape[-1] if x.dim() > 1 else max(x.numel(), 1)
        count = max(1, _AT_A_TIME // max(width, 1))
        parts = (y.detach().reshape(-1, width).split(count) for y in (x, approximation))
        for rows, others in zip(*parts, strict=True):
            wide = rows.double()
            self._sums.append(torch.stack([wide.square().sum(1), wide.sub_(others).square_().sum(1)]))

    def sqnr_db(self) -> float:
        """10 log10(sum x^2 / sum (x - approximation)^2); inf if they are equal."""
        signal, noise = torch.cat(self._sums, 1).sum(1) if self._sums else torch.zeros(2, dtype=torch.float64)
        return float("inf") if noise == 0 else float(10 * torch.log10(signal / noise))


def sqnr_db(x: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum x^2 / sum (x - approximation)^2); inf if equal."""
    noise = Noise()
    noise.add(x, approximation)
    return noise.sqnr_db()


def decibels(noise: float) -> float:
    """The signal to noise ratio that a noise has beside a signal of power 1, in decibels."""
    return -10 * math.log10(noise) if noise > 0 else math.inf
