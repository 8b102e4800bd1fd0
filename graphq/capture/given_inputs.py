"""A model directory captured from example inputs, where these do not follow from its configuration."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from graphq.capture import adapters
from graphq.capture.export import lean_export
from graphq.capture.hugging_face import (
    load,
    model_class,
    read_config,
    refuse_quantized,
    settings_of,
    silent_transformers,
    unused_note,
)
from graphq.capture.modules import capture_module
from graphq.capture.source import KEY, Source


def capture_directory_on(
    path: Path,
    inputs: Any,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
    check: bool = False,
    trust: bool = False,
) -> fx.GraphModule:
    """The graph of the model in a directory, as ``capture_module`` makes it of the loaded model and ``inputs``.

    Its source has the directory's configuration, dtype and files. ``weights=False`` reads the configuration alone.
    """
    config = read_config(path, trust)
    recorded: Any = getattr(config, "dtype", None)
    notes = adapters.adapter_note(path)
    if weights:
        model, unused = load(path, dtype, trust)
        adapters.without_adapters(model)
        notes = (*notes, *unused_note(model, unused))
        refuse_quantized(model.config)
        gm = capture_module(model, inputs, cache, mask, shapes, check)
    else:
        from transformers.initialization import no_init_weights

        cls: Any = model_class(path, config, trust)
        with (
            lean_export(),
            FakeTensorMode(allow_non_fake_inputs=True) as fake,
            silent_transformers(),
            no_init_weights(),
        ):
            model = cls._from_config(config, dtype=dtype).eval()
            fakes = tree_map_only(Tensor, fake.from_tensor, inputs)
            gm = capture_module(model, fakes, cache, mask, shapes)
    source: Source = gm.meta[KEY]
    gm.meta[KEY] = replace(
        source,
        **settings_of(model),
        dtype=recorded if isinstance(recorded, torch.dtype) else source.dtype,
        files=str(path),
        notes=(*source.notes, *notes),
    )
    return gm
