"""Code that a model directory brings along (``auto_map`` in its configuration), which runs only on demand."""

import json
from pathlib import Path
from typing import Any


def has_code(path: Path) -> bool:
    """Whether the configuration of the directory names classes of its own code."""
    try:
        config: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("auto_map"))


def class_of_code(path: Path, config: Any, name: str) -> Any:
    """The class of this name that the directory's own code has; None where ``auto_map`` does not name it.

    The code is run. It may raise anything.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    for reference in dict(getattr(config, "auto_map", None) or {}).values():
        if isinstance(reference, str) and reference.rpartition(".")[2] == name:
            return get_class_from_dynamic_module(reference, str(path), local_files_only=True)
    return None
