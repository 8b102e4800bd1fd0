"""How much memory there is, how much a user allows, and whether a model fits into it."""

import re
import shutil
from pathlib import Path
from typing import Final

from graphq.errors import SpecError, TargetError

_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_STORED: Final = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_BESIDE: Final = 1 << 30  # bytes of Python, torch and the graph


def bytes_of(memory: int | str) -> int:
    """A size such as ``8GiB``, ``500 MB`` or a number of bytes. Raises ``SpecError`` for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(memory).strip())
    if found is None or found[2].upper() not in _UNITS:
        raise SpecError(f"memory: {memory!r} is not a size, such as 8GiB or 500MB")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < 1:
        raise SpecError(f"memory: {memory!r} is no memory")
    return size


def free_bytes() -> int | None:
    """What the system could give this process, files that it keeps in memory counted as free; None where it does not
    tell.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def in_words(size: int) -> str:
    """A size in GiB, or MiB."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{max(size >> 20, 1)} MiB"


def check_directory(path: Path, itemsize: int, why: str, memory: int | None, elements: int | None = None) -> None:
    """Raises ``SpecError`` if the model in a directory, held whole in elements of ``itemsize`` bytes for the reason
    ``why``, takes more than ``memory``; by default, than what is free. ``elements``: how many there are, where the
    sizes of files do not tell.
    """
    limit = free_bytes() if memory is None else memory
    needed = (elements_of(path) if elements is None else elements) * itemsize
    if limit is not None and needed + (_BESIDE if needed > _BESIDE else 0) > limit:
        there = f"{in_words(limit)} are {'free' if memory is None else 'allowed'}"
        raise SpecError(
            f"memory: {why}, which holds the whole model: {in_words(needed)} and more, and {there} (memory=, --memory)"
        )


def check_disk(place: Path, needed: int) -> None:
    """Raises ``TargetError`` if the disk that ``place`` is on, or will be, has less than ``needed`` bytes left."""
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    left = shutil.disk_usage(there).free
    if needed > left:
        raise TargetError(f"{place}: at least {in_words(needed)} will be written, and {in_words(left)} are free there")


def elements_of(path: Path) -> int:
    """The elements of the tensors in a directory's safetensors; what cannot be read counts nothing."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in path.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                narrowest = next((opened.get_slice(name).get_dtype() for name in opened.keys()), "F32")  # noqa: SIM118
            count += file.stat().st_size // _STORED.get(narrowest, 1)
        except (OSError, SafetensorError):
            continue
    return count
