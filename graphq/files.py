"""Writing a directory, or a file, whole or not at all."""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Final

from graphq.errors import TargetError

MANIFEST: Final = "graphq.json"  # an artifact's description of itself, which lists its other files
FORMAT: Final = 1
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@contextlib.contextmanager
def whole_directory(
    path: str | os.PathLike[str],
    overwrite: bool,
    keep: Iterable[str | os.PathLike[str]] = (),
    within: Path | None = None,
) -> Generator[Path]:
    """An empty directory beside ``path`` to write into; it becomes ``path`` when the block ends without an error.

    ``within``: the directory to write into, which may hold what an interrupted process wrote, and stays after an error.
    Raises what ``check_place`` raises. An existing directory stays untouched until the new one is complete, and is then
    replaced in one step; a process that dies leaves the one or the other. Files can be read by whoever can read the
    directory, whatever the libraries that wrote them think.
    """
    keep = tuple(keep)
    check_place(path, overwrite, keep)
    final = Path(path).resolve()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        made = _empty_directory(final) if within is None else within
        made.mkdir(exist_ok=True)
    except OSError as error:
        raise TargetError(f"{path}: cannot be made: {error.filename}: {error.strerror}") from error
    is_whole = False
    try:
        yield made
        for file in made.rglob("*"):
            file.chmod(made.stat().st_mode & (0o777 if file.is_dir() else 0o666))
        _sync(made)
        is_whole = True
        if final.exists():
            if not overwrite:
                raise TargetError(f"{final}: was made by somebody else meanwhile")
            check_place(path, overwrite, keep)  # what was put there meanwhile stays, too
            _exchange(made, final)
        else:
            made.rename(final)
        sync_directory(final.parent)
    finally:
        if made.exists() and (is_whole or within is None):
            shutil.rmtree(made)


def write_text(path: str | os.PathLike[str], text: str, overwrite: bool) -> None:
    """The file ``path`` holds ``text``, whole or not at all. Raises ``TargetError`` where it exists, unless
    ``overwrite``, and where it cannot be written.
    """
    final = Path(path)
    made = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            with made.open("x", encoding="utf-8") as file:
                file.write(text)
            if overwrite:
                made.replace(final)
            else:
                os.link(made, final)  # fails where it exists
        finally:
            made.unlink(missing_ok=True)
    except FileExistsError as error:
        raise TargetError(f"{path}: exists; choose another place, or overwrite it (--overwrite)") from error
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror}") from error


def write_durably(path: Path, text: str) -> None:
    """The file ``path`` holds ``text``, on the disk, or what it held before, whenever the system stops. Raises
    ``TargetError`` where it cannot be written.
    """
    made = path.with_name(f"{path.name}.partial")
    try:
        with made.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror}") from error


def _sync(directory: Path) -> None:
    """What a directory holds is on the disk."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        else:
            sync_directory(file)
    sync_directory(directory)


def sync_directory(path: Path) -> None:
    """What was made, renamed and removed in a directory is so on the disk, where the system can say that."""
    if os.name == "nt":
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check_place(path: str | os.PathLike[str], overwrite: bool, keep: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raises ``TargetError`` if a directory cannot be written to ``path``.

    It exists and ``overwrite`` is false, it is no directory or lies where none can be made, it holds one of ``keep`` or
    the working directory, or files that its own manifest does not list: only whole artifacts are replaced.
    """
    place = Path(path)
    if place.is_symlink():
        raise TargetError(f"{place}: is a symbolic link to {place.readlink()}; name the directory itself")
    if place.exists() and not place.is_dir():
        raise TargetError(f"{place}: exists and is not a directory")
    if place.exists() and not overwrite:
        raise TargetError(f"{place}: exists; choose another place, or overwrite it (--overwrite)")
    parent = next(p for p in place.absolute().parents if p.exists() or p.is_symlink())
    if not parent.is_dir():
        raise TargetError(f"{place}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(f"{place}: {parent} cannot be written to")
    if not place.exists():
        return
    if _holds(place, Path.cwd()):
        raise TargetError(f"{place}: is or holds the working directory; it is not overwritten")
    for file in keep:
        if _holds(place, Path(file)):
            raise TargetError(f"{place}: holds {file}, which is read from; choose another place")
    if any(place.iterdir()):
        _check_own(place)


def _holds(place: Path, file: Path) -> bool:
    """Whether ``file``, by its own name or that of what it links to, is ``place`` or lies in it."""
    whole = place.resolve()
    return any(whole in (path, *path.parents) for path in (file.resolve(), file.parent.resolve() / file.name))


def _check_own(place: Path) -> None:
    """Raises ``TargetError`` if ``place`` holds anything but an artifact's own files."""
    listed = own_files(place)
    if listed is None:
        if not (place / MANIFEST).is_file():
            raise TargetError(
                f"{place}: exists and is not a graphq artifact ({MANIFEST} is missing); it is not overwritten"
            )
        raise TargetError(
            f"{place}: {MANIFEST} is not the manifest of a graphq artifact with its files; it is not overwritten"
        )
    own = {place / name for name in (MANIFEST, *listed)}
    folders = {parent for file in own for parent in file.parents}
    for found in sorted(place.rglob("*")):
        if found.is_symlink() or found not in (folders if found.is_dir() else own):
            raise TargetError(
                f"{place}: holds {found.relative_to(place)}, which graphq did not write; it is not overwritten"
            )


def own_files(directory: Path) -> frozenset[str] | None:
    """The files that an artifact lists as its own, its manifest left out; None where that is not an artifact's."""
    try:
        found: Any = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if found["graphq"] != FORMAT or not isinstance(found["target"], str):
            return None
        names = frozenset(name for name, _ in found["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return names if all(Path(name).parts and ".." not in Path(name).parts for name in names) else None


def _empty_directory(final: Path) -> Path:
    """A new directory beside ``final``, with the permissions that the user's umask gives."""
    while True:
        made = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
        with contextlib.suppress(FileExistsError):
            made.mkdir()
            return made


def _exchange(new: Path, old: Path) -> None:
    """``new`` and ``old`` change places, in one step where the system can."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        done = False
    if not done:  # two steps: between them the old directory stands beside its place
        aside = new.with_name(f"{new.name}.old")
        old.rename(aside)
        new.rename(old)
        aside.rename(new)
