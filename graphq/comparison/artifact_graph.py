"""The QDQ form of an artifact: the graph that its model and its spec give anew, with the numbers that it holds.

Every target's artifact is read so: ``Target.tensors`` gives its tensors by the names of the QDQ form, whatever the
files' own layout is. What only chooses numbers, such as GPTQ, does not run again; what decides on the graph, such as a
rotation, does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import torch
import yaml
from torch import Tensor, fx, nn

from graphq.artifacts import manifest
from graphq.artifacts.source import dtype_named
from graphq.comparison.folded import where_of
from graphq.errors import SpecError, TargetError
from graphq.frontends import load_spec
from graphq.ir.layers import TURNED
from graphq.ir.views import Dequantize, Op, Param, TransposedLinear, ops_of
from graphq.lowering.checkpoints.architecture import architecture_of
from graphq.lowering.checkpoints.layers import unstacked
from graphq.lowering.targets import target_named
from graphq.numerics.blocks import scale_shape
from graphq.spec.algorithms import ALGORITHMS
from graphq.spec.rules import Run, Spec
from graphq.state import as_parameter, put_tensor, tensor_of, ties

_CHECKPOINTS: Final = ("compressed-tensors", "ascend")
_SHOWN: Final = 3


def spec_of_artifact(directory: Path, described: Mapping[str, Any]) -> Spec:
    """The spec in an artifact's manifest. Raises ``TargetError`` where it is damaged."""
    try:
        return load_spec(yaml.safe_load(described["spec"]))
    except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError, SpecError) as error:
        raise TargetError(f"{directory / manifest.NAME}: damaged: {str(error).splitlines()[0]}") from error


def structure_of(directory: Path, spec: Spec) -> Spec:
    """The spec without what only chooses numbers: the graph that it makes has the same nodes.

    Raises ``TargetError`` for a spec whose nodes follow from data that the artifact does not hold.
    """
    if spec.fallback is not None:
        raise TargetError(f"{directory}: which ops fell back was found on data: compare its spec with the model")
    kept = [
        one
        for one in spec.algorithms
        if (stage := ALGORITHMS[one.name].stage) in ("default", "prepare", "correct")
        or (stage == "smooth" and where_of(one) != "fold")
    ]
    return replace(spec, algorithms=tuple(kept), run=Run())


def computed_in(directory: Path, described: Mapping[str, Any]) -> torch.dtype:
    """The dtype that the artifact was compiled in. Raises ``TargetError`` where the manifest is damaged."""
    try:
        return dtype_named(described["computed_in"] or "float32")
    except (KeyError, AttributeError) as error:
        raise TargetError(f"{directory / manifest.NAME}: damaged: computed_in: {error}") from error


def take_numbers(gm: fx.GraphModule, directory: Path, described: Mapping[str, Any]) -> list[str]:
    """Every tensor of ``gm`` is that of the artifact; lines on those that it does not hold, which stay as they are.

    Raises ``TargetError`` for codes, scales and zero points that only one of both has, and for other shapes and dtypes.
    """
    target = str(described.get("target"))
    held = target_named(target).tensors(directory)
    recorded = set(manifest.recorded(directory, described, "tensors"))
    names = architecture_of(unstacked(gm), target).names if target in _CHECKPOINTS else {}
    quantized = set(manifest.named_tensors(manifest.quantized_tensors(gm)))
    of_blocks, turned = _blocks(gm), _turned(gm, target)
    taken, missing = set[str](), list[str]()
    tied, sought = ties(gm), _Held(held, names)
    for fqn in dict.fromkeys(op.fqn for op in ops_of(gm) if isinstance(op, Param)):
        own = tensor_of(gm, fqn)
        found = next((one for name in (fqn, *tied.get(fqn, ())) if (one := sought.find(name, own)) is not None), None)
        if found is None:
            if fqn in quantized:
                raise TargetError(f"{directory}: holds no {fqn}, which its spec asks for")
            missing += [fqn] if isinstance(own, nn.Parameter) else []
            continue
        tensor, used = found
        taken |= used
        made = _fitted(tensor.t().contiguous() if fqn in turned else tensor, own, of_blocks.get(fqn))
        if made is None or (made.dtype != own.dtype and not (_is_float(made) and _is_float(own))):
            raise TargetError(f"{directory}: {fqn}: {_text(tensor)}, and its spec makes {_text(own)}")
        made = made.to(own.dtype)
        put_tensor(gm, fqn, as_parameter(made) if isinstance(own, nn.Parameter) else made)
    if lost := sorted(name for name in recorded - taken if name in held):
        raise TargetError(f"{directory}: {_named(lost)}: the graph that its spec makes has no place for it")
    return [f"{directory}: holds no {_named(missing)}: the model's own are taken"] if missing else []


@final
class _Held:
    """An artifact's tensors, by the names that a graph has. ``names``: what a checkpoint calls them otherwise."""

    def __init__(self, held: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.held, self.names = held, names
        self.paths = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in names.items()}

    def find(self, fqn: str, own: Tensor) -> tuple[Tensor, set[str]] | None:
        """The tensor, or the stack of experts' own tensors, and the names that it is held under."""
        name = self._stored(fqn)
        if name in self.held:
            return self.held[name], {name}
        path, _, suffix = fqn.rpartition(".")
        stack, dot, role = path.rpartition(".")
        members = [self._stored(f"{stack}{dot}{i}.{role}.{suffix}") for i in range(own.shape[0] if own.dim() else 0)]
        if not members or not all(member in self.held for member in members):
            return None
        return torch.stack([self.held[member] for member in members]), set(members)

    def _stored(self, fqn: str) -> str:
        path, _, suffix = fqn.rpartition(".")
        return self.names.get(fqn) or (f"{self.paths[path]}.{suffix}" if path in self.paths else fqn)


def _blocks(gm: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """How many elements have a scale of their own, along each axis, by the name of each scale and zero point."""
    return {
        part.fqn: tuple(op.block)
        for op in ops_of(gm)
        if isinstance(op, Dequantize)
        for part in (op.scale, op.zero_point)
        if isinstance(part, Param)
    }


def _turned(gm: fx.GraphModule, target: str) -> set[str]:
    """The tensors that the artifact holds with their two axes swapped."""
    if target in _CHECKPOINTS:
        return set(gm.meta.get(TURNED, ()))
    if target != "onnx":
        return set()
    weights: list[Op] = [op.weight_op for op in ops_of(gm) if isinstance(op, TransposedLinear)]
    parts = (
        part
        for op in weights
        if isinstance(op, Dequantize)
        for part in (op.codes, op.scale, op.zero_point, op.global_scale)
    )
    return {part.fqn for part in parts if isinstance(part, Param)}


def _fitted(tensor: Tensor, own: Tensor, block: Sequence[int] | None) -> Tensor | None:
    """The tensor in the shape that the graph has it in: files leave axes of size 1 out, or repeat scales along one."""
    if tensor.shape == own.shape:
        return tensor
    if [size for size in tensor.shape if size != 1] == [size for size in own.shape if size != 1]:
        return tensor.reshape(own.shape)
    if block is None or tensor.dim() != own.dim():
        return None
    for axis, size in enumerate(own.shape):
        if tensor.shape[axis] != size:
            step = block[axis] if block[axis] > 0 else tensor.shape[axis]
            if scale_shape([tensor.shape[axis]], [step]) != [size]:
                return None
            tensor = tensor.index_select(axis, torch.arange(size) * step)
    return tensor


def _is_float(x: Tensor) -> bool:
    return x.dtype.is_floating_point


def _text(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _named(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
