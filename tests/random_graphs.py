"""Random models, and random orders of the passes that must leave their functions alone.

``python -m tests.random_graphs SEED`` prints the model of a seed, its graph, its passes and what each does.
"""

import random
import sys
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from graphq.capture.modules import capture_module
from graphq.ir.pipeline import Pass, Pipeline
from graphq.ir.text import dump
from graphq.passes.annotate import Annotate
from graphq.passes.awq import AWQ
from graphq.passes.blockwise import Blockwise
from graphq.passes.calibrate import Calibrate
from graphq.passes.equalize import Equalize
from graphq.passes.fold_batch_norm import FoldBatchNorm
from graphq.passes.fold_norms import FoldNorms
from graphq.passes.observe import Observe
from graphq.passes.rotate import Rotate
from graphq.passes.rotate_online import RotateOnline
from graphq.passes.smooth_quant import SmoothQuant
from graphq.passes.stop_observing import StopObserving
from graphq.passes.untie import Untie
from graphq.pipelines import canonical_passes
from graphq.spec.match import parse_match
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from tests.lifted import copied, run_lifted
from tests.random_parts import (
    MLP,
    Along,
    Attention,
    Convolved,
    Dice,
    Experts,
    Norm,
    Part,
    Pieces,
    Project,
    Query,
    Scalars,
)

EVERYTHING = Spec((Rule(parse_match("*"), Plan(parse_quant("int8/channel")), may_match_nothing=True),))


class Block(Part):
    """A part behind a norm, beside a residual or not."""

    def __init__(self, dice: Dice, width: int, part: nn.Module) -> None:
        super().__init__(dice)
        self.norm, self.part = Norm(dice, width), part
        self.residual = self.draw("residual", "plain", "plain", "plain", "scaled", "half", "none")
        self.scale = nn.Parameter(torch.empty(width)) if self.residual == "scaled" else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(self.norm(x))
        match self.residual:
            case "scaled":
                return x + self.scale * y
            case "half":
                return 0.5 * x + y
            case "none":
                return y
            case _:
                return x + y


