"""Sensitivities in a file, so that a search that is run again, or with one option more, measures only what is new."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast, final

from torch import Tensor, fx

from graphq.errors import SpecError
from graphq.files import write_text
from graphq.frontends.native import print_spec
from graphq.ir.pipeline import fingerprint
from graphq.mixed_precision.options import Option

VERSION: Final = 1


@final
class Scores:
    """The cost of each layer by each option, by the option's own rules and the path of the layer's weight.

    Of a ``path`` that exists, what it holds is read; ``of`` says what it has to be about. Raises ``SpecError`` for a
    file that is no such one, or is about another model, other data or another measure.
    """

    def __init__(self, path: Path | None, of: str) -> None:
        self.path, self.of = path, of
        self._held: dict[str, dict[str, float]] = {}
        if path is not None and path.exists():
            self._held = _read(path, of)

    def missing(self, options: Iterable[Option]) -> list[Option]:
        """The options that nothing is known of."""
        return [option for option in options if _key(option) not in self._held]

    def put(self, option: Option, costs: Mapping[str, float]) -> None:
        """The costs are held, and stand in the file."""
        self._held[_key(option)] = dict(costs)
        if self.path is not None:
            text = json.dumps({"graphq_scores": VERSION, "of": self.of, "options": self._held}, indent=1)
            write_text(self.path, text + "\n", overwrite=True)

    def of_option(self, option: Option) -> Mapping[str, float]:
        return self._held[_key(option)]


def scores_of(gm: fx.GraphModule, batches: Sequence[tuple[Any, ...]], kind: str, seed: int) -> str:
    """A digest of all that the costs depend on beside the option."""
    digest = hashlib.sha256(f"{fingerprint(gm)} {kind} {seed}".encode())
    for batch in batches:
        for value in batch:
            if isinstance(value, Tensor):
                shown = value.detach().cpu().contiguous()
                digest.update(f"{shown.dtype} {tuple(shown.shape)}".encode() + shown.flatten().numpy().tobytes())
    return digest.hexdigest()


def _key(option: Option) -> str:
    return print_spec(option.spec)


def _read(path: Path, of: str) -> dict[str, dict[str, float]]:
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: not a file of scores: {error}") from error
    if not isinstance(held, dict) or held.get("graphq_scores") != VERSION:
        raise SpecError(f"{path}: not a file of scores of this graphq; give another file, or remove it")
    if held.get("of") != of:
        raise SpecError(f"{path}: its scores are of another model, other data or another measure; give another file")
    options = held.get("options")
    rows = cast("dict[str, Any]", options).values() if isinstance(options, dict) else [None]
    for row in rows:
        costs = cast("dict[str, Any]", row).values() if isinstance(row, dict) else [None]
        if not all(type(cost) is float and math.isfinite(cost) and cost >= 0 for cost in costs):
            raise SpecError(f"{path}: options: a score is not a number from 0; remove the file")
    return cast("dict[str, dict[str, float]]", options)
