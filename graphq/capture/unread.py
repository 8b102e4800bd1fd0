"""A model directory as a graph whose weights stay in their files until a pass reads them, one at a time.

It is the graph that a configuration alone gives, with the buffers of a model made from it. A weight that is quantized
is then never held beside the others as floats.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture import adapters
from graphq.capture.hugging_face import (
    capture_config,
    check_weight_files,
    model_class,
    read_config,
    silent_transformers,
)
from graphq.state import UNREAD, held_tensor, put_tensor

_DTYPES: Final = {torch.bfloat16: "BF16", torch.float16: "F16"}


def capture_unread(
    path: Path, dtype: torch.dtype, cache: bool = True, shapes: Mapping[str, int] | None = None
) -> fx.GraphModule | None:
    """The graph of a directory whose files hold all parameters of the model, under its names, in the 16-bit dtype of
    its configuration, and nothing else. None for any other directory, which transformers itself must load.

    ``tensor_of`` reads a parameter anew at each call, and gives it in ``dtype``; ``read_all`` leaves none unread.
    """
    config = read_config(path)
    stored = getattr(config, "dtype", None)
    if stored not in _DTYPES or adapters.adapter_note(path):
        return None
    cls = model_class(path, config)
    check_weight_files(path)
    places = _places(path)
    model = _made_of(config, cls, dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(parameters.items()) if name in places}
    keys = {name: name if name in places else first.get(id(p), "") for name, p in parameters.items()}
    fits = all(
        key in places and places[key][1:] == (_DTYPES[stored], tuple(parameters[name].shape))
        for name, key in keys.items()
    )
    if not fits or places.keys() - keys.keys() or model.state_dict().keys() - keys.keys():
        return None
    buffers = dict(model.named_buffers(remove_duplicate=False))
    del model, parameters
    gm = capture_config(read_config(path), cls, dtype, cache, shapes)
    for name, tensor in gm.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            if name not in keys:
                return None
        elif isinstance(tensor, FakeTensor):
            if name not in buffers:
                return None
            put_tensor(gm, name, buffers[name])
    held: dict[str, str] = {}  # the first name of each tensor in the files, which ties those of its other names
    for name in [name for name in gm.state_dict(keep_vars=True) if name in keys]:
        if (own := held.setdefault(keys[name], name)) != name:
            put_tensor(gm, name, held_tensor(gm, own))
    gm.meta[UNREAD] = {name: _reader(places[key][0], key, dtype) for name, key in keys.items()}
    return gm


def read_all(gm: fx.GraphModule) -> None:
    """``gm`` holds its parameters; those that are tied are one tensor."""
    unread: Mapping[str, Any] = gm.meta.pop(UNREAD, {})
    read: dict[object, Tensor] = {}
    for name, tensor in list(gm.state_dict(keep_vars=True).items()):
        if isinstance(tensor, FakeTensor) and name in unread:
            reader = unread[name]
            place = reader.place
            if place not in read:
                read[place] = reader()
            put_tensor(gm, name, nn.Parameter(read[place], requires_grad=False))


def _places(path: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Of each tensor in the directory's files the file, the dtype and the shape."""
    from safetensors import safe_open

    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part: Any = opened.get_slice(name)
                found[name] = (file, part.get_dtype(), tuple(part.get_shape()))
    return found


def _made_of(config: Any, cls: Any, dtype: torch.dtype) -> nn.Module:
    """A model of this configuration with buffers; nothing is written to its parameters, so that they take no memory."""
    from transformers.initialization import no_init_weights

    with silent_transformers(), no_init_weights():
        model = cls._from_config(config, dtype=dtype).eval()
        model.tie_weights()  # which is left out with the rest
        return model


class _Reader:
    """Reads one tensor. The file is open no longer than that: the pages that were read are the kernel's again."""

    def __init__(self, file: Path, key: str, dtype: torch.dtype) -> None:
        self.place = (file, key)
        self.dtype = dtype

    def __call__(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.place[0], framework="pt") as opened:
            return cast(Tensor, opened.get_tensor(self.place[1])).to(self.dtype, copy=True)


def _reader(file: Path, key: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return _Reader(file, key, dtype)
