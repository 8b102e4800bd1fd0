"""What is finished of a compile, in a folder that outlives its process: the same compile goes on from there.

A record of a block is written when everything that it names is on the disk, and is renamed into its place; a block
without a record was not finished. What a later block does not need is removed when its own record is there. So the
folder can be continued from whatever moment the process, or the machine, stops.
"""

import contextlib
import json
import shutil
import weakref
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Final, final

from torch import Tensor, fx

from graphq.artifacts.activations import Activations
from graphq.artifacts.choices import CHOICES_FILE, read_choices, write_choices
from graphq.artifacts.manifest import file_digest
from graphq.artifacts.work_folder import (
    ANEW,
    INPUTS,
    SHARD,
    STEPS,
    check_own,
    has_finished,
    keep_record,
    locked,
    read_json,
    read_record,
    remove,
    writing,
)
from graphq.errors import SpecError, TargetError
from graphq.files import sync_directory, write_durably

JOURNAL: Final = "graphq.journal"  # of a graph: its journal
_ARTIFACT: Final = "artifact"
_BEGUN: Final = "artifact.json"  # with what options


@final
class Journal:
    """The journal in ``folder`` of a compile that is made from ``inputs``, each in words or a digest by its name, and
    that tells its report ``notes``, the layers' ratios ``sqnr`` and what algorithms chose, ``choices``.

    Raises ``SpecError`` where the folder holds a compile of other inputs, and says which; ``TargetError`` where another
    process is at work there, where it is no such folder or damaged, and where it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Mapping[str, str],
        notes: list[str],
        sqnr: dict[str, float],
        choices: dict[str, Tensor],
    ) -> None:
        self.folder = folder
        self.notes = notes
        self.sqnr = sqnr
        self.choices = choices
        self._chosen: dict[str, Tensor] = {}
        self._told: dict[str, float] = {}
        self.is_done = False
        self._shards: list[dict[str, Any]] = []
        self._walks = 0
        self._noted = 0
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            check_own(folder)
            self._lock = locked(folder)
            try:
                self._open(inputs)
            except BaseException:
                self._lock.close()
                raise

    def __deepcopy__(self, memo: object) -> "Journal":
        return self

    def _open(self, inputs: Mapping[str, str]) -> None:
        kept = self.folder / INPUTS
        if not kept.exists() or not has_finished(self.folder):  # a process was killed as it began, or as it removed
            remove(self.folder, with_lock=False)
            (self.folder / STEPS).mkdir(exist_ok=True)
            write_durably(kept, json.dumps(inputs, indent=1))
            sync_directory(self.folder.parent)
        before = read_json(kept)
        if changed := changes(before, inputs):
            lines = [f"{self.folder}: holds an interrupted compile of something else; {ANEW}"]
            raise SpecError([*lines, *changed])
        self._records = {file.stem: read_record(file) for file in sorted((self.folder / STEPS).glob("*.json"))}
        for place in (self.folder / STEPS).iterdir():
            if place.is_dir() and place.name not in self._records:
                shutil.rmtree(place)
        for name, record in self._records.items():
            self._check(name, record)

    def _check(self, name: str, record: Mapping[str, Any]) -> None:
        for file, digest in record["files"].items():
            path = self.folder / STEPS / name / file
            try:
                is_same = file_digest(path) == digest
            except OSError:
                is_same = False
            if not is_same:
                raise TargetError(f"{path}: damaged; {ANEW}")

    # -- blocks

    @property
    def steps(self) -> int:
        """How many blocks are finished."""
        return len(self._records)

    def walk(self) -> "Walk":
        """The next walk over the blocks."""
        self._walks += 1
        self._noted = len(self.notes)
        return Walk(self, self._walks - 1)

    def restore(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """The record of a step, and the folder of its files; what it told is told again."""
        record = self._records.get(name)
        if record is None:
            return None
        self.notes += record["notes"]
        self._noted = len(self.notes)
        self.sqnr |= record["sqnr"]
        self._told = dict(self.sqnr)
        place = self.folder / STEPS / name
        if CHOICES_FILE in record["files"]:
            self.choices |= read_choices(place)
        self._chosen = dict(self.choices)
        return place, record

    def commit(self, name: str, make: Callable[[Path], Mapping[str, Any]]) -> None:
        """``make``, which writes files to a new folder of this path, gives a record; the step is finished."""
        place = self.folder / STEPS / name
        with writing(self.folder):
            record = dict(make(place))
            new = {of: tensor for of, tensor in self.choices.items() if self._chosen.get(of) is not tensor}
            if new:
                place.mkdir(exist_ok=True)
                write_choices(place, new)
            files = sorted(place.iterdir()) if place.exists() else []
            if files:
                sync_directory(place)
            sync_directory(self.folder / STEPS)
        record["files"] = {file.name: file_digest(file) for file in files}
        record["notes"] = self.notes[self._noted :]
        record["sqnr"] = {layer: ratio for layer, ratio in self.sqnr.items() if self._told.get(layer) != ratio}
        self._told = dict(self.sqnr)
        self._chosen = dict(self.choices)
        keep_record(self.folder / STEPS / f"{name}.json", record)
        self._records[name] = record
        self._noted = len(self.notes)

    # -- the artifact

    @property
    def artifact(self) -> Path:
        """The directory in which the artifact is written."""
        return self.folder / _ARTIFACT

    def shard_path(self, index: int) -> Path:
        """Where the shard of this number is until all are there."""
        return self.artifact / f"{index + 1:05}.partial"

    def begin_artifact(self, options: Mapping[str, str]) -> None:
        """The directory holds the finished shards, if it was begun with the same ``options`` and they are what they
        were, and nothing else.
        """
        begun = self.folder / _BEGUN
        if not begun.exists() or read_json(begun) != dict(options):
            self.end_artifact()
        records = [read_record(file) for file in sorted(self.folder.glob(f"{SHARD}-*.json"))]
        if all(self._has_shard(number, record["sha256"]) for number, record in enumerate(records)):
            self._shards = records
        else:  # it was in its place, or exchanged with another one, already
            self.end_artifact()
        self.artifact.mkdir(exist_ok=True)
        write_durably(begun, json.dumps(options))
        for file in self.artifact.iterdir():
            if file not in {self.shard_path(number) for number in range(len(self._shards))}:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _has_shard(self, number: int, digest: str) -> bool:
        path = self.shard_path(number)
        if not path.exists():  # all were there, and have their own names already
            patterns = (f"*-{number + 1:05}-of-*.safetensors", "*.safetensors")
            for file in [file for pattern in patterns for file in self.artifact.glob(pattern)][:1]:
                file.rename(path)
        return path.exists() and file_digest(path) == digest

    def shard(self, index: int) -> dict[str, Any] | None:
        """The record of a shard, None where it is not finished; the layers' ratios that were known then are told."""
        if index >= len(self._shards):
            return None
        self.sqnr |= self._shards[index]["sqnr"]
        return self._shards[index]

    def commit_shard(self, record: Mapping[str, Any]) -> None:
        """The next shard is finished."""
        sync_directory(self.artifact)
        self._shards.append({**record, "sqnr": dict(self.sqnr)})
        keep_record(self.folder / f"{SHARD}-{len(self._shards):05}.json", self._shards[-1])

    def end_artifact(self) -> None:
        """Nothing is kept of an artifact."""
        for file in (self.folder / _BEGUN, *self.folder.glob(f"{SHARD}-*.json")):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.artifact, ignore_errors=True)
        self._shards = []

    # -- its end

    def close(self) -> None:
        """Another process may have the folder, which is gone where nothing is to be continued."""
        if self._lock.closed:
            return
        if self.is_done or not (self.steps or self._shards):
            with contextlib.suppress(OSError):
                remove(self.folder)
        self._lock.close()


