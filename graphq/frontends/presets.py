"""Specs by name: ``graphq.compile(model, "w4a16")``. Each is a document of the native form.

``w4a16+gptq`` is the preset with an algorithm, ``w4a4+rotate+gptq`` with two, in this order, with default options.
Weights and inputs are those of the schemes that compressed-tensors gives these names, in graphq's own rounding.
"""

import os
import re
from collections.abc import Mapping
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import Document, nearest

# name -> weight, input
SCHEMES: Final[Mapping[str, tuple[str, str | None]]] = {
    "w8a8": ("int8/channel", "int8/token/dynamic"),
    "w8a8-static": ("int8/channel", "int8/asym/tensor"),
    "w8a16": ("int8/channel", None),
    "w4a16": ("int4/g128", None),
    "w4a16-asym": ("int4/asym/g128", None),
    "w3a16": ("int3/asym/g128", None),
    "w2a16": ("int2/asym/g64", None),
    "w4a8": ("int4/g128", "int8/token/dynamic"),
    "w4a4": ("int4/channel", "int4/token/dynamic"),
    "fp8": ("float8_e4m3fn/channel", "float8_e4m3fn/tensor"),
    "fp8-dynamic": ("float8_e4m3fn/channel", "float8_e4m3fn/token/dynamic"),
    "fp8-block": ("float8_e4m3fn/128x128", "float8_e4m3fn/g128/dynamic"),
    "hif8": ("hifloat8/channel", "hifloat8/token/dynamic"),
    "mxfp8": ("mxfp8_e4m3", "mxfp8_e4m3/dynamic"),
    "mxfp4": ("mxfp4", "mxfp4/dynamic"),
    "mxfp4a16": ("mxfp4", None),
    "mxint8": ("mxint8", "mxint8/dynamic"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "nvfp4a16": ("nvfp4", None),
}


def is_name(text: str) -> bool:
    """Whether ``text`` names a preset, or is spelled like one and names no file."""
    if not re.fullmatch(r"[a-z0-9_-]{1,40}(\+[a-z0-9_-]{1,40}){0,9}", text):
        return False
    return text.partition("+")[0] in SCHEMES or not os.path.lexists(text)


def read(name: str) -> Document:
    """The preset as a document. Raises ``SpecError`` for a name that there is not."""
    scheme, *algorithms = name.split("+")
    if scheme not in SCHEMES:
        raise SpecError(
            f"{name}: no preset of this name{nearest(scheme, SCHEMES)} (there are {', '.join(SCHEMES)}; a file of this"
            f" name is ./{name})"
        )
    weight, activation = SCHEMES[scheme]
    document = Document(path=name)
    document.root.update({"graphq": 1, "weight": weight})
    if activation is not None:
        document.root["input"] = activation
    if algorithms:
        document.root["algorithms"] = [*algorithms]
    return document
