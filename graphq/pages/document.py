"""What a page says of a quantized model, as data; and where it comes from: an artifact, or a model and its spec."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, final

from graphq.artifacts import manifest
from graphq.artifacts.fields import entry, is_size
from graphq.artifacts.inspect import inspect
from graphq.capture.source import source_of
from graphq.comparison.sides import Model, Side, Sources, artifact_side, batches_for, spec_side
from graphq.compiler import Compiled
from graphq.errors import SpecError, TargetError
from graphq.frontends.native import print_spec
from graphq.pages.histograms import Histogram, activation_histograms, weight_histograms

VERSION = 1


@final
@dataclass(frozen=True)
class Page:
    """rows: a report's, an object for each layer. weights, activations: histograms by layer. search, evaluations,
    differences: what ``graphq search``, ``eval`` and ``diff`` gave as JSON. files: bytes and digests by name. commands:
    that make the page, and what it tells of, again.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    rows: tuple[Mapping[str, Any], ...]
    spec: str
    weights: Mapping[str, Histogram] = field(default_factory=dict[str, Histogram])
    activations: Mapping[str, Histogram] = field(default_factory=dict[str, Histogram])
    search: Mapping[str, Any] | None = None
    evaluations: tuple[Mapping[str, Any], ...] = ()
    differences: Mapping[str, Any] | None = None
    files: Mapping[str, tuple[int | None, str]] = field(default_factory=dict[str, tuple[int | None, str]])
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "graphq_page": VERSION,
            "title": self.title,
            "facts": dict(self.facts),
            "layers": [dict(row) for row in self.rows],
            "spec": self.spec,
            "histograms": {
                "weights": {name: one.to_json() for name, one in self.weights.items()},
                "activations": {name: one.to_json() for name, one in self.activations.items()},
            },
            "search": self.search,
            "evaluations": list(self.evaluations),
            "differences": self.differences,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()},
            "commands": list(self.commands),
            "notes": list(self.notes),
        }


def page_of(
    given: Compiled | Model,
    spec: Any = None,
    *,
    model: Model | None = None,
    calibration: Iterable[object] | None = None,
    inputs: Any = None,
    search: Mapping[str, Any] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    differences: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
) -> Page:
    """The page of an artifact, of what ``compile`` gave, or of a model with its ``spec``.

    model: what an artifact or a compiled model is of: with it there are histograms of weights. calibration: batches,
    with which, and the model, there are histograms of the inputs of layers, too. search, evaluations, differences: what
    ``graphq search``, ``eval`` and ``diff`` print with ``--json``. Raises ``SpecError`` for a model without a
    spec, for an artifact with one, and for differences of another model.
    """
    batches = list(calibration or ())
    checked = _checked(search, evaluations, differences)
    if isinstance(given, Compiled):
        made = _of_compiled(given, "a compiled model")
        side = None if model is None else Side(given.graph, given.spec, given.seed)
        sources = Sources(model, batches, inputs)
    elif isinstance(given, str | Path) and (Path(given) / manifest.NAME).is_file():
        if spec is not None:
            raise SpecError("spec: an artifact has its own; leave it out, or give the model")
        made, sources = _of_artifact(Path(given)), Sources(model, batches, inputs)
        is_static = any(row["input"] is not None and not row["input"]["dynamic"] for row in made.rows)
        can_read = model is not None and (bool(batches) or not is_static)
        side = artifact_side(Path(given), sources) if can_read else None
        if model is not None and not can_read:
            note = "no histograms: an artifact with static scales is read back with calibration data"
            made = replace(made, notes=(*made.notes, note))
    else:
        if spec is None:
            raise SpecError("spec: none given; a model is shown with one, an artifact has its own")
        sources = Sources(given, batches, inputs)
        compiled, side = spec_side(spec, sources)
        made = _of_compiled(compiled, str(given) if isinstance(given, str | Path) else type(given).__name__)
    _check_same_layers(differences, made.rows)
    weights, activations = ({}, {}) if side is None else _histograms(side, sources)
    return Page(
        made.title,
        made.facts,
        made.rows,
        made.spec,
        weights,
        activations,
        *checked,
        made.files,
        tuple(commands),
        made.notes,
    )


