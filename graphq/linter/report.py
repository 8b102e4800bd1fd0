"""What lint says of a model: each op with how it will run, or ran; what keeps it from integers; warnings."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

Runs = Literal["integers", "weights", "float"]


@final
@dataclass(frozen=True)
class Problem:
    """What is in the way of integers: the tensor, the rule that it breaks, and what mends it."""

    tensor: str
    reason: str
    fix: str


@final
@dataclass(frozen=True)
class LintedOp:
    """One op: how it will run by the profile, and how it ran where that was seen.

    runs, ran: in ``integers``; in float with a ``weights`` operand read as it is stored; in ``float``.
    counted: whether the profile has it in integers, or wants all ops so.
    nodes: those that run as this op, its own first.
    """

    name: str
    kind: str
    runs: Runs
    counted: bool
    problem: Problem | None = None
    ran: Runs | None = None
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.problem is None:
            return f"{self.name} ({self.kind}): {self.runs}"
        p = self.problem
        return f"{self.name} ({self.kind}): {p.tensor}: {p.reason}; {p.fix}"


@final
@dataclass(frozen=True)
class LintWarning:
    """What runs, and not as one might think: the op or tensors, why, and what mends it."""

    where: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; {self.fix}"


@final
@dataclass(frozen=True)
class LintReport:
    """A model against a profile.

    ops: all that compute with floats. model: what is wrong with the whole file. warnings: what runs otherwise than one
    might think. observed: the consumer that ran it, with its version; None where it did not.
    """

    path: str
    profile: str
    ops: tuple[LintedOp, ...]
    model: tuple[Problem, ...] = ()
    warnings: tuple[LintWarning, ...] = ()
    observed: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def counted(self) -> tuple[LintedOp, ...]:
        """The ops that the profile runs in integers."""
        return tuple(op for op in self.ops if op.counted)

    @property
    def findings(self) -> tuple[LintedOp, ...]:
        """The counted ops that will not run in integers, nor with their weight as it is stored."""
        return tuple(op for op in self.counted if op.runs == "float")

    @property
    def differences(self) -> tuple[LintedOp, ...]:
        """The counted ops that ran otherwise than predicted."""
        return tuple(op for op in self.counted if op.ran is not None and op.ran != op.runs)

    @property
    def ok(self) -> bool:
        """Whether all counted ops run in integers, as far as predicted and as far as seen."""
        return not (self.findings or self.model or self.differences)

    def summary(self) -> str:
        """One line: how many ops run in integers."""
        counts = Counter(op.runs for op in self.counted)
        line = f"{counts['integers']} of {len(self.counted)} ops run in integers on {self.profile}"
        if counts["weights"]:
            line += f", {counts['weights']} in float with a stored weight in integers"
        left = Counter(op.kind for op in self.ops if not op.counted)
        if left:
            kinds = ", ".join(f"{n} {kind}" for kind, n in left.most_common())
            line += f"; {left.total()} other{'s are' if left.total() > 1 else ' is'} left in float: {kinds}"
        return line

    def observation(self) -> str | None:
        """One line: how many ops ran in integers."""
        if self.observed is None:
            return None
        seen = [op for op in self.counted if op.ran is not None]
        ran = sum(op.ran == "integers" for op in seen)
        line = f"{ran} of {len(seen)} ops ran in integers in {self.observed}"
        if unseen := len(self.counted) - len(seen):
            line += f"; {unseen} left no trace in it"
        return line

    def __str__(self) -> str:
        lines = [f"{p.tensor}: {p.reason}; {p.fix}" for p in self.model]
        lines += [str(op) for op in self.findings]
        lines += [f"{op.name} ({op.kind}): ran in {op.ran}, predicted: {op.runs}" for op in self.differences]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, self.summary(), *filter(None, [self.observation()])])

    def to_json(self) -> Mapping[str, Any]:
        """The report as plain data."""
        return {
            "model": self.path,
            "profile": self.profile,
            "ops": [
                {
                    "name": op.name,
                    "kind": op.kind,
                    "counted": op.counted,
                    "runs": op.runs,
                    "ran": op.ran,
                    "tensor": op.problem.tensor if op.problem else None,
                    "reason": op.problem.reason if op.problem else None,
                    "fix": op.problem.fix if op.problem else None,
                }
                for op in self.ops
            ],
            "model_problems": [{"where": p.tensor, "reason": p.reason, "fix": p.fix} for p in self.model],
            "warnings": [{"where": w.where, "reason": w.reason, "fix": w.fix} for w in self.warnings],
            "notes": list(self.notes),
            "observed": self.observed,
            "ok": self.ok,
        }
