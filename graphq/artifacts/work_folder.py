"""The folder of an interrupted compile: who has it, what is finished in it, and how it goes."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final, cast

from graphq.errors import TargetError
from graphq.files import write_durably

ANEW: Final = "start anew with --restart, or remove the folder"
INPUTS: Final = "inputs.json"
STEPS: Final = "steps"
SHARD: Final = "shard"
_AT_WORK: Final = "another compile is at work there"
_LOCK: Final = "lock"


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
    check_own(folder)
    lock = locked(folder)
    remove(folder)
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
    if not (folder / INPUTS).exists() or not has_finished(folder):
        return ""
    steps, shards = len(list((folder / STEPS).glob("*.json"))), len(list(folder.glob(f"{SHARD}-*.json")))
    counts = ((steps, "blocks"), (shards, "files of weights"))
    finished = " and ".join(f"{count} finished {kind}" for count, kind in counts if count)
    return f"{folder}: {finished} are kept; the same command goes on from there, with --restart anew"


def keep_record(file: Path, record: Mapping[str, Any]) -> None:
    """The record is in ``file``, on the disk, with a digest of its text."""
    write_durably(file, json.dumps({"record": record, "sha256": _digest(json.dumps(record))}))


def read_record(file: Path) -> dict[str, Any]:
    """What ``keep_record`` wrote. Raises ``TargetError`` for anything else."""
    found = read_json(file)
    record = found.get("record")
    if not isinstance(record, dict) or found.get("sha256") != _digest(json.dumps(record)):
        raise TargetError(f"{file}: damaged; {ANEW}")
    return cast(dict[str, Any], record)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of JSON. Raises ``TargetError`` for anything else."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return cast(dict[str, Any], found)
    except (OSError, ValueError, RecursionError):
        pass
    raise TargetError(f"{file}: damaged; {ANEW}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def writing(folder: Path) -> Generator[None]:
    """What the system refuses is a ``TargetError``."""
    try:
        yield
    except OSError as error:
        raise TargetError(f"{folder}: cannot be written to: {error.strerror}") from error


def has_finished(folder: Path) -> bool:
    """Whether a block or a file of weights is finished there."""
    return any((folder / STEPS).glob("*.json")) or any(folder.glob(f"{SHARD}-*.json"))


def remove(folder: Path, with_lock: bool = True) -> None:
    """The folder is gone, or all of it but the lock. Where a process is stopped meanwhile, nothing of it is kept: what
    tells the inputs goes first, and the lock, which tells whose folder it is, last.
    """
    (folder / INPUTS).unlink(missing_ok=True)
    for place in folder.iterdir():
        if place.is_dir():
            shutil.rmtree(place)
        elif place.name != _LOCK:
            place.unlink()
    if with_lock:
        (folder / _LOCK).unlink()
        folder.rmdir()


def check_own(folder: Path) -> None:
    """Raises ``TargetError`` for a folder that holds something, but nothing of a compile."""
    if not (folder / _LOCK).exists() and any(folder.iterdir()):
        raise TargetError(f"{folder}: exists and is not what an interrupted compile left")


def locked(folder: Path) -> Any:
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
