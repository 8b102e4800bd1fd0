"""Whether an artifact is what was compiled: its integers, scales, other tensors and files; and whether its model still
gives the integers and scales.

What the artifact holds, unpacked (ONNX: UINT4 lowered by 8), is compared bit for bit with the digests in
``graphq.json``. With a model directory, quantized or not, it is also compared with what the manifest's spec makes of
that: codes and scales of weights bit for bit where they are kept or rounded to nearest, with the artifact's scale of an
input that a weight's depends on; else each weight by its signal to quantization noise ratio beside the folded one
(``refold``); float tensors in any case.
Files are compared by their digests: what a graph computes is what was written. A file that the target reads and that
has no digest differs. A file of tensors that is not what was written is named only where no tensor in it is.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
import yaml
from torch import Tensor, fx

from graphq import refold
from graphq.artifacts import manifest
from graphq.artifacts.choices import read_choices
from graphq.artifacts.source import dtype_named
from graphq.capture import hugging_face
from graphq.capture.source import KEY, record_stored, source_of
from graphq.capture.unread import capture_unread
from graphq.deferred import Stacked
from graphq.errors import SpecError, TargetError
from graphq.frontends import load_spec
from graphq.ir import edit
from graphq.ir.edit import copy_graph
from graphq.ir.layers import LAYER, PLAN, sites
from graphq.ir.pipeline import Pipeline
from graphq.ir.stored_codes import stored_weights
from graphq.ir.views import Op
from graphq.lowering.checkpoints.sources.read import quantized_source
from graphq.lowering.targets import TARGETS
from graphq.numerics import Scales
from graphq.observers.observer import ObserverRequest
from graphq.observers.ranges import RangeObserver
from graphq.passes.annotate import Annotate
from graphq.passes.observe import add_observers, to_quantize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.stop_observing import StopObserving
from graphq.pipelines import canonical_passes, placed_for
from graphq.spec.plan import weight_quants
from graphq.spec.quant import Ofmr, Quant
from graphq.spec.rules import Spec
from graphq.state import as_parameter, deferred_of, held_tensor, put_tensor

_INPUT: Final = ("input_scale", "input_zero_point", "input_global_scale")
_CACHE: Final = tuple(f"{role}_{part}" for role in ("key", "value", "state") for part in ("scale", "zero_point"))
_BIAS: Final = ("bias", "bias_scale")
_BY_DATA: Final = {"input": _INPUT, "cache": _CACHE, "bias": _BIAS}
_WEIGHTS: Final = ("weight", "weight_scale", "weight_zero_point", "weight_global_scale")
_TENSORS: Final = (".safetensors", ".onnx", ".onnx.data")  # what files of tensors end in


@final
@dataclass(frozen=True)
class Verification:
    """What a comparison found: a line for each tensor or file that differs, and how many codes, scales and zero points
    were compared.
    """

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
    recorded = manifest.recorded(directory, described, "tensors")
    others = manifest.recorded(directory, described, "other_tensors")
    held = _held(directory, described)
    wanted = recorded | others
    differences = [
        line
        for name in sorted(wanted | held)
        if (line := manifest.difference(name, wanted.get(name), held.get(name))) is not None
    ]
    changed, added = _files(directory, described, tensors=not differences)
    differences += changed
    notes = [f"{name}: graphq did not write it" for name in added]
    if against is None:
        return Verification(tuple(differences), len(recorded), tuple(notes))
    lines, alone = _against(directory, described, Path(against), held, recorded)
    differences += [f"{line} ({against})" for line in lines]
    if alone:
        kinds = [kind for kind, parts in _BY_DATA.items() if any(name.rpartition(".")[2] in parts for name in alone)]
        of = " and ".join(kinds) or "activation"
        notes.append(
            f"{len(alone)} {of} scales and zero points, which need calibration data, were compared with the manifest"
            " only"
        )
    return Verification(tuple(differences), len(recorded), tuple(notes))


def _files(directory: Path, described: Mapping[str, Any], tensors: bool) -> tuple[list[str], list[str]]:
    """A line for each file of the artifact that is gone, differs (those of ``tensors`` only if asked for) or has no
    digest; and the files that are not its own.
    """
    listed = manifest.listed_files(directory, described)
    found = manifest.file_digests(directory)
    own = listed.keys() | (found.keys() & TARGETS[described["target"]].files)
    lines: list[str] = []
    for name in sorted(own):
        if name not in found:
            lines.append(f"{name}: missing")
        elif name not in listed:
            lines.append(f"{name}: the manifest has no digest of it")
        elif listed[name] != found[name] and (tensors or not name.endswith(_TENSORS)):
            lines.append(f"{name}: differs from its digest in the manifest")
    return lines, sorted(found.keys() - own)


def _held(directory: Path, described: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors that the artifact holds, by name; packed codes unpacked."""
    target = TARGETS.get(str(described.get("target")))
    if target is None:
        raise TargetError(f"{directory / manifest.NAME}: no such target: {described.get('target')}")
    return target.tensors(directory)


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


@final
class _StoredScales(RangeObserver):
    """A range that an artifact holds the scale of, as if it were observed."""

    def __init__(self, quant: Quant, layer: str, scale: Tensor) -> None:
        super().__init__(quant, (layer,))
        self.stored = Scales(scale)

    @property
    def has_observed(self) -> bool:
        return True

    def scales(self) -> Scales:
        return self.stored