@final
class Walk:
    """A walk over the blocks of a graph, and the finished ones of it."""

    def __init__(self, journal: Journal, number: int) -> None:
        self._journal = journal
        self._number = number

    def _name(self, index: int) -> str:
        return f"{self._number}-{index:05}"

    def values(self) -> Path:
        """The folder for what blocks give."""
        place = self._journal.folder / f"values-{self._number}"
        with writing(self._journal.folder):
            place.mkdir(exist_ok=True)
        return place

    def restore(self, index: int) -> tuple[Path, dict[str, Any]] | None:
        """The record of a finished block and the folder of its tensors; None where it is not finished."""
        return self._journal.restore(self._name(index))

    def commit(self, index: int, make: Callable[[Path], Mapping[str, Any]], values: Activations | None) -> None:
        """A block is finished, and what no later one takes is removed."""
        if values is not None:
            sync_directory(self.values())
        self._journal.commit(self._name(index), make)
        if values is not None:
            values.remove_files()


@contextlib.contextmanager
def kept(gm: fx.GraphModule, journal: Journal | None) -> Generator[None]:
    """``gm`` has the journal, which is closed where the block ends with an error, and with ``gm``."""
    if journal is None:
        yield
        return
    gm.meta[JOURNAL] = journal
    weakref.finalize(gm, journal.close)
    try:
        yield
    except BaseException:
        journal.close()
        raise


def journal_of(gm: fx.GraphModule) -> Journal | None:
    """The journal of a graph that has one."""
    return gm.meta.get(JOURNAL)


def changes(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """A line for each input that is another one now."""
    lines: list[str] = []
    for name in dict.fromkeys((*before, *now)):
        if name not in before or name not in now:
            lines.append(f"{name}: {'is new' if name not in before else 'is gone'}")
        elif before[name] != now[name]:
            was, found = str(before[name]).splitlines(), now[name].splitlines()
            pairs = [(a, b) for a, b in zip(was, found, strict=False) if a != b]
            extra = [*was[len(found) :], *found[len(was) :]]
            a, b = pairs[0] if pairs else (("", extra[0]) if len(found) > len(was) else (extra[0], ""))
            lines.append(f"{name}: was {a.strip() or 'nothing'}, is {b.strip() or 'nothing'}")
    return lines