class Sequences(Part):
    """Blocks over tokens or vectors. ``tidy``: only such parts as a rotation can go through."""

    def __init__(self, dice: Dice) -> None:
        super().__init__(dice)
        self.width = width = self.draw("width", 8, 12, 16)
        self.inputs = self.draw("inputs", "tokens", "vectors", "state")
        self.drawn["tidy"] = dice.tidy = dice.random() < 0.6
        self.embedding = nn.Embedding(16, width) if self.inputs == "tokens" else Project(dice, 6, width)
        kinds = (Attention, MLP) if dice.tidy else (Attention, MLP, MLP, Experts, Pieces, Along, Scalars, Query)
        made: list[Block] = []
        for number in range(self.draw("blocks", 1, 2, 3, 4)):
            kind = self.draw(f"block {number}", *kinds)
            self.drawn[f"block {number}"] = kind.__name__
            if made and self.draw(f"block {number} again", False, *("again", *(False,) * 4)):
                made.append(dice.choice(made))
            else:
                made.append(Block(dice, width, kind(dice, width)))
        self.layers = nn.ModuleList(made)
        self.norm = Norm(dice, width)
        self.head = nn.Linear(width, 16, bias=False) if self.inputs == "tokens" else Project(dice, width, 6)
        if self.inputs == "tokens" and self.draw("tied head", True, False):
            self.head.weight = self.embedding.get_parameter("weight")
        self.returned = self.draw("returned", "hidden", "normed", None, None, None)
        self.name = self.draw("name", "other", "present_state")
        share(self, dice)

    def examples(self, seed: int, batch: int, sequence: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.inputs == "tokens":
            return {"x": torch.randint(0, 16, (batch, sequence), generator=generator)}
        names = ("x", "state") if self.inputs == "state" else ("x",)
        return {name: torch.randn(batch, sequence, 6, generator=generator, dtype=torch.float64) for name in names}

    def forward(self, x: Tensor, state: Tensor | None = None) -> dict[str, Tensor]:
        h = self.embedding(x)
        given: dict[str, Tensor] = {}
        if state is not None:
            h = given["joined"] = torch.cat([self.embedding(state), h], 1)
        for layer in self.layers:
            h = layer(h)
        normed = self.norm(h)
        values = {"hidden": h, "normed": normed}
        more = {self.name: values[self.returned]} if self.returned else {}
        return {"y": self.head(normed), **more}


class Images(Part):
    """Convolutions one after the other, and linears of what is left."""

    def __init__(self, dice: Dice) -> None:
        super().__init__(dice)
        self.inputs, width = "images", 4
        made: list[Convolved] = []
        for number in range(self.draw("convolutions", 1, 2, 3)):
            made.append(Convolved(dice, width, self.draw(f"width {number}", 4, 8)))
            width = made[-1].out
        self.layers = nn.Sequential(*made)
        self.flat = self.draw("flat", "mean", "mean", "flatten", "rows")
        self.inner = Project(dice, width * (36 if self.flat == "flatten" else 1), 8)
        self.bn = nn.BatchNorm1d(8) if self.flat != "rows" and self.draw("norm", True, False) else None
        self.head = MLP(dice, 8)
        self.returned = self.draw("returned", True, False, False)
        share(self, dice)

    def examples(self, seed: int, batch: int, sequence: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(batch, 4, 6, 6, generator=generator, dtype=torch.float64)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.layers(x)
        match self.flat:
            case "mean":
                y = h.mean((2, 3))
            case "flatten":
                y = h.flatten(1)
            case _:
                y = h.flatten(2).transpose(1, 2)
        y = self.inner(y)
        y = self.head(y if self.bn is None else self.bn(y))
        return {"y": y, "h": h} if self.returned else {"y": y}


def share(model: Part, dice: Dice) -> None:
    """Some pairs of parameters of one shape are one, or parts of one storage; of square weights, each other's
    transpose, too.
    """
    found: dict[tuple[int, ...], list[tuple[nn.Module, str]]] = {}
    for module in dict.fromkeys(model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Project | Norm) and parameter.dim():
                found.setdefault(tuple(parameter.shape), []).append((module, name))
    pairs = [(a, b) for group in found.values() for a in group for b in group if a is not b]
    for number in range(model.draw("shared", 0, 0, *((0, 0, 0, 1) if dice.tidy else (1, 2))) if pairs else 0):
        (a, left), (b, right) = dice.choice(pairs)
        if a.get_parameter(left) is b.get_parameter(right):
            continue
        way = model.draw(f"share {number}", "tied", "tied", "views", "transposed")
        size = a.get_parameter(left).shape
        if way == "views" and not {"bias"} & {left, right}:
            storage = torch.randn(size[0] + 2, *size[1:])
            setattr(a, left, nn.Parameter(storage[: size[0]]))
            setattr(b, right, nn.Parameter(storage[2:]))
        elif way == "transposed" and len(size) == 2 and size[0] == size[1]:
            setattr(b, right, nn.Parameter(a.get_parameter(left).detach().T))
        else:
            setattr(b, right, a.get_parameter(left))


def random_model(seed: int) -> Any:
    """The model of this seed, in float64 and evaluation mode."""
    dice = Dice(seed)
    model = Images(dice) if dice.random() < 0.25 else Sequences(dice)
    generator = torch.Generator().manual_seed(seed)
    old: dict[int, torch.UntypedStorage] = {}
    new: dict[int, Tensor] = {}  # each storage once: tied parameters stay tied, and views of one its views
    for module in dict.fromkeys(model.modules()):
        for name, held in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not held.is_floating_point():
                continue
            storage = held.untyped_storage()
            if storage._cdata not in new:
                old[storage._cdata] = storage  # lives on, so that no other has its address
                count = storage.nbytes() // held.itemsize
                new[storage._cdata] = numbers(count, held, name, generator)
            made = new[storage._cdata].as_strided(held.shape, held.stride(), held.storage_offset())
            if isinstance(held, nn.Parameter):
                held.data = made
            else:
                setattr(module, name, made)
    return model.eval()


def numbers(count: int, held: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """What a parameter holds: a matrix keeps magnitudes, with some channels larger; a variance is positive."""
    made = torch.randn(count, generator=generator, dtype=torch.float64)
    if "var" in name:
        return made.square() + 0.5
    if held.dim() < 2:
        return made.sign() * (0.5 + made.abs()) if name == "weight" else made
    fan_in = max(held[0].numel(), 2)
    large = 1 + 9 * (torch.arange(count) % held.shape[-1] == 1)
    return made * large / fan_in**0.5


def random_passes(seed: int, note: Callable[[str], None]) -> list[Pass]:
    """Passes in an order that the compiler has, or in another one: each leaves the function alone."""
    dice = random.Random(f"passes {seed}")
    some = lambda passes, share: [step for step in passes if dice.random() < share]  # noqa: E731
    canonical = canonical_passes()
    turns = [f"r{i}" for i in (1, 2, 3, 4) if dice.random() < 0.6]
    size = dice.choice([None, None, 4, 8])
    kind: Any = dice.choice(["random_hadamard", "hadamard", "orthogonal"])
    chosen = [turns] if dice.random() < 0.5 else [[turn] for turn in turns]
    rotations: list[Pass] = []
    for own in chosen:
        r1, r2, r3, r4 = (f"r{i}" in own for i in (1, 2, 3, 4))
        rotations += [Rotate(r1, r2, kind, size, seed, note)] if r1 or r2 else []
        rotations += [RotateOnline(r3, r4, size, note)] if r3 or r4 else []
    prepared = [*some([FoldBatchNorm(), Untie(), FoldNorms(note)], 0.95 if rotations else 0.7), *rotations]
    scaled: list[Pass] = []
    for kind in dice.choices(["equalize", "smooth", "awq"], k=dice.choice([0, 1, 1, 2])):
        where: Any = dice.choice(["fold", "fold", "fold-or-multiply", "multiply"])
        step: Any
        match kind:
            case "equalize":
                scaled.append(Equalize(rounds=dice.choice([1, 20]), note=note))
                continue
            case "smooth":
                alpha: Any = dice.choice([dice.random(), "search"])
                step = SmoothQuant(alpha=alpha, statistic=dice.choice(["magnitude", "range"]), where=where, note=note)
            case _:
                step = AWQ(
                    n_grid=4,
                    duo=dice.choice([True, False, None]),
                    clip=False,
                    power=dice.choice([2, 4]),
                    where=where,
                    note=note,
                )
        walk = [Observe((step,), ranges=False), Calibrate(), step, StopObserving()]
        scaled += [Blockwise(tuple(walk), dice.choice(["quantized", "float"]))] if dice.random() < 0.3 else walk
    if dice.random() < 0.2:
        dice.shuffle(prepared)
    annotate: list[Pass] = [Annotate(EVERYTHING)]
    later = dice.random() < 0.2
    return [*canonical, *annotate, *scaled, *prepared] if later else [*canonical, *prepared, *annotate, *scaled]


@final
class Trial:
    """The model of a seed, its graph, and what the passes of this seed make of it."""

    def __init__(self, seed: int) -> None:
        self.model = random_model(seed)
        self.examples = self.model.examples(seed, 2, 5)
        self.source = capture_module(self.model, self.examples)
        self.gm = copied(self.source)
        self.notes: list[str] = []
        self.passes = random_passes(seed, self.notes.append)
        self.seed = seed
        self.counts: dict[str, int] = {}
        self.batches = [tuple(self.model.examples(seed + 1 + i, 3, 4).values()) for i in range(2)]

    def run(self, after: Callable[[Pass, fx.GraphModule], None] | None = None) -> None:
        """Run the passes one by one; what each changed is in ``counts``, by what it does."""
        for step in self.passes:
            strict = not isinstance(step, Blockwise)  # it counts observers that are gone again
            with torch.no_grad():
                counts = Pipeline([step], strict, after).run(self.gm, self.batches)
            turns = [turn for turn in ("r1", "r2", "r3", "r4") if getattr(step, turn, False)]
            name = turns[0] if len(turns) == 1 else step.name
            self.counts[name] = self.counts.get(name, 0) + sum(counts.values())

    def error(self) -> float:
        """The largest difference of an output from the source's, of its largest magnitude; inputs of other sizes."""
        inputs = tuple(self.model.examples(self.seed + 9, 4, 6).values())
        pairs = zip(run_lifted(self.source, inputs), run_lifted(self.gm, inputs), strict=True)
        return max(float((new - old).abs().max() / old.abs().max().clamp(min=1e-300)) for old, new in pairs)


def tell(seed: int) -> None:
    """Print the trial of this seed, pass by pass."""
    trial = Trial(seed)
    print(trial.model)
    print(dump(trial.source))

    def after(step: Pass, gm: fx.GraphModule) -> None:
        is_observed = any(node.op == "call_module" for node in gm.graph.nodes)  # observers hold nodes: no copies
        print(step.name, "" if is_observed else f"error {trial.error():.2e}")

    try:
        trial.run(after)
    finally:
        print(trial.counts, *trial.notes, sep="\n    ")


if __name__ == "__main__":
    tell(int(sys.argv[1]))
