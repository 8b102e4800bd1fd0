"""How far an approximation is from a tensor."""

import math

import torch
from torch import Tensor


def sqnr_db(x: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum x^2 / sum (x - approximation)^2); inf if equal."""
    noise = (x.double() - approximation.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(x.double().square().sum() / noise))


def decibels(noise: float) -> float:
    """The signal to noise ratio that a noise has beside a signal of power 1, in decibels."""
    return -10 * math.log10(noise) if noise > 0 else math.inf
