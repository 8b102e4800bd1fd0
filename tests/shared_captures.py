"""Transformers models are captured once a process: of a second one that differs in its weights alone, the graph is copied.

Hundreds of tests compile the same few tiny models, and export takes most of that time. ``tests/capture`` captures anew.
"""

import contextlib
import copy
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture import hugging_face, unread
from graphq.capture.export import FlatModel
from graphq.capture.source import TensorInput
from graphq.ir.edit import copy_graph
from graphq.state import put_tensor, tensor_of

_KEPT: dict[object, fx.GraphModule] = {}


def _text(config: Any) -> str:
    """All that a configuration says, what it keeps to itself included, but for where it was read."""
    return str(sorted((name, str(value)) for name, value in vars(config).items() if name != "_name_or_path"))


def _key(flat: FlatModel) -> object:
    """What of a model decides its graph; None where that is more than its class and its configuration."""
    modules = list(flat.model.modules())
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    names: dict[int, str] = {}
    tensors = [*flat.model.named_parameters(remove_duplicate=False), *flat.model.named_buffers(remove_duplicate=False)]
    if any(isinstance(tensor, FakeTensor) for _, tensor in tensors):
        return None
    shapes = tuple((name, t.shape, t.dtype, names.setdefault(id(t), name)) for name, t in tensors)
    return type(flat.model), str(flat.model), _text(flat.model.config), flat.names, shapes


def _copy(gm: fx.GraphModule, model: nn.Module | None = None) -> fx.GraphModule:
    """A copy on the tensors of ``model``; what it does not hold is copied, unless it is fake."""
    made = copy_graph(gm)
    for name, tensor in gm.state_dict(keep_vars=True).items():
        if model is not None and not name.startswith("constants."):
            put_tensor(made, name, tensor_of(model, name))
        elif not isinstance(tensor, FakeTensor):
            put_tensor(made, name, copy.deepcopy(tensor))
    return made


@contextlib.contextmanager
def captured_once() -> Generator[None]:
    """Inside, the export of a transformers model, and the capture of a configuration, is done once a process."""
    export, of_config = hugging_face.export_flat, hugging_face.capture_config

    def export_once(
        flat: FlatModel,
        inputs: Sequence[TensorInput],
        samples: Sequence[Tensor],
        limits: Mapping[str, int] | None = None,
        fixed: Mapping[str, int] | None = None,
    ) -> fx.GraphModule:
        model = _key(flat)
        if model is None:
            return export(flat, inputs, samples, limits, fixed)
        key = (model, str(inputs), str([(x.shape, x.dtype) for x in samples]), str(limits), str(fixed))
        if key not in _KEPT:
            made = export(flat, inputs, samples, limits, fixed)
            _KEPT[key] = _copy(made)
            return made
        return _copy(_KEPT[key], flat.model)

    def of_config_once(
        config: Any,
        cls: Any,
        dtype: torch.dtype = torch.float32,
        cache: bool = True,
        shapes: Mapping[str, int] | None = None,
    ) -> fx.GraphModule:
        key = (cls, _text(config), dtype, cache, str(shapes))
        if key not in _KEPT:
            _KEPT[key] = of_config(config, cls, dtype, cache, shapes)
        return _copy(_KEPT[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hugging_face, "export_flat", export_once)
        for module in (hugging_face, unread):
            patch.setattr(module, "capture_config", of_config_once)
        yield
