"""Writing a directory whole or not at all."""

import contextlib
import ctypes
import os
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Final

from graphq.errors import TargetError

MANIFEST: Final = "graphq.json"  # an artifact's description of itself
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike[str], overwrite: bool) -> Generator[Path]:
    """An empty directory beside ``path`` to write into; it becomes ``path`` when the block ends without an error.

    Raises what ``check_place`` raises. An existing directory stays untouched until the new one is complete, and is then
    replaced in one step; a process that dies leaves the one or the other. Files can be read by whoever can read the
    directory, whatever the libraries that wrote them think.
    """
    check_place(path, overwrite)
    final = Path(path).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    made = _empty_directory(final)
    try:
        yield made
        for file in made.rglob("*"):
            file.chmod(made.stat().st_mode & (0o777 if file.is_dir() else 0o666))
        if final.exists():
            if not overwrite:
                raise TargetError(f"{final}: was made by somebody else meanwhile")
            _exchange(made, final)
        else:
            made.rename(final)
            return
    finally:
        if made.exists():
            shutil.rmtree(made)


def check_place(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises ``TargetError`` if a directory cannot be written to ``path``.

    It exists and ``overwrite`` is false, it is no directory, or it holds files of others: only artifacts are replaced.
    """
    place = Path(path)
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise TargetError(f"{place}: exists and is not a directory")
    if place.exists() and not overwrite:
        raise TargetError(f"{place}: exists; choose another place, or overwrite it (--overwrite)")
    if place.exists() and any(place.iterdir()) and not (place / MANIFEST).is_file():
        raise TargetError(
            f"{place}: exists and is not a graphq artifact ({MANIFEST} is missing); it is not overwritten"
        )


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
