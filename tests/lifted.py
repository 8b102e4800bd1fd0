"""Graphs in float64 throughout, for proofs that a rewriting leaves the function alone."""

import copy
from typing import Any

import torch
from torch import Tensor, fx

from graphq.state import put_tensor, tensor_of


def lifted(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` whose parameters, buffers, constants and casts of floats are all float64."""
    made = copy.deepcopy(gm)
    wide: dict[tuple[object, ...], Tensor] = {}  # tied tensors stay tied, which they do not in a copy
    for name in list(made.state_dict(keep_vars=True)):
        tensor = tensor_of(gm, name)
        if tensor.is_floating_point():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            new = wide.setdefault(place, tensor.detach().double())
            put_tensor(made, name, torch.nn.Parameter(new, False) if isinstance(tensor, torch.nn.Parameter) else new)
    for node in made.graph.nodes:
        node.args = tuple(_wide(a) for a in node.args)
        node.kwargs = {key: _wide(value) for key, value in node.kwargs.items()}
        val = node.meta.get("val")
        node.meta["val"] = type(val)(map(_double, val)) if isinstance(val, list | tuple) else _double(val)
    made.recompile()
    return made


def _double(val: Any) -> Any:
    if not isinstance(val, Tensor) or not val.is_floating_point():
        return val
    with val.fake_mode:  # type: ignore[attr-defined]
        return val.double()


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def run_lifted(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The float outputs of the graph lifted, on inputs lifted."""
    with torch.no_grad():
        outputs = lifted(gm)(*(x.double() if x.is_floating_point() else x for x in inputs))
    return tuple(y for y in outputs if isinstance(y, Tensor) and y.is_floating_point())


def assert_same_function(
    before: fx.GraphModule, after: fx.GraphModule, inputs: tuple[Tensor, ...], tolerance: float
) -> None:
    """Every float output agrees within ``tolerance`` of its largest magnitude, in float64 throughout."""
    for old, new in zip(run_lifted(before, inputs), run_lifted(after, inputs), strict=True):
        assert old.dtype == torch.float64
        assert old.numel()
        error = (new - old).abs().max() / old.abs().max()
        assert error <= tolerance, float(error)
