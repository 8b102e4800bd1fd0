"""Graphs in float64 throughout, for proofs that a rewriting leaves the function alone."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.state import put_tensor, tensor_of


def copied(gm: fx.GraphModule, change: Callable[[Tensor], Tensor] = Tensor.clone) -> fx.GraphModule:
    """A copy of ``gm`` with each float tensor changed, in which tied tensors stay tied; ``deepcopy`` unties them."""
    made = copy.deepcopy(gm)
    new: dict[tuple[object, ...], Tensor] = {}
    for name in list(gm.state_dict(keep_vars=True)):
        tensor = tensor_of(gm, name)
        if tensor.is_floating_point():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            own = new.setdefault(place, change(tensor.detach()))
            put_tensor(made, name, torch.nn.Parameter(own, False) if isinstance(tensor, torch.nn.Parameter) else own)
    return made


def lifted(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` whose parameters, buffers, constants and casts of floats are all float64."""
    made = copied(gm, Tensor.double)
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


def assert_same_answers(before: fx.GraphModule, after: fx.GraphModule, batch: Tensor, tolerance: float) -> None:
    """As ``assert_same_function``, of the first output alone, and again with a second batch that reads what the first
    left in each graph's own caches. The caches may differ: a factor of the values is undone where they are read.
    """
    first, second = ([_answer(gm, batch, tokens) for gm in (before, after)] for tokens in (False, True))
    for old, new in (first, second):
        assert old.dtype == torch.float64
        error = (new - old).abs().max() / old.abs().max()
        assert error <= tolerance, float(error)


def _answer(gm: fx.GraphModule, batch: Tensor, is_second: bool) -> Tensor:
    source = source_of(gm)
    caches = [i.name for i in source.inputs if i.is_cache]
    run = lifted(gm)
    with torch.no_grad():
        outputs = run(*(x.double() if x.is_floating_point() else x for x in complete(source, batch)))
        if caches and is_second:
            held = dict(zip(source.outputs, outputs, strict=True))
            past = {name: held[name.replace("past_key_values", "present")] for name in caches}
            given = complete(source, {source.inputs[0].name: batch, **{n: t.float() for n, t in past.items()}})
            wide = [past.get(i.name, x) for i, x in zip(source.inputs, given, strict=True)]
            outputs = run(*wide)
    return outputs[0]


def assert_same_function(
    before: fx.GraphModule, after: fx.GraphModule, inputs: tuple[Tensor, ...], tolerance: float
) -> None:
    """Every float output agrees within ``tolerance`` of its largest magnitude, in float64 throughout."""
    for old, new in zip(run_lifted(before, inputs), run_lifted(after, inputs), strict=True):
        assert old.dtype == torch.float64
        assert old.numel()
        error = (new - old).abs().max() / old.abs().max()
        assert error <= tolerance, float(error)
