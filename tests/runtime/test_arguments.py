"""What nodes of an artifact may give their ops: what schemas take, and sizes that a tensor can have."""

from typing import Any

import pytest
import torch
from torch import fx

from graphq.errors import TargetError
from graphq.runtime.arguments import check_arguments

aten: Any = torch.ops.aten
X = fx.Graph().placeholder("x")
LAST = 2**63 - 1


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.slice.Tensor, (X, 0, 0, LAST)),
        (aten.full.default, ([2], LAST)),  # a number, not a size
        (aten.full.default, ([2], -LAST)),
        (aten.full.default, ([2**16, 2**15], 0)),
        (aten.expand.default, (X, [2**20, 2**20, -1])),  # makes no copy
        (aten.view.default, (X, [2**20, 2**20])),
        (aten.split_with_sizes.default, (X, [2**16, 2**16])),
        (aten.arange.default, (2**31,)),
        (aten.arange.start, (2**40, 2**40 + 5)),
        (aten.arange.start_step, (0, 2**40, 2**20)),
        (aten.arange.default, (X,)),
        (aten.eye.m, (2**16, 2**15)),
        (aten.triu_indices.default, (2**15, 2**15, 0)),
        (aten.repeat.default, (X, [2**16, 2**15])),
        (aten.tensor_split.sections, (X, 2**16)),
        (aten.masked_fill.Scalar, (X, X, -LAST)),
    ],
    ids=str,
)
def test_arguments_in_range(target: Any, args: tuple[Any, ...]) -> None:
    check_arguments("s", target, args, {})


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        (aten.full.default, ([2**16, 2**16], 0), "makes a tensor"),
        (aten.tile.default, (X, [2**16, 2**16]), "makes a tensor"),
        (aten.repeat.default, (X, [2**16, 2**16]), "makes a tensor"),
        (aten.affine_grid_generator.default, (X, [1, 1, 2**16, 2**16], False), "makes a tensor"),
        (aten.arange.default, (1e12,), "makes a tensor"),
        (aten.arange.start, (-(2**40), 0), "makes a tensor"),
        (aten.arange.start_step, (0, 2**40, -1), "makes a tensor"),
        (aten.arange.default, (float("inf"),), "makes a tensor"),
        (aten.eye.default, (2**16,), "makes a tensor"),
        (aten.eye.m, (2**16, 2**16), "makes a tensor"),
        (aten.tril_indices.default, (2**16, 2**16, 0), "makes a tensor"),
        (aten.linspace.default, (0, 1, 2**32), "makes a tensor"),
        (aten.one_hot.default, (X, 2**32), "num_classes: 4294967296 is out of range"),
        (aten.constant_pad_nd.default, (X, [0, -(2**32)]), "pad: [0, -4294967296] is out of range"),
        (aten.tensor_split.sections, (X, 2**17), "sections: 131072 is out of range"),
        (aten.avg_pool2d.default, (X, [2, 2**17]), "kernel_size: [2, 131072] is out of range"),
    ],
    ids=str,
)
def test_arguments_out_of_range(target: Any, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TargetError) as caught:
        check_arguments("s", target, args, {})
    assert str(caught.value).startswith(f"graph.json: s: {target}: {message}")
