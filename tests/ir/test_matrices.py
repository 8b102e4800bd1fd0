"""Scales and output channels of the weights of every op, where axes hold groups."""

import pytest
import torch
from torch import nn

from graphq.ir.matrices import output_channels, scale_block
from graphq.ir.views import Weighted, ops_of
from graphq.spec.quant import PerChannel, PerGroup, PerTensor
from tests.models import capture

IMAGE = torch.ones(2, 4, 5, 5)


def op_of(layer: nn.Module, x: torch.Tensor = IMAGE) -> Weighted:
    return next(op for op in ops_of(capture(nn.Sequential(layer), x)) if isinstance(op, Weighted))


@pytest.mark.parametrize(
    ("layer", "channel", "group"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), [1, -1, -1, -1], [1, 2, -1, -1]),
        (nn.ConvTranspose2d(4, 6, 3), [-1, 1, -1, -1], [2, 1, -1, -1]),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), [2, 1, -1, -1], [2, 1, -1, -1]),  # one for each output of each group
        (nn.ConvTranspose2d(4, 8, 3, groups=4), [1, 1, -1, -1], [2, 1, -1, -1]),
    ],
)
def test_blocks_of_scales(layer: nn.Module, channel: list[int], group: list[int]) -> None:
    op = op_of(layer)
    assert scale_block(op, PerTensor()) == [-1] * 4
    assert scale_block(op, PerChannel()) == channel
    assert scale_block(op, PerGroup(2)) == group


def test_output_channels() -> None:
    assert output_channels(op_of(nn.Linear(5, 3), IMAGE)).tolist() == [[i] * 5 for i in range(3)]
    assert output_channels(op_of(nn.Conv2d(4, 6, 1, groups=2)))[:, :, 0, 0].tolist() == [[i, i] for i in range(6)]
    found = output_channels(op_of(nn.ConvTranspose2d(4, 6, 2, groups=2)))
    assert found[..., 0, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert torch.equal(found, found[..., :1, :1].expand(4, 3, 2, 2))
