"""The aten ops that a torch artifact may hold, from ``allowed_ops.txt``: one row an op, its name and its overloads.

They are what capture makes of the supported families and of what modules plausibly compute; a name starts with an
underscore where capture gives just this op. Each checks its own arguments, as ``tests/runtime/test_allowed_ops.py``
tries with tensors between unreadable pages; those that do not are called through ``graphq.runtime.checked_ops``. There
is nothing that changes its arguments, none that reads files or uninitialized memory, none of the private ops behind
others (``_sparse_*``, ``_weight_int4pack_mm``, backends'), whose arguments torch checks in front of them, and no random
numbers but those of dropout, which is off in an artifact.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Final

_ROWS: Final = files("graphq.runtime").joinpath("allowed_ops.txt").read_text(encoding="utf-8").splitlines()
OVERLOADS: Final[Mapping[str, str]] = dict(row.split(" ", 1) for row in _ROWS)
