"""The torch target: a directory with ``graph.json``, packed weights in safetensors, manifest and the model's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from graphq.errors import TargetError
from graphq.files import whole_directory
from graphq.lowering import manifest
from graphq.lowering.legalize import Limits, legalize
from graphq.lowering.pack import pack
from graphq.runtime.graph_json import allowed, graph_from_json, graph_to_json
from graphq.runtime.model import CompiledModel
from graphq.runtime.modules import Int8Linear, PackedWeight, codes_of, format_of, scales_of
from graphq.source import KEY
from graphq.views import Op

_GRAPH: Final = "graph.json"
_WEIGHTS: Final = "model.safetensors"


def _refuses(op: Op) -> str | None:
    if op.node.op == "call_function" and not allowed(op.node.target):
        return f"{op.node.target} cannot be stored: artifacts hold functional aten and graphq ops"
    return None


LIMITS: Final = Limits("torch", _refuses)


def emit(gm: fx.GraphModule, path: str | Path, made_from: Mapping[str, Any], overwrite: bool = False) -> None:
    """The QDQ form ``gm`` as a packed torch artifact in the directory ``path``, written whole or not at all.

    ``made_from`` goes into the manifest. Raises ``TargetError`` for what cannot be stored and for an existing ``path``.
    """
    legalize(gm, LIMITS)
    packed = pack(gm)
    with whole_directory(path, overwrite, manifest.sources(gm)) as directory:
        tensors, same = _unshared(packed)
        data = graph_to_json(packed) | {"same": same}
        (directory / _GRAPH).write_text(json.dumps(data, allow_nan=False))
        save_file(tensors, directory / _WEIGHTS)
        manifest.write(directory, gm, "torch", made_from)


def _unshared(gm: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and names of which the tensor is stored under another name."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    stored: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in gm.state_dict(keep_vars=True).items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in stored:
            same[name] = stored[key]
            continue
        stored[key] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, same


def load(path: str | Path) -> CompiledModel:
    """The model of a torch artifact; neither quantizes again nor imports transformers.

    Raises ``TargetError`` naming the file that is missing, damaged or of another kind.
    """
    directory = Path(path)
    described = manifest.read(directory)
    if described.get("target") != "torch":
        raise TargetError(f"{directory}: an artifact for {described.get('target')}; graphq.load reads torch artifacts")
    try:
        data = json.loads((directory / _GRAPH).read_text())
        with safe_open(directory / _WEIGHTS, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise TargetError(f"{directory}: damaged or incomplete: {error}") from error
    try:
        tensors |= {name: tensors[other] for name, other in data["same"].items()}
        source = manifest.source_from_json(described["source"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TargetError(f"{directory}: damaged: {error}") from error
    gm = graph_from_json(data, tensors)
    gm.meta[KEY] = source
    return CompiledModel(gm).eval()


def stored_codes(model: CompiledModel) -> dict[str, manifest.QuantizedTensor]:
    """The quantized tensors that a loaded artifact holds, unpacked, by the path that holds them."""
    found: dict[str, manifest.QuantizedTensor] = {}
    for path, module in model.graph.named_modules():
        if isinstance(module, PackedWeight | Int8Linear):
            held = (codes_of(module), *scales_of(module))
            found[path] = manifest.QuantizedTensor(path, format_of(module), *held)
    buffers = dict(model.graph.named_buffers(remove_duplicate=False))
    for name in buffers:
        if name.endswith((".input_scale", ".input_global_scale")):
            path = name.removesuffix(".input_scale").removesuffix(".input_global_scale")
            parts = (buffers.get(f"{path}.input_{part}") for part in ("scale", "zero_point", "global_scale"))
            found[f"{path} input"] = manifest.QuantizedTensor(path, "", None, *parts)
    return found


def weight_nbytes(model: CompiledModel) -> int:
    """Bytes of all tensors of the model."""
    seen: dict[int, int] = {}
    for tensor in [*model.graph.parameters(), *model.graph.buffers()]:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())
