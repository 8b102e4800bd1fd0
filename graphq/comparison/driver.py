"""``graphq.diff``: where two forms of a model differ, layer by layer, the largest local error first."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from graphq.artifacts.inspect import aligned
from graphq.comparison.layer_errors import Row, Sums
from graphq.comparison.side_by_side import SideBySide
from graphq.comparison.sides import Given, Model, Sources, batches_for, folds_of, kind_of, sides_of
from graphq.compiler import Inputs
from graphq.data.agreement import Agreement
from graphq.errors import SpecError, printable
from graphq.ir.layers import PLAN
from graphq.spec.plan import KeepFloat

WORST: int = 3


@final
@dataclass(frozen=True)
class LayerDifference:
    """One layer. a, b: how it is quantized in each. local: its error for the input that A has; cumulative: for its own.
    clipped: the share of B's input that its quantizer clips, None without one. dead_channels: of its output. worst: the
    rows of the largest local errors. compared_in: the layers whose errors its own are part of; it has none itself then.
    """

    name: str
    a: str
    b: str
    local: Sums
    cumulative: Sums
    clipped: float | None
    dead_channels: tuple[int, ...]
    worst: tuple[Row, ...]
    compared_in: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; what has no rows is null."""
        return {
            "layer": self.name,
            "a": self.a,
            "b": self.b,
            "local": self.local.to_json() if self.local.rows else None,
            "cumulative": self.cumulative.to_json() if self.cumulative.rows else None,
            "clipped": self.clipped,
            "dead_channels": list(self.dead_channels),
            "worst": [row.to_json() for row in self.worst],
            "compared_in": list(self.compared_in),
        }

    def cells(self) -> tuple[str, ...]:
        """The cells of its row in a table."""
        worst = self.worst[0] if self.worst else None
        where = ""
        if worst is not None:
            token = f" token {worst.token}" if worst.token >= 0 else ""
            where = f"batch {worst.batch} {list(worst.at)}{token}: {worst.error:.3g}"
        plan = self.b if self.a in ("float", self.b) else f"{self.a} -> {self.b}"
        if self.compared_in:
            where = f"its output is scaled; compared in {', '.join(self.compared_in)}"
        numbers = [
            text
            for sums in (self.local, self.cumulative)
            for text in ((f"{sums.sqnr_db:.2f}", f"{sums.cosine:.6f}") if sums.rows else ("", ""))
        ]
        clipped = "" if self.clipped is None else f"{self.clipped:.3%}"
        return (self.name, plan, *numbers, clipped, str(len(self.dead_channels) or ""), where)


_HEADER = (
    *("layer", "plan", "local dB", "cosine", "cumulative dB", "cosine"),
    *("clipped", "dead", "worst row"),
)


@final
@dataclass(frozen=True)
class Comparison:
    """The layers of B beside those of A, the largest local error first. outputs: of the whole model. agreement: of a
    language model's next tokens. ``str`` of it is for people, ``to_json`` for programs.
    """

    a: str
    b: str
    layers: tuple[LayerDifference, ...]
    outputs: Mapping[str, Sums]
    agreement: Agreement | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "a": self.a,
            "b": self.b,
            "layers": [layer.to_json() for layer in self.layers],
            "outputs": {name: sums.to_json() for name, sums in self.outputs.items()},
            "agreement": None if self.agreement is None else self.agreement.to_json(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        table = aligned([_HEADER, *(layer.cells() for layer in self.layers)])
        ends = [f"output {name}: {s.sqnr_db:.2f} dB, cosine {s.cosine:.6f}" for name, s in self.outputs.items()]
        ends += [] if self.agreement is None else [str(self.agreement)]
        return "\n".join([*table, *map(printable, ends), *(f"note: {printable(note)}" for note in self.notes)])


def diff(
    a: Given,
    b: Given,
    *,
    calibration: Iterable[object],
    model: Model | None = None,
    inputs: Inputs | None = None,
    dtype: torch.dtype | None = None,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
    worst: int = WORST,
) -> Comparison:
    """Compare the layers of ``b`` with those of ``a``, the reference, in one walk over both graphs.

    a, b: a model (a module, or a model directory), a spec on it (as ``compile`` takes it), an artifact of it for any
        target, or what ``compile`` gave.
    calibration: the batches that both run on, and by which static scales of specs are found.
    model: what specs and artifacts are of, where neither ``a`` nor ``b`` is the model itself. ``inputs``, ``dtype``,
        ``cache``, ``mask``, ``shapes`` and ``trust_remote_code``: as ``compile`` takes them.
    worst: how many rows of the largest errors are kept of each layer.

    A layer whose output an algorithm scales by channel is not the same function in both: its error is part of the local
    errors of those that read it. Raises ``SpecError``, ``GraphError`` and ``TargetError``.
    """
    if type(worst) is not int or worst < 0:
        raise SpecError(f"worst: {worst!r} is not a whole number from 0")
    given = [*calibration]
    models = [one for one in (a, b) if kind_of(one) == "model"]
    of_both: Any = model if model is not None else models[0] if models else None
    sources = Sources(of_both, given, inputs, dtype, cache, mask, shapes, trust_remote_code)
    first, second = sides_of(a, b, sources)
    batches = [batches_for(side, given) for side in (first, second)]
    merged = folds_of(first, sources) | folds_of(second, sources)
    both = SideBySide(first.graph, second.graph, merged, worst)
    for number, (of_a, of_b) in enumerate(zip(*batches, strict=True)):
        both.run(number, of_a, of_b)
    notes = [*first.notes, *second.notes]
    notes += [f"only A has {', '.join(both.only_a)}"] if both.only_a else []
    notes += [f"only B has {', '.join(both.only_b)}"] if both.only_b else []
    found = sorted(_differences(both, merged), key=lambda layer: -layer.local.share)
    agreement = None if both.agreement is None else both.agreement.found()
    return Comparison(_name(a), _name(b), tuple(found), both.outputs, agreement, tuple(notes))


def _differences(both: SideBySide, merged: Mapping[str, tuple[str, ...]]) -> Iterable[LayerDifference]:
    for (name, use), (of_a, of_b) in both.nodes.items():
        errors = both.errors[name, use]
        yield LayerDifference(
            f"{name} (use {use + 1})" if use else name,
            _plan(of_a.meta.get(PLAN)),
            _plan(of_b.meta.get(PLAN)),
            errors.local,
            errors.cumulative,
            both.clipped_share(of_b),
            errors.dead_channels,
            errors.worst,
            merged.get(name, ()),
        )


def _plan(decision: object) -> str:
    return "float" if decision is None or isinstance(decision, KeepFloat) else str(decision)


def _name(given: Given) -> str:
    match kind_of(given):
        case "compiled":
            return "a compiled model"
        case "model" if isinstance(given, torch.nn.Module):
            return type(given).__name__
        case "spec" if not isinstance(given, str):
            return "a spec"
        case _:
            return str(given)
