"""Passes in order. A pass is one named rewriting of a graph; a pipeline runs them and checks what they promise."""

import hashlib
import logging
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from graphq.errors import GraphqError, PassError
from graphq.ir.layers import LAYER, Site
from graphq.ir.text import dump
from graphq.ir.views import Op
from graphq.state import location

Batches = Iterable[tuple[Tensor, ...]]  # calibration inputs of this graph, complete and in its order
log = logging.getLogger("graphq")


@final
@dataclass(frozen=True)
class Invariant:
    """A property of graphs. ``broken`` gives None where it holds, else the reason why it does not."""

    name: str
    broken: Callable[[fx.GraphModule], str | None]


class Pass(ABC):
    """One named rewriting of a graph. Concrete passes are final, frozen dataclasses; their fields are their options."""

    name: ClassVar[str]
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()

    @abstractmethod
    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        """Rewrite ``gm`` in place; return the number of changes, 0 if it was left alone."""


@final
@dataclass(frozen=True)
class Pipeline:
    """``passes`` in order. ``strict`` fingerprints text and tensors, and fails when a pass reports a false count."""

    passes: Sequence[Pass]
    strict: bool = False
    after: Callable[[Pass, fx.GraphModule], None] | None = None

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> dict[str, int]:
        """Run every pass; the number of changes of each by its name.

        Raises ``PassError`` for a broken promise, and for whatever a pass raises that is no error of graphq's.
        """
        counts: dict[str, int] = {}
        for step in self.passes:
            _check(gm, step.requires, f"{step.name} needs")
            before = fingerprint(gm) if self.strict else ""
            count = _run(step, gm, batches)
            _check(gm, (well_formed, *step.ensures), f"{step.name} promises")
            if count:
                gm.recompile()
            if self.strict and (fingerprint(gm) != before) != (count > 0):
                found = "the same" if count else "another"
                raise PassError(f"{step.name} reports {count} changes, but the graph is {found}")
            log.info("%s: %d", step.name, count)
            counts[step.name] = counts.get(step.name, 0) + count
            if self.after is not None:
                self.after(step, gm)
        return counts


def _run(step: Pass, gm: fx.GraphModule, batches: Batches | None) -> int:
    try:
        return step.run(gm, batches)
    except (GraphqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        layer = _layer_at(error)
        where = f"{step.name}: {layer}" if layer else step.name
        raise PassError(f"{where}: {type(error).__name__}: {first}") from error


def _layer_at(error: Exception) -> str:
    """The layer that a pass was at: that of a node, or a use of a weight, in the innermost frame that has one."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            part = getattr(value, "site", value)
            node = part.op.node if isinstance(part, Site) else part.node if isinstance(part, Op) else part
            if isinstance(node, fx.Node) and LAYER in node.meta:
                found = str(node.meta[LAYER])
    return found


def _check(gm: fx.GraphModule, invariants: Iterable[Invariant], who: str) -> None:
    for invariant in invariants:
        reason = invariant.broken(gm)
        if reason is not None:
            raise PassError(f"{who} {invariant.name}: {reason}")


def _malformed(gm: fx.GraphModule) -> str | None:
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]  # the graph follows
    body = False
    for node in gm.graph.nodes:
        if node.op == "placeholder" and body:
            return f"input {node.name} stands behind nodes that compute"
        body = body or node.op not in ("placeholder", "get_attr")
        if node.op != "output" and node.meta.get("val") is None and node.users:
            return f"{node.name} does not know its val"
    return None


well_formed = Invariant("a well-formed graph", _malformed)


def fingerprint(gm: fx.GraphModule, contents: bool = True) -> str:
    """A digest of the graph's text, its annotations and the bytes of its tensors; without ``contents``, of the places
    where these lie, which passes leave to tensors that they do not change.
    """
    digest = hashlib.sha256(dump(gm).encode())
    for node in gm.graph.nodes:
        digest.update(repr(sorted((k, repr(v)) for k, v in node.meta.items() if k.startswith("graphq."))).encode())
    for name, tensor in sorted(gm.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not contents:
            digest.update(f"{location(tensor)}".encode())
        elif not isinstance(tensor, FakeTensor):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
