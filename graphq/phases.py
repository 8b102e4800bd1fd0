"""What a compile took: the seconds of its phases, and the most memory by the end of each."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final


@final
@dataclass(frozen=True)
class Phase:
    """A part of a compile: how long it took, and the most memory that the process had held by its end, as far as the
    system tells.
    """

    name: str
    seconds: float
    peak_nbytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``phase``, ``seconds``, ``peak_bytes``."""
        return {"phase": self.name, "seconds": round(self.seconds, 3), "peak_bytes": self.peak_nbytes}


@final
class PhaseTimer:
    """The phases of a compile so far; those of one name are one."""

    def __init__(self) -> None:
        self._found: dict[str, Phase] = {}
        self._start = time.perf_counter()

    def end(self, name: str) -> None:
        """What has passed since the last end belongs to this phase."""
        now = time.perf_counter()
        before = self._found[name].seconds if name in self._found else 0.0
        self._found[name] = Phase(name, before + now - self._start, peak_nbytes())
        self._start = now

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(self._found.values())


def peak_nbytes() -> int | None:
    """The most memory that this process has held so far, files that it read included; None where nothing tells."""
    try:  # Linux's resource usage begins with what the process was forked from held
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found << 10
