"""The torch target: a directory with ``graph.json``, packed weights in safetensors, manifest and the model's files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from graphq.artifacts import manifest
from graphq.artifacts.shards import INDEX, WEIGHTS, read_shards, shard_files, write_shards
from graphq.artifacts.source import dtype_named
from graphq.capture.source import KEY, Source
from graphq.errors import GraphqError, TargetError
from graphq.files import whole_directory
from graphq.ir.views import Op
from graphq.lowering.legalize import Limits, legalize
from graphq.lowering.torch.pack import pack
from graphq.runtime.graph_json import graph_from_json, graph_to_json, refusal
from graphq.runtime.model import CompiledModel
from graphq.runtime.modules import codes_of, format_of, scales_of
from graphq.runtime.quantized_module import QuantizedModule
from graphq.state import first_names

_GRAPH: Final = "graph.json"
FILES: Final = (_GRAPH, INDEX, WEIGHTS)


def _refuses(op: Op) -> str | None:
    reason = refusal(op.node)
    frames = re.findall(r'File "(.+)", line (\d+), in .+\n *(.+)', op.node.meta.get("stack_trace", ""))
    return reason if reason is None or not frames else f"{reason} ({':'.join(frames[-1][:2])}: {frames[-1][2]})"


LIMITS: Final = Limits("torch", _refuses)


def emit(
    gm: fx.GraphModule, path: str | Path, made_from: Mapping[str, Any], *, overwrite: bool = False
) -> tuple[str, ...]:
    """The QDQ form ``gm`` as a packed torch artifact in the directory ``path``, written whole or not at all.

    ``made_from`` goes into the manifest. Gives no notes. Raises ``TargetError`` for what cannot be stored and for an
    existing ``path``.
    """
    legalize(gm, LIMITS)
    packed = pack(gm)
    with whole_directory(path, overwrite, manifest.sources(gm)) as directory:
        held = packed.state_dict(keep_vars=True)
        same = first_names(held)
        tensors = {name: t.detach() for name, t in held.items() if name not in same}
        others = {name: str(held[name].dtype).removeprefix("torch.") for name in same if _differs(held, name, same)}
        data = graph_to_json(packed) | {"same": same, "read_as": others}
        (directory / _GRAPH).write_text(json.dumps(data, allow_nan=False))
        write_shards(directory, tensors.items())
        manifest.write(directory, gm, "torch", made_from, packed.state_dict())
    return ()


def _differs(held: Mapping[str, Tensor], name: str, same: Mapping[str, str]) -> bool:
    """Whether a tensor is stored in another dtype: int8 codes of an integer product are an embedding's packed bytes."""
    return held[name].dtype != held[same[name]].dtype


def load(path: str | Path, verify: bool = True) -> CompiledModel:
    """The model of a torch artifact; neither quantizes again nor imports transformers.

    Raises ``TargetError`` naming the file that is missing, damaged or of another kind, or whose digest is not that in
    the manifest. ``verify=False`` leaves the digests unread, and large weights in their file until they are used.
    """
    directory = Path(path)
    described = manifest.read(directory)
    if described.get("target") != "torch":
        raise TargetError(f"{directory}: an artifact for {described.get('target')}; graphq.load reads torch artifacts")
    if verify:
        manifest.check_files(directory, described, (_GRAPH, *shard_files(directory)))
    try:
        data = json.loads((directory / _GRAPH).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{directory / _GRAPH}: damaged or incomplete: {error}") from error
    tensors = dict(read_shards(directory))
    source = manifest.source_of_artifact(directory, described)
    try:
        tensors |= {name: tensors[other] for name, other in data["same"].items()}
        tensors |= {n: tensors[n].view(dtype_named(d)) for n, d in data.get("read_as", {}).items()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise TargetError(f"{directory / _GRAPH}: damaged: same: {error}") from error
    try:
        gm = graph_from_json(data, tensors)
    except TargetError as error:
        raise TargetError(f"{directory}/{error}") from error
    _check_others(directory, described, tensors)
    _check_ends(directory, gm, source)
    _check_dtypes(directory, gm, source, described)
    gm.meta[KEY] = source
    return CompiledModel(gm).eval()


def _check_others(directory: Path, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ``TargetError`` for a tensor that no packed module holds, of another dtype or shape than was written."""
    for name, wanted in manifest.recorded(directory, described, "other_tensors").items():
        if name in tensors:
            found = {"dtype": str(tensors[name].dtype).removeprefix("torch."), "shape": list(tensors[name].shape)}
            if any(found[key] != wanted[key] for key in found):
                was = f"{wanted['dtype']}{wanted['shape']}"
                raise TargetError(f"{directory / WEIGHTS}: {name}: {found['dtype']}{found['shape']}, not {was}")


def _check_ends(directory: Path, gm: fx.GraphModule, source: Source) -> None:
    """Raises ``TargetError`` if the graph takes or gives something else than the manifest says."""
    taken = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    given = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    names = [i.name for i in source.inputs]
    if len(taken) != len(names):
        raise TargetError(f"{directory / _GRAPH}: takes {len(taken)} inputs; the manifest says {', '.join(names)}")
    if len(given) != len(source.outputs) or (source.output_kind == "tensor" and len(given) != 1):
        outputs = ", ".join(source.outputs)
        raise TargetError(f"{directory / _GRAPH}: gives {len(given)} outputs; the manifest says {outputs}")


def _check_dtypes(directory: Path, gm: fx.GraphModule, source: Source, described: Mapping[str, Any]) -> None:
    """Raises ``TargetError`` for a packed module that gives a dtype in which nothing else of the model is."""
    known = {i.dtype for i in source.inputs} | {x.dtype for x in gm.state_dict(keep_vars=True).values()}
    known |= {a for node in gm.graph.nodes for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)}
    wanted = described.get("computed_in")
    for path, module in gm.named_modules():
        if isinstance(module, QuantizedModule) and (dtype := module.graphq_form.dtype) not in known:
            name = str(dtype).removeprefix("torch.")
            if name != wanted:
                raise TargetError(f"{directory / _GRAPH}: {path}: dtype: {name}, in which nothing else of the model is")


def stored_codes(model: CompiledModel) -> dict[str, manifest.QuantizedTensor]:
    """The quantized tensors that a loaded artifact holds, unpacked, by the path that holds them."""
    found: dict[str, manifest.QuantizedTensor] = {}
    for path, module in model.graph.named_modules():
        if isinstance(module, QuantizedModule):
            held = (codes_of(module), *scales_of(module))
            found[path] = manifest.QuantizedTensor(path, "weight", format_of(module), *held)
    return found | manifest.quantized_tensors(model.graph)  # whose weights are packed: it holds the inputs alone


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of an artifact by name, packed codes unpacked. Raises ``TargetError`` for a damaged one."""
    model = load(directory, verify=False)
    try:
        return model.graph.state_dict() | manifest.named_tensors(stored_codes(model))
    except (GraphqError, RuntimeError) as error:
        raise TargetError(f"{directory}: damaged: {error}") from error


def weight_nbytes(model: CompiledModel) -> int:
    """Bytes of all tensors of the model."""
    seen: dict[int, int] = {}
    for tensor in [*model.graph.parameters(), *model.graph.buffers()]:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())
