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
from graphq.errors import SpecError, TargetError
from graphq.files import sync_directory, write_durably

JOURNAL: Final = "graphq.journal"  # of a graph: its journal
ANEW: Final = "start anew with --restart, or remove the folder"
_AT_WORK: Final = "another compile is at work there"
_INPUTS: Final = "inputs.json"
_LOCK: Final = "lock"
_STEPS: Final = "steps"
_ARTIFACT: Final = "artifact"
_BEGUN: Final = "artifact.json"  # with what options
_SHARD: Final = "shard"


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
        self.is_done = False
        self._shards: list[dict[str, Any]] = []
        self._walks = 0
        self._noted = 0
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _check_own(folder)
            self._lock = _locked(folder)
            try:
                self._open(inputs)
            except BaseException:
                self._lock.close()
                raise

    def __deepcopy__(self, memo: object) -> "Journal":
        return self

    def _open(self, inputs: Mapping[str, str]) -> None:
        kept = self.folder / _INPUTS
        if not kept.exists() or not _has_finished(self.folder):  # a process was killed as it began, or as it removed
            _remove(self.folder, with_lock=False)
            (self.folder / _STEPS).mkdir(exist_ok=True)
            write_durably(kept, json.dumps(inputs, indent=1))
            sync_directory(self.folder.parent)
        before = self._json(kept)
        if changed := changes(before, inputs):
            lines = [f"{self.folder}: holds an interrupted compile of something else; {ANEW}"]
            raise SpecError([*lines, *changed])
        self._records = {file.stem: self._json(file) for file in sorted((self.folder / _STEPS).glob("*.json"))}
        for place in (self.folder / _STEPS).iterdir():
            if place.is_dir() and place.name not in self._records:
                shutil.rmtree(place)
        for name, record in self._records.items():
            self._check(name, record)

    def _json(self, file: Path) -> dict[str, Any]:
        try:
            found: Any = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        except (OSError, ValueError, RecursionError):
            pass
        raise TargetError(f"{file}: damaged; {ANEW}")

    def _check(self, name: str, record: Mapping[str, Any]) -> None:
        for file, digest in record["files"].items():
            path = self.folder / _STEPS / name / file
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
        place = self.folder / _STEPS / name
        if CHOICES_FILE in record["files"]:
            self.choices |= read_choices(place)
        self._chosen = dict(self.choices)
        return place, record

    def commit(self, name: str, make: Callable[[Path], Mapping[str, Any]]) -> None:
        """``make``, which writes files to a new folder of this path, gives a record; the step is finished."""
        place = self.folder / _STEPS / name
        with _writing(self.folder):
            record = dict(make(place))
            new = {of: tensor for of, tensor in self.choices.items() if self._chosen.get(of) is not tensor}
            if new:
                place.mkdir(exist_ok=True)
                write_choices(place, new)
            files = sorted(place.iterdir()) if place.exists() else []
            if files:
                sync_directory(place)
            sync_directory(self.folder / _STEPS)
        record["files"] = {file.name: file_digest(file) for file in files}
        record["notes"] = self.notes[self._noted :]
        record["sqnr"] = dict(self.sqnr)
        self._chosen = dict(self.choices)
        write_durably(self.folder / _STEPS / f"{name}.json", json.dumps(record))
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
        if not begun.exists() or self._json(begun) != dict(options):
            self.end_artifact()
        records = [self._json(file) for file in sorted(self.folder.glob(f"{_SHARD}-*.json"))]
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
        write_durably(self.folder / f"{_SHARD}-{len(self._shards):05}.json", json.dumps(self._shards[-1]))

    def end_artifact(self) -> None:
        """Nothing is kept of an artifact."""
        for file in (self.folder / _BEGUN, *self.folder.glob(f"{_SHARD}-*.json")):
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
                _remove(self.folder)
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
        with _writing(self._journal.folder):
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


def work_folder(out: Path) -> Path:
    """The folder beside ``out`` in which a compile to it is kept."""
    final = out.absolute()
    return final.with_name(f".{final.name}.work")


def discard(folder: Path) -> None:
    """Nothing is kept in the folder any more. Raises ``TargetError`` where a compile is at work there, and where it is
    none of a compile.
    """
    if not folder.exists():
        return
    _check_own(folder)
    lock = _locked(folder)
    _remove(folder)
    lock.close()


@contextlib.contextmanager
def told_how_to_go_on(folder: Path) -> Generator[None]:
    """An error says what is kept in the folder of an interrupted compile."""
    try:
        yield
    except BaseException as error:
        is_of_another = isinstance(error, TargetError) and str(error).endswith(_AT_WORK)  # and not interrupted
        if not is_of_another and (line := how_to_go_on(folder)):
            error.add_note(line)
        raise


def how_to_go_on(folder: Path) -> str:
    """A line on what an interrupted compile left in its folder; empty where it left nothing."""
    if not (folder / _INPUTS).exists() or not _has_finished(folder):
        return ""
    steps, shards = len(list((folder / _STEPS).glob("*.json"))), len(list(folder.glob(f"{_SHARD}-*.json")))
    counts = ((steps, "blocks"), (shards, "files of weights"))
    finished = " and ".join(f"{count} finished {kind}" for count, kind in counts if count)
    return f"{folder}: {finished} are kept; the same command goes on from there, with --restart anew"


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


@contextlib.contextmanager
def _writing(folder: Path) -> Generator[None]:
    """What the system refuses is a ``TargetError``."""
    try:
        yield
    except OSError as error:
        raise TargetError(f"{folder}: cannot be written to: {error.strerror}") from error


def _has_finished(folder: Path) -> bool:
    """Whether a block or a file of weights is finished there."""
    return any((folder / _STEPS).glob("*.json")) or any(folder.glob(f"{_SHARD}-*.json"))


def _remove(folder: Path, with_lock: bool = True) -> None:
    """The folder is gone, or all of it but the lock. Where a process is stopped meanwhile, nothing of it is kept: what
    tells the inputs goes first, and the lock, which tells whose folder it is, last.
    """
    (folder / _INPUTS).unlink(missing_ok=True)
    for place in folder.iterdir():
        if place.is_dir():
            shutil.rmtree(place)
        elif place.name != _LOCK:
            place.unlink()
    if with_lock:
        (folder / _LOCK).unlink()
        folder.rmdir()


def _check_own(folder: Path) -> None:
    """Raises ``TargetError`` for a folder that holds something, but nothing of a compile."""
    if not (folder / _LOCK).exists() and any(folder.iterdir()):
        raise TargetError(f"{folder}: exists and is not what an interrupted compile left")


def _locked(folder: Path) -> Any:
    """The open file that only one process has locked."""
    opened = (folder / _LOCK).open("w")
    with contextlib.suppress(ImportError):  # no such locks there
        import fcntl

        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            opened.close()
            raise TargetError(f"{folder}: {_AT_WORK}") from error
    return opened
