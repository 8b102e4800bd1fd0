"""Graphs that keep more of a text than keys and values: states of convolutions and recurrences, keys of an index.

Some of them read one token at a time, whose texts are read token by token. What such a graph keeps travels in one
object through ``transformers``' generation.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Self, final

import torch
from torch import Tensor
from transformers import DynamicCache

from graphq.capture.source import SEQUENCE, TOTAL, Source
from graphq.data.batches import complete
from graphq.errors import SpecError

_IDS: Final = "input_ids"


@final
class StateCache(DynamicCache):
    """What a graph keeps of the ``seen`` tokens of a text: ``tensors``, by the names of its inputs. None at first."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.seen = 0

    def hold(self, source: Source, outputs: Mapping[str, Tensor], count: int) -> Self:
        """Itself, which now holds what ``count`` more tokens left."""
        self.tensors = {pair.past: outputs[pair.present] for pair in source.caches}
        self.seen += count
        return self

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens were read."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit."""
        return -1

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors = {name: change(x) for name, x in self.tensors.items()}

    def reorder_cache(self, beam_idx: Any) -> None:
        """The rows of these indices, in this order."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Any) -> None:
        """The rows of these indices."""
        self._each(lambda x: x[indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row as often."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ``SpecError``: a state holds no earlier one."""
        raise SpecError("cache: it holds states, which cannot be taken back to an earlier token")


def read_text(source: Source, run: Callable[..., Iterable[Tensor]], given: Mapping[str, object]) -> dict[str, Tensor]:
    """The outputs by name for a text of any length; of a graph that takes one token, after as many calls.

    ``given`` may lack masks, positions and what is kept of earlier tokens. A mask covers these, too, or the text alone.
    """
    ids = given.get(_IDS)
    if source.fixed.get(SEQUENCE) != 1 or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] == 1:
        batch = complete(source, _with_mask(source, given, ids))
        return dict(zip(source.outputs, run(batch), strict=True))
    count = ids.shape[1]
    kept = {pair.past: given[pair.past] for pair in source.caches if pair.past in given}
    mask = given.get("attention_mask")
    positions = given.get("position_ids")
    if positions is None and "position_ids" in source.names and isinstance(mask, Tensor):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
    steps: list[dict[str, Tensor]] = []
    for place in range(count):
        one: dict[str, object] = {**kept, _IDS: ids[:, place : place + 1]}
        if isinstance(mask, Tensor):
            one["attention_mask"] = mask[:, : mask.shape[1] - count + place + 1]
        if isinstance(positions, Tensor):
            one["position_ids"] = positions[:, place : place + 1]
        batch = complete(source, _with_mask(source, one, one[_IDS]))
        found = dict(zip(source.outputs, run(batch), strict=True))
        kept = {pair.past: found[pair.present] for pair in source.caches}
        steps.append(found)
    outputs = {name: x for name, x in steps[-1].items() if name in source.presents}
    each = {name: torch.cat([step[name] for step in steps], 1) for name in steps[0] if name not in source.presents}
    return {name: outputs[name] if name in outputs else each[name] for name in source.outputs}


def _with_mask(source: Source, given: Mapping[str, object], ids: object) -> dict[str, object]:
    """The same inputs, with the columns of the mask that this graph takes: without keys, those of the text alone."""
    made = dict(given)
    mask = made.get("attention_mask")
    declared = next((one for one in source.inputs if one.name == "attention_mask"), None)
    if declared is None:
        made.pop("attention_mask", None)
    elif isinstance(mask, Tensor) and isinstance(ids, Tensor) and declared.shape[-1] != TOTAL:
        made["attention_mask"] = mask[:, -ids.shape[1] :]
    return made
