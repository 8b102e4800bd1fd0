"""An artifact that is written by shards: which of them are finished, where the graph has a journal that says so.

A shard is as a block is: its record is written when it is on the disk, and tells all that was learnt of the tensors
until then. Another process takes the next tensors, and makes the same files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from torch import Tensor, fx

from graphq.artifacts.journal import Journal, journal_of
from graphq.artifacts.manifest import file_digest
from graphq.artifacts.shards import InParts, headers_of
from graphq.progress import in_steps

Named = tuple[str, Tensor | InParts]


@final
class Emission:
    """The shards of ``gm``'s artifact, written with these ``options``.

    ``learnt``: what is learnt of tensors while they are written, by name, in dicts that a restored record fills.
    """

    def __init__(self, gm: fx.GraphModule, options: Mapping[str, object], learnt: Mapping[str, dict[str, Any]]) -> None:
        self._journal = journal_of(gm)
        self._learnt = learnt
        self._groups: dict[str, list[str]] = {}
        self.shards: list[list[str]] = []
        self._held: dict[str, InParts] = {}
        if self._journal is not None:
            self._journal.begin_artifact({name: str(value) for name, value in options.items()})
            self._restore(self._journal)

    @property
    def directory(self) -> Path | None:
        """Where the artifact is written; None: wherever, since none can be continued."""
        return None if self._journal is None else self._journal.artifact

    def _restore(self, journal: Journal) -> None:
        while (record := journal.shard(len(self.shards))) is not None:
            self.shards.append(record["names"])
            self._groups |= record["groups"]
            for name, found in self._learnt.items():
                found |= record["learnt"][name]
            for name, (dtype, shape) in headers_of(journal.shard_path(len(self.shards) - 1)).items():
                self._held[name] = InParts(dtype, shape, ())

    def tensors(self, names: Iterable[str], make: Callable[[str], Iterator[Named]]) -> Iterator[Named]:
        """What ``make`` gives for each of ``names``; it is not asked where the tensors are all in finished files."""
        for name in in_steps("tensors", list(names)):
            group = self._groups.get(name)
            if group is not None and all(one in self._held for one in group):
                yield from ((one, self._held[one]) for one in group)
                continue
            given: list[str] = []
            for one, tensor in make(name):
                given.append(one)
                yield one, tensor
            self._groups[name] = given

    def after(self, names: Sequence[str], path: Path) -> None:
        """A further shard is finished."""
        if self._journal is None:
            return
        record = {"names": list(names), "groups": self._groups, "learnt": self._learnt, "sha256": file_digest(path)}
        self._journal.commit_shard(record)

    def end(self) -> None:
        """The artifact is in its place."""
        if self._journal is not None:
            self._journal.end_artifact()
