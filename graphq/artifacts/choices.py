"""The file beside a manifest with what algorithms chose, in safetensors' format.

Its name has another ending: servers load whatever ends in ``.safetensors`` as weights.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphq.artifacts.shards import SUFFIX, check_header, write_shards
from graphq.errors import TargetError

CHOICES_FILE: Final = "graphq.choices"


def write_choices(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """``directory`` has the file, on the disk. Raises ``TargetError`` where the disk is full or fails."""
    write_shards(directory, sorted(tensors.items()), sys.maxsize, CHOICES_FILE)
    (directory / (CHOICES_FILE + SUFFIX)).rename(directory / CHOICES_FILE)


def read_choices(directory: Path) -> dict[str, Tensor]:
    """The tensors in the file by name. Raises ``TargetError`` where it is missing or damaged."""
    path = directory / CHOICES_FILE
    if not path.is_file():
        raise TargetError(f"{path}: no such file")
    try:
        check_header(path)
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise TargetError(f"{path}: damaged or incomplete: {error}") from error