def _checked(
    search: Mapping[str, Any] | None,
    evaluations: Sequence[Mapping[str, Any]],
    differences: Mapping[str, Any] | None,
) -> tuple[Mapping[str, Any] | None, tuple[Mapping[str, Any], ...], Mapping[str, Any] | None]:
    """The same, each with what it must hold. Raises ``SpecError``."""
    wanted = (("search", [search], ("groups", "trials", "front")), ("eval", evaluations, ("model",)))
    for name, found, keys in (*wanted, ("diff", [differences], ("layers", "outputs"))):
        for one in found:
            if one is not None and not all(key in one for key in keys):
                raise SpecError(f"{name}: not what graphq {name} --json prints: it has no {' or '.join(keys)}")
    return search, tuple(evaluations), differences


def _check_same_layers(differences: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ``SpecError`` where the differences are those of another model."""
    own = {row["layer"] for row in rows}
    try:
        compared = [str(one["layer"]) for one in (differences or {}).get("layers", ())]
    except (KeyError, TypeError) as error:
        raise SpecError("diff: not what graphq diff --json prints: a layer without a name") from error
    if compared and own.isdisjoint(compared):
        raise SpecError(f"diff: of another model: it compares {compared[0]}, which this one has not")


def _of_compiled(compiled: Compiled, title: str) -> Page:
    rows = compiled.report.rows()
    source = source_of(compiled.graph)
    facts = [("model", title), ("dtype", str(source.dtype).removeprefix("torch.")), *_sizes(rows)]
    facts += [("algorithm", "+".join(a.name for a in compiled.spec.algorithms) or "rtn"), ("seed", str(compiled.seed))]
    return Page(title, tuple(facts), tuple(rows), print_spec(compiled.spec), notes=compiled.report.notes)


def _of_artifact(directory: Path) -> Page:
    found = inspect(directory)
    try:
        rows = [_stored_row(row) for row in manifest.read(directory)["report"]]
    except ValueError as error:
        raise TargetError(f"{directory / manifest.NAME}: damaged: report: {error}") from error
    facts = [
        ("artifact", found.path),
        ("target", found.target),
        ("made with", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        ("model", found.model),
        ("dtype", str(found.source.dtype).removeprefix("torch.")),
        *_sizes(rows),
        ("all files", f"{found.nbytes:,} bytes"),
        ("algorithm", found.algorithm),
        ("seed", str(found.seed)),
    ]
    files = {file.name: (file.nbytes, file.sha256) for file in found.files}
    return Page(found.path, tuple(facts), tuple(rows), found.spec, files=files)


def _stored_row(row: Any) -> dict[str, Any]:
    """What a page needs of a row of a manifest, which ``inspect`` took. Raises ``ValueError`` for other data."""
    plans = {
        key: None if row[key] is None else {"text": row[key]["text"], "dynamic": bool(row[key].get("dynamic"))}
        for key in ("weight", "input")
    }
    sizes = entry(row, "shape", lambda value: isinstance(value, list) and all(map(is_size, value)), "a list of sizes")
    held = entry(row, "float_bytes", is_size, "a size")
    ratio = entry(row, "sqnr_db", lambda value: value is None or type(value) in (int, float), "a ratio or null")
    texts = {key: row[key] for key in ("layer", "rule", "source", "reason")}
    return {**texts, **plans, "shape": sizes, "bytes": row["bytes"], "float_bytes": held, "sqnr_db": ratio}


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    quantized = [row for row in rows if row["weight"] is not None]
    held, before = (sum(int(row[key]) for row in rows) for key in ("bytes", "float_bytes"))
    elements = sum(math.prod(row["shape"]) for row in quantized)
    bits = 8 * sum(row["bytes"] for row in quantized) / max(elements, 1)
    return [
        (
            "layers",
            f"{sum(row['weight'] is not None or row['input'] is not None for row in rows)} of {len(rows)} quantized",
        ),
        ("weights", f"{held:,} of {before:,} bytes ({held / max(before, 1):.1%})"),
        ("bits", f"{bits:.3f} for each quantized weight, scales included"),
    ]


def _histograms(side: Side, sources: Sources) -> tuple[dict[str, Histogram], dict[str, Histogram]]:
    source = sources.beside(side)
    batches = batches_for(side, sources.batches) if sources.batches else []
    return weight_histograms(source, side.graph), activation_histograms(side.graph, batches)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises ``SpecError`` where it holds none."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: not a file of JSON: {error}") from error
    if not isinstance(found, dict):
        raise SpecError(f"{file}: not an object of JSON")
    return cast(dict[str, Any], found)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
