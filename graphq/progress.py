"""How far a compile is, told to whoever listens: blocks that are done, tensors that are written."""

import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

from graphq.phases import peak_nbytes

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` steps of a kind, such as blocks, after so many seconds, in which those ``before`` were not
    done.
    """

    kind: str
    done: int
    total: int
    seconds: float
    before: int = 0

    @property
    def left(self) -> float | None:
        """The seconds that the rest will take if it goes on so; None where nothing is done."""
        made = self.done - self.before
        return self.seconds / made * (self.total - self.done) if made else None

    @property
    def is_resumed(self) -> bool:
        """Whether it is no step, but tells what another process had finished."""
        return self.before == self.done > 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the most memory so far."""
        left = None if self.left is None else round(self.left, 1)
        steps = {"progress": self.kind, "done": self.done, "total": self.total}
        return steps | {"seconds": round(self.seconds, 1), "left": left, "peak_bytes": peak_nbytes()}

    def __str__(self) -> str:
        if self.is_resumed:
            return f"{self.kind}: {self.done} of {self.total} were finished by an interrupted compile"
        peak = peak_nbytes()
        memory = "" if peak is None else f", {peak / 1e9:.2f} GB at most"
        left = "" if self.left is None or self.done == self.total else f", {self.left:.0f} s left"
        return f"{self.kind}: {self.done} of {self.total}, {self.seconds:.0f} s{left}{memory}"


_LISTENER: Final[ContextVar[Callable[[Progress], None] | None]] = ContextVar("graphq.progress", default=None)


@contextmanager
def listening(listener: Callable[[Progress], None]) -> Generator[None]:
    """``listener`` is told of all progress while it lasts."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def in_steps(kind: str, items: Collection[T], before: int = 0) -> Iterator[T]:
    """The items; each is a step that is done when the next one is asked for. ``before``: how many were done before."""
    listener, start = _LISTENER.get(), time.perf_counter()
    total = before + len(items)
    if listener is not None and before:
        listener(Progress(kind, before, total, 0.0, before))
    for done, item in enumerate(items, before):
        if listener is not None and done > before:
            listener(Progress(kind, done, total, time.perf_counter() - start, before))
        yield item
    if listener is not None and len(items):
        listener(Progress(kind, total, total, time.perf_counter() - start, before))