def _observe_stored(gm: fx.GraphModule, held: Mapping[str, Tensor]) -> None:
    """Inputs with static scales, which the scales of weights with a bias depend on, have those of the artifact."""
    made: dict[tuple[Op, Quant], ObserverRequest] = {}
    for op, quants in to_quantize(gm):
        for quant in dict.fromkeys(quants):
            if quant is not None and not quant.dynamic and (op.input_op, quant) not in made:
                layer = str(op.node.meta[LAYER])
                name = f"{edit.free_path(gm, layer, _INPUT)}.{_INPUT[0]}"
                if name in held:
                    put_tensor(gm, name, held[name])  # the next input of this layer has another name
                    observer = _StoredScales(quant, layer, held[name])
                    made[op.input_op, quant] = ObserverRequest(op.input_op, observer, op)
    add_observers(gm, list(made.values()), "verify")


def _against(
    directory: Path,
    described: Mapping[str, Any],
    model: Path,
    held: Mapping[str, Tensor],
    recorded: Mapping[str, object],
) -> tuple[list[str], list[str]]:
    """A line for each tensor that differs from what the manifest's spec makes of the model; and the tensors of the
    QDQ form that nothing but the manifest can tell of.
    """
    file = directory / manifest.NAME
    try:
        spec, seed = load_spec(yaml.safe_load(described["spec"])), int(described["seed"])
        dtype = dtype_named(described["computed_in"] or "float32")
    except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError, SpecError) as error:
        raise TargetError(f"{file}: damaged: {str(error).splitlines()[0]}") from error
    chosen: Mapping[str, Tensor] = {}
    if wanted := refold.not_kept(spec):
        if "choices" not in described:
            raise TargetError(
                f"{file}: holds nothing of what {' and '.join(wanted)} chose, which later versions of graphq keep: its"
                " weights cannot be compared with a model's"
            )
        chosen = read_choices(directory) if described["choices"] is not None else {}
    source = manifest.source_of_artifact(directory, described)
    gm = _captured(model, dtype, cache=bool(source.caches))
    target = str(described["target"])
    alone = [name for name in recorded if name.rpartition(".")[2] not in _WEIGHTS]
    weights = recorded.keys() - set(alone)
    with torch.no_grad():
        Pipeline(canonical_passes()).run(gm)
        if dtype == torch.float32 and described.get("stored", "") is not None:
            record_stored(gm)
        ratios = refold.recorded_ratios(described, file)
        anew = _rounded(copy_graph(gm), spec, target, held, ratios)
        folded = refold.folded(gm, spec, seed, chosen, target)
        lines: dict[str, str | None] = {}
        if anew is not None:
            made = manifest.stored_names(anew, held)
            lines |= {name: _difference(name, made.get(name), held.get(name)) for name in weights | made.keys()}
        else:
            found = dict(refold.weight_differences(folded, held, ratios))
            lines |= {f"{path}.weight": line for path, line in found.items()}
            lost = sorted(name for name in weights if name.rpartition(".")[0] not in found)
            lines |= {name: f"{name}: not in the model folded anew" for name in lost}
        lines |= dict(refold.float_differences(folded, held, recorded))
    return [line for _, line in sorted(lines.items()) if line is not None], alone


def _captured(model: Path, dtype: torch.dtype, cache: bool) -> fx.GraphModule:
    """The graph of a directory whose weights are float or quantized; matrices stay in their files where they can."""
    quantized = quantized_source(model)
    if quantized is None:
        return hugging_face.capture_directory(model, dtype, cache=cache, unread=capture_unread)
    unread = partial(capture_unread, quantized=quantized.tensors)
    gm = hugging_face.capture_directory(model, dtype, cache=cache, unread=unread, quantized=True)
    gm.meta[KEY] = dataclasses.replace(source_of(gm), dtype=quantized.dtype)
    return gm


def _keep_no_codes(gm: fx.GraphModule, ratios: Mapping[str, float | None]) -> None:
    """Weights that are stored as codes are the numbers that these stand for, where the artifact's are others: those of
    ``ratios``, which an artifact that keeps codes has none of.
    """
    for site in sites(gm):
        fqn = site.param.fqn
        deferred = deferred_of(held_tensor(gm, fqn))
        if not any(stored_weights(deferred)):  # numbers as they are, which may be those of several names
            continue
        rounded = [ratios.get(layer) is not None for layer in site.fqns]
        if isinstance(deferred, Stacked) and len(deferred.parts) == len(rounded):
            each = zip(deferred.parts, rounded, strict=True)
            parts = Stacked(tuple(part.changed(_itself) if is_other else part for part, is_other in each))
            put_tensor(gm, fqn, as_parameter(edit.deferred_tensor(gm, parts, held_tensor(gm, fqn).dtype)))
        elif any(rounded):
            edit.set_param(gm, fqn, _itself, "verify")


def _itself(w: Tensor) -> Tensor:
    return w


def _rounded(
    gm: fx.GraphModule, spec: Spec, target: str, held: Mapping[str, Tensor], ratios: Mapping[str, float | None]
) -> dict[str, Tensor] | None:
    """The codes, scales and zero points of weights that are rounded to nearest, for inputs with the scales of the
    artifact's tensors ``held``; None where data or an algorithm chose them, or the whole graph's quantizers.
    ``ratios``: of signal to noise when layers were compiled, None where codes were kept.
    """
    if any(algorithm.name != "rtn" for algorithm in spec.algorithms) or placed_for(spec) is not None:
        return None
    scales = TARGETS[target].scales(source_of(gm))
    gm.meta[KEY] = dataclasses.replace(source_of(gm), scales=scales)
    Annotate(spec).run(gm)
    quants = [quant for site in sites(gm) for quant in weight_quants(site.op.node.meta.get(PLAN))]
    if any(quant is not None and isinstance(quant.method, Ofmr) for quant in quants):
        return None
    _observe_stored(gm, held)
    _keep_no_codes(gm, ratios)
    Pipeline([QuantizeWeights(), StopObserving()]).run(gm)
    return manifest.named_tensors(manifest.quantized_tensors(TARGETS[target].form(gm)))
