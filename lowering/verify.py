"""Whether an artifact still holds the integers and scales of its QDQ form, and whether its model still gives them.

What the artifact holds, unpacked (ONNX: UINT4 lowered by 8), is compared bit for bit with the digests in
``graphq.json``, and with a model directory, also with what the manifest's spec makes of that. Float tensors are not
compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
import yaml
from torch import Tensor

from graphq.errors import GraphqError, SpecError, TargetError
from graphq.lowering import manifest

_SUFFIXES: Final = (
    ".weight_scale",
    ".weight_zero_point",
    ".weight_global_scale",
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
)
_CODES: Final = ".weight"


@final
@dataclass(frozen=True)
class Verification:
    """What a comparison found: a line for each tensor that differs, and how many tensors were compared."""

    differences: tuple[str, ...]
    compared: int
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def verify(path: str | Path, against: str | Path | None = None) -> Verification:
    """Compare the artifact in ``path`` with its manifest, and with the model directory ``against`` compiled anew.

    Raises ``TargetError`` for an artifact that cannot be read, ``GraphError`` for a model directory that cannot be.
    """
    directory = Path(path)
    described = manifest.read(directory)
    recorded = _recorded(directory, described)
    held = _held(directory, described)
    differences = [line for name in sorted(recorded | held) if (line := _against_record(name, recorded, held))]
    if against is None:
        return Verification(tuple(differences), len(recorded))
    made = _recompile(directory, described, Path(against))
    inputs = {name for name in recorded if name.endswith(_SUFFIXES[3:])}
    for name in sorted((set(held) | set(made)) - inputs):
        line = _difference(name, made.get(name), held.get(name))
        if line is not None:
            differences.append(f"{line} ({against})")
    note = (
        f"{len(inputs)} input scales and zero points, which need calibration data, were compared with the manifest only"
    )
    return Verification(tuple(differences), len(recorded), (note,) if inputs else ())


def _recorded(directory: Path, described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the manifest says of each tensor."""
    try:
        return {str(k): {f: v[f] for f in ("dtype", "shape", "sha256")} for k, v in described["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise TargetError(f"{directory / manifest.NAME}: damaged: tensors: {error}") from error


def _held(directory: Path, described: Mapping[str, Any]) -> dict[str, Tensor]:
    """The codes, scales and zero points that the artifact holds, by name."""
    match described.get("target"):
        case "torch":
            from graphq.lowering.torch_module import load, stored_codes

            model = load(directory)
            try:
                return manifest.named_tensors(stored_codes(model))
            except (GraphqError, RuntimeError) as error:  # bytes of another shape than the module's
                raise TargetError(f"{directory}: damaged: {error}") from error
        case "onnx":
            return _initializers(directory)
        case other:
            raise TargetError(f"{directory / manifest.NAME}: no such target: {other}")


def _initializers(directory: Path) -> dict[str, Tensor]:
    """The codes, scales and zero points of an ONNX model; UINT4, which stands for codes raised by 8, lowered."""
    import onnx_ir as ir

    from graphq.lowering.onnx import NAME

    file = directory / NAME
    if not file.is_file():
        raise TargetError(f"{directory}: damaged or incomplete: {NAME} is missing")
    try:
        values = {name: value.const_value for name, value in ir.load(file).graph.initializers.items()}
        paths = {name.removesuffix(s) for name in values for s in _SUFFIXES if name.endswith(s)}
        names = {path + suffix for path in paths for suffix in (_CODES, *_SUFFIXES)}
        return {name: _tensor(values[name]) for name in sorted(names & set(values))}
    except Exception as error:  # protobuf, onnx_ir and numpy raise many types for damaged files
        raise TargetError(f"{file}: damaged: {str(error).strip().splitlines()[0] or type(error).__name__}") from error


def _tensor(value: Any) -> Tensor:
    import onnx_ir as ir

    if value is None:
        raise ValueError("an initializer without a value")
    array = value.numpy()
    match value.dtype:
        case ir.DataType.INT4:
            array = array.astype("int8")
        case ir.DataType.FLOAT8E4M3FN | ir.DataType.FLOAT8E5M2:
            array = array.view("uint8").copy()
        case ir.DataType.UINT4:
            array = array.astype("int8") - 8
        case _:
            array = array.copy()  # the file's own memory cannot be written to
    return torch.from_numpy(array)


def _against_record(name: str, recorded: Mapping[str, Mapping[str, Any]], held: Mapping[str, Tensor]) -> str | None:
    if name not in held:
        return f"{name}: missing"
    if name not in recorded:
        return f"{name}: not in the manifest"
    wanted, found = recorded[name], manifest.record(held[name])
    if (wanted["dtype"], wanted["shape"]) != (found["dtype"], found["shape"]):
        return f"{name}: {found['dtype']}{found['shape']}, not {wanted['dtype']}{wanted['shape']}"
    return None if wanted["sha256"] == found["sha256"] else f"{name}: differs from its digest in the manifest"


def _difference(name: str, made: Tensor | None, held: Tensor | None) -> str | None:
    """How the artifact's tensor differs from the one made anew."""
    if made is None or held is None:
        return f"{name}: missing" if held is None else f"{name}: not in the model compiled anew"
    if made.dtype != held.dtype or made.shape != held.shape:
        return f"{name}: {_describe(held)}, compiled anew {_describe(made)}"
    ours, theirs = (t.contiguous().view(_BITS[t.dtype.itemsize]) for t in (held, made))
    count = int((ours != theirs).sum())
    return f"{name}: {count} of {held.numel()} elements differ" if count else None


_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _recompile(directory: Path, described: Mapping[str, Any], model: Path) -> dict[str, Tensor]:
    """The codes, scales and zero points of the model's weights by the manifest's spec."""
    from graphq import hugging_face
    from graphq.frontends import load_spec
    from graphq.passes.annotate import Annotate
    from graphq.passes.quantize_weights import QuantizeWeights
    from graphq.passes.raise_grouped_linear import RaiseGroupedLinear
    from graphq.passes.remove_no_ops import RemoveNoOps
    from graphq.passes.split_gate_up import SplitGateUp
    from graphq.pipeline import Pipeline

    file = directory / manifest.NAME
    if described.get("algorithm") != "rtn":
        raise TargetError(f"{file}: algorithm: {described.get('algorithm')}: cannot be run again without its data")
    try:
        spec = load_spec(yaml.safe_load(described["spec"]))
        dtype = manifest.dtype_named(described["computed_in"] or "float32")
    except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError, SpecError) as error:
        raise TargetError(f"{file}: damaged: {str(error).splitlines()[0]}") from error
    cache = any(i.is_cache for i in manifest.source_of_artifact(directory, described).inputs)
    gm = hugging_face.capture_directory(model, dtype, cache=cache)
    with torch.no_grad():
        Pipeline([RemoveNoOps(), RaiseGroupedLinear(), SplitGateUp(), Annotate(spec), QuantizeWeights()]).run(gm)
    if described["target"] == "onnx":
        from graphq.lowering.onnx_form import onnx_form

        gm = onnx_form(gm)
    return manifest.named_tensors(manifest.quantized_tensors(gm))
