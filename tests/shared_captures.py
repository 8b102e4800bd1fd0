"""Transformers models are captured once a process: of a second one that differs in its weights alone, or that has none,
the graph is copied.

Hundreds of tests compile the same few tiny models, and export takes most of that time. ``tests/capture`` captures anew.
"""

import contextlib
import copy
import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture import hugging_face, unread
from graphq.capture.export import FlatModel
from graphq.capture.source import TensorInput
from graphq.ir.edit import copy_graph, fake_mode_of
from graphq.state import put_tensor, tensor_of

_KEPT: dict[object, fx.GraphModule] = {}


# What a configuration says that no graph depends on; parameters say their dtype themselves.
_SAID_ELSEWHERE = ("_name_or_path", "_commit_hash", "architectures", "dtype", "model_type", "transformers_version")


def _text(config: Any, without: Sequence[str] = ("_name_or_path",)) -> str:
    """All that a configuration says, what it keeps to itself included, but for where it was read."""
    said = {name: value for name, value in vars(config).items() if name not in without}
    return json.dumps(said, default=str, sort_keys=True)


def is_fake(model: nn.Module) -> bool:
    """Whether the model has no weights."""
    return any(isinstance(tensor, FakeTensor) for tensor in model.parameters())


def _key(flat: FlatModel) -> object:
    """What of a model decides its graph; None where that is more than its class and its configuration."""
    modules = list(flat.model.modules())
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    model: Any = flat.model
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in tensors:
        first.setdefault(id(tensor), name)
    if is_fake(model) and getattr(model.config, "tie_word_embeddings", False):
        head, table = (
            model.get_output_embeddings(),
            model.get_input_embeddings(),
        )  # which are tied when they have weights
        first |= {id(head.weight): first[id(table.weight)]} if head is not None else {}
    shapes = tuple((name, t.shape, t.dtype, first[id(t)]) for name, t in tensors)
    return type(model), str(model), _text(model.config, _SAID_ELSEWHERE), flat.names, shapes


def _without_weights(gm: fx.GraphModule) -> fx.GraphModule | None:
    """A copy whose weights are fake; None for a graph that holds a constant which is fake."""
    made, mode = copy_graph(gm), fake_mode_of(gm)
    for name, tensor in gm.state_dict(keep_vars=True).items():
        if not name.startswith("constants."):
            put_tensor(made, name, mode.from_tensor(tensor, static_shapes=True))
        elif isinstance(tensor, FakeTensor):
            return None
        else:
            put_tensor(made, name, copy.deepcopy(tensor))
    return made


def _copy(gm: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """A copy on the tensors of ``model``, where it has any; what it does not hold is copied."""
    made = copy_graph(gm)
    for name, tensor in gm.state_dict(keep_vars=True).items():
        if name.startswith("constants."):
            put_tensor(made, name, copy.deepcopy(tensor))
        elif not isinstance(own := tensor_of(model, name), FakeTensor):
            put_tensor(made, name, own)
    return made


@contextlib.contextmanager
def captured_once(apart: bool = False) -> Generator[None]:
    """Inside, the export of a transformers model, and the capture of a configuration, is done once a process.

    ``apart``: nothing is shared with what is outside, nor by a model and its configuration, which are to be compared.
    """
    kept = dict[object, fx.GraphModule]() if apart else _KEPT
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
        key = (
            model,
            str(inputs),
            str([(x.shape, x.dtype) for x in samples]),
            str(limits),
            str(fixed),
            apart and is_fake(flat),
        )
        if key in kept:
            return _copy(kept[key], flat.model)
        made = export(flat, inputs, samples, limits, fixed)
        if (shared := _without_weights(made)) is not None:
            kept[key] = shared
        return made

    def of_config_once(
        config: Any,
        cls: Any,
        dtype: torch.dtype = torch.float32,
        cache: bool = True,
        shapes: Mapping[str, int] | None = None,
    ) -> fx.GraphModule:
        key = (cls, _text(config), dtype, cache, str(shapes))
        if key not in kept:
            kept[key] = of_config(config, cls, dtype, cache, shapes)
        made = copy_graph(kept[key])
        for name, tensor in made.state_dict(keep_vars=True).items():
            if not isinstance(tensor, FakeTensor):
                put_tensor(made, name, copy.deepcopy(tensor))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hugging_face, "export_flat", export_once)
        for module in (hugging_face, unread):
            patch.setattr(module, "capture_config", of_config_once)
        yield
