"""Where quantizers stand so that a consumer runs a graph in integers: quantizer placement.

A consumer's table (``graphq.spec.profile``) says which ops it runs in integers, of which types, and which of them leave
the grid of what they read as it is. Chains that it runs as one op are one unit; which units run in integers says
``graphq.ir.integer_units``. Tensors that have to share a scale are the connected components of a graph; at a border
between types a tensor is quantized anew, and so is an operand that an op which leaves grids alone does not take as it
is.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, final

from torch import fx

from graphq.capture.source import source_of
from graphq.ir.integer_units import UnitGraph, integer_units, takes_weight
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.op_kinds import INPUT, gives_no_negatives
from graphq.ir.units import WITH_WEIGHT, Unit, module_of
from graphq.ir.views import Op, Param, Recurrence, ops_of, view
from graphq.spec.activations import ActivationRule, rule_for
from graphq.spec.formats import Format, Int, codes_of, same_codes, with_codes
from graphq.spec.plan import Plan
from graphq.spec.profile import FixedGrid, Grid, OpTypes, Profile
from graphq.spec.quant import Quant, powers_of_two

FALLEN: Final = "the fallback keeps it float"


@final
@dataclass(frozen=True)
class Quantizer:
    """A tensor that is quantized and dequantized on a grid: for these ``readers``, or (None) for all that read it.

    ``again``: it is quantized already for all, and for these readers once more. ``moved``: all that it holds was on
    the grid before. ``name``, ``role``: of what gives or reads it, and which of its tensors it is.
    """

    x: Op
    readers: tuple[Op, ...] | None
    grid: Grid
    name: str
    role: str
    again: bool = False
    moved: bool = False


@final
@dataclass(frozen=True)
class Placement:
    """All quantizers and the units that run in integers with their types, in graph order; lines for the report on what
    could not be had; and why the other units that compute floats from data stay float.
    """

    quantizers: tuple[Quantizer, ...]
    integer: tuple[tuple[Unit, OpTypes], ...]
    notes: tuple[str, ...]
    why_float: Mapping[Unit, str]

    def tensors(self) -> dict[str, int]:
        """How many tensors that are no constants have which type, the last where there are several."""
        types = {one.x: str(one.grid.quant) for one in self.quantizers if not isinstance(one.x, Param)}
        return dict(Counter(types.values()))

    def summary(self, profile: str) -> list[str]:
        """Lines on all: how many tensors are quantized, how many ops run in integers, how many stay float and why."""
        ops = Counter(unit.kind for unit, _ in self.integer if not unit.gives_gates)
        kept: dict[tuple[str, str], list[Unit]] = {}
        for unit in (unit for unit in self.why_float if not unit.gives_gates):
            kept.setdefault((unit.kind, self.why_float[unit]), []).append(unit)
        lines = [f"quantized tensors between ops: {_counted(self.tensors())}", f"ops in integers: {_counted(ops)}"]
        floats = [f"ops in float: {_named(units)}: {reason}" for (_, reason), units in kept.items()]
        return [f"{profile}: {line}" for line in (*lines, *floats)]


def _named(units: Sequence[Unit]) -> str:
    """How many of which kind; recurrences, which no consumer has in integers, by the names of their layers."""
    named = ", ".join(dict.fromkeys(module_of(unit.first) for unit in units if isinstance(unit.first, Recurrence)))
    return f"{len(units)} {units[0].kind}" + (f" ({named})" if named else "")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


@final
@dataclass(frozen=True)
class Raised:
    """What a fallback decided, by the names of nodes: the types of tensors whatever the rules say, those of what other
    ops give, which they keep whatever they read, and first ops of units that stay float.
    """

    tensors: Mapping[str, Int] = field(default_factory=dict[str, Int])
    given: Mapping[str, Int] = field(default_factory=dict[str, Int])
    floats: frozenset[str] = frozenset()


NOTHING: Final = Raised()


def place(
    gm: fx.GraphModule, profile: Profile, rules: Sequence[ActivationRule] = (), raised: Raised = NOTHING
) -> Placement:
    """The quantizers that ``profile`` wants in a graph whose layers have decisions.

    ``rules``: what tensors are quantized to, or kept float; without any, to the profile's default. ``raised``: what a
    fallback decided; names that the graph has not mean nothing.
    """
    return _Placer(gm, profile, rules, raised).place()


@final
class _Placer:
    """The state of one placement."""

    def __init__(self, gm: fx.GraphModule, profile: Profile, rules: Sequence[ActivationRule], raised: Raised) -> None:
        self.graph = UnitGraph(gm, profile)
        self.profile = profile
        self.rules = rules
        self.raised = {op: t for op in self.graph.order if (t := raised.tensors.get(op.node.name)) is not None}
        self.given = {op: t for op in self.graph.order if (t := raised.given.get(op.node.name)) is not None}
        kept = {op: FALLEN for op in self.graph.order if op.node.name in raised.floats}
        found = integer_units(self.graph, rules, kept)
        self.active, self.why_float = found.units, found.why_float
        self.keeps = {unit for unit in found.units if self.graph.rule(unit).output == "same"}
        self.moved = {output for unit in self.keeps for output in unit.outputs}  # what was on its grid before
        self.notes = dict.fromkeys(found.notes)
        # The tensors that all read quantized, and those that some read so, with these readers.
        self.everywhere: dict[Op, None] = {}
        self.edges: dict[Op, list[Op]] = {}
        for unit in self.active:
            for reader, x in unit.edges:
                self.edges.setdefault(x, []).append(reader)
            if self.graph.rule(unit).output != "optional":
                self.everywhere |= dict.fromkeys(unit.outputs)
        self.tensors = [*self.graph.in_order({*self.everywhere, *self.edges})]
        self.apart: set[tuple[Unit, Op]] = set()  # operands of ops that keep grids that are brought to the op's own
        self.first: dict[Op, Op] = {}
        self.raised_roots: set[Op] = set()
        self.quants: dict[Op, Quant] = {}  # by a group's first tensor
        self.types: dict[Unit, OpTypes] = {}

    def place(self) -> Placement:
        while True:
            self._group()
            self._choose_types()
            apart = self._misfits() - self.apart
            if not apart:
                break
            self.apart |= apart
        self._tell_of_types()
        return Placement(
            tuple(self._quantizers()),
            tuple((unit, self.types[unit]) for unit in self.active),
            tuple(self.notes),
            self.why_float,
        )

    # -- which tensors share a grid, of which type

    def _group(self) -> None:
        """Each tensor's group has a first tensor, and a quant: what is asked for, or else the default."""
        import networkx as nx

        graph: nx.Graph[Op] = nx.Graph()
        for unit in self.active:
            if unit in self.keeps:
                graph.add_edges_from((unit.outputs[0], output) for output in unit.outputs)
                graph.add_edges_from((x, unit.outputs[0]) for _, x in unit.edges if (unit, x) not in self.apart)
        source = source_of(self.graph.gm)
        inputs = [op for op in ops_of(self.graph.gm) if op.node.op == "placeholder"]
        given = next(node for node in self.graph.gm.graph.nodes if node.op == "output").args[0]
        for pair in source.caches:
            past = inputs[[i.name for i in source.inputs].index(pair.past)]
            graph.add_edge(past, view(given[list(source.outputs).index(pair.present)]))
        self.first = {}
        for component in nx.connected_components(graph):
            self.first |= dict.fromkeys(component, min(component, key=self.graph.order.__getitem__))
        self.quants = {}
        for x in self.tensors:
            if self._root(x) not in self.quants:
                self.quants[self._root(x)] = self._asked_of(self._root(x))
        self.raised_roots = {self._root(x) for x in self.raised}
        for x, format in self.raised.items():
            if self._root(x) in self.quants:
                self._retype(x, format)

    def _root(self, x: Op) -> Op:
        return self.first.get(x, x)

    def _format(self, x: Op) -> Format:
        return self.quants[self._root(x)].format

    def _retype(self, x: Op, format: Format) -> None:
        quant = self.quants[self._root(x)]
        self.quants[self._root(x)] = replace(quant, format=with_codes(quant.format, format))

    def _choose_types(self) -> None:
        """Each unit has one of its table's combinations, and what it gives is of that type."""
        for _ in range(2):  # an op may give what one in front of it reads: caches, and what shares a grid
            for unit in self.active:
                if unit in self.keeps:
                    self.types[unit] = self._kept_types(unit)
                    continue
                self.types[unit] = types = self._best_types(unit)
                for output in unit.outputs:
                    if output in self.everywhere and not same_codes(self._format(output), types.output):
                        self._retype(output, types.output)

    def _kept_types(self, unit: Unit) -> OpTypes:
        """The combination of a unit that keeps grids: that of its group, if its row has it."""
        rule, output = self.graph.rule(unit), unit.outputs[0]
        format = self._format(output)
        found = next((row for row in (*rule.types, *rule.also) if same_codes(row.output, format)), None)
        if found is None and all((unit, x) in self.apart for _, x in unit.edges):
            found = rule.types[0]
            self._retype(output, found.output)
        return found or rule.types[0]

    def _misfits(self) -> set[tuple[Unit, Op]]:
        """The operands of ops that keep grids that cannot share the op's: it does not run in their type, or they are
        given in another than the group has.
        """
        found: set[tuple[Unit, Op]] = set()
        for unit in self.keeps:
            if not same_codes(self.types[unit].output, self._format(unit.outputs[0])):
                found |= {(unit, x) for _, x in unit.edges}
            for _, x in unit.edges:
                giver = self.graph.producer.get(x)
                if giver is None or giver not in self.types or giver in self.keeps or x not in self.everywhere:
                    continue
                if not same_codes(self.types[giver].output, self._format(x)):
                    found.add((unit, x))
        return found

    def _asked_of(self, x: Op) -> Quant:
        """What ``x`` is quantized to: as is asked for, as what reads it wants it, or the default."""
        if (asked := self._asked(x)) is not None:
            return asked
        own = (self._own_input(reader) for reader in x.users)
        return next((quant for quant in own if quant is not None), self.profile.activation())

    def _asked(self, x: Op) -> Quant | None:
        """What its layer's plan says of a tensor, or a rule."""
        unit = self.graph.producer.get(x)
        plan = unit.first.node.meta.get(PLAN) if unit is not None else None
        if isinstance(plan, Plan) and plan.output is not None:
            return plan.output
        kind, module = (unit.kind, module_of(unit.ops[-1])) if unit is not None else (INPUT, "")
        found = rule_for(self.rules, kind, module)
        return None if found is None else found.quant

    def _own_input(self, reader: Op) -> Quant | None:
        """What a layer's plan says of its input."""
        plan = reader.node.meta.get(PLAN)
        return plan.input if isinstance(plan, Plan) else None

    # -- which types an op has

    def _best_types(self, unit: Unit) -> OpTypes:
        """The combination that fits best: what a fallback decided; what is asked for of its output, where it is no
        layer with an input of its own; then most of its inputs' types, its output's, and the preferred one.
        """
        rule, plan = self.graph.rule(unit), unit.first.node.meta.get(PLAN)
        weight = plan.weight if isinstance(plan, Plan) and unit.kind in WITH_WEIGHT else None
        rows = [row for row in rule.types if weight is None or row.weight is None or takes_weight(row.weight, weight)]
        if self._wants_zero_points_of_0(unit):
            rows = [row for row in rows if not any(isinstance(f, Int) and not f.symmetric for f in row.inputs)] or rows
        own = self._own_input(unit.first) if unit.kind in WITH_WEIGHT else None
        is_raised = [self._root(x) in self.raised_roots for _, x in unit.edges]
        wanted = [
            self._format(x) if own is None or above else own.format
            for (_, x), above in zip(unit.edges, is_raised, strict=True)
        ]
        outputs = [output for output in unit.outputs if self._root(output) in self.quants]
        asked = [quant for output in unit.outputs if (quant := self._asked(output)) is not None]
        decided = self.given | self.raised

        def score(row: OpTypes) -> tuple[int, ...]:
            fits = [same_codes(row.input(i), format) for i, format in enumerate(wanted)]
            raised = sum(fit for fit, is_raised in zip(fits, is_raised, strict=True) if is_raised)
            raised += sum(same_codes(row.output, decided[output]) for output in outputs if output in decided)
            as_asked = 0 if own is not None else sum(same_codes(row.output, quant.format) for quant in asked)
            given = sum(same_codes(row.output, self._format(output)) for output in outputs)
            return raised, as_asked, sum(fits) + given, sum(fits)

        return max(rows, key=score)

    def _wants_zero_points_of_0(self, unit: Unit) -> bool:
        """Whether a unit's operands need symmetric types: they may be negative, and their zero points have to be 0."""
        return self.graph.rule(unit).zero_points == "zero" and not all(self._is_from_0(x) for _, x in unit.edges)

    def _is_from_0(self, x: Op) -> bool:
        unit = self.graph.producer.get(x)
        if unit in self.keeps:
            return all(self._is_from_0(operand) for _, operand in unit.edges)
        return unit is not None and gives_no_negatives(unit.ops[-1])

    def _tell_of_types(self) -> None:
        """Notes of what was asked for and is not had."""
        for unit in self.active:
            types = self.types[unit]
            for output in unit.outputs:
                asked = self._asked(output)
                is_own = unit not in self.keeps and output in self.everywhere and output not in self.raised
                if is_own and asked is not None and not same_codes(asked.format, types.output):
                    note = f"{unit.name}: gives {types.output}, not {asked.format}, on {self.profile.name}"
                    self.notes[note] = None
            own = self._own_input(unit.first) if unit.kind in WITH_WEIGHT else None
            if own is not None and self._wants_zero_points_of_0(unit) and not same_codes(own.format, types.inputs[0]):
                note = f"{unit.name}: reads {types.inputs[0]}, not {own.format}"
                self.notes[f"{note}: {self.profile.name} multiplies codes with zero points of 0 alone"] = None

    # -- the quantizers

    def _borders(self) -> dict[tuple[Op, Op], tuple[object, Quant]]:
        """The tensors that readers want on another grid than the tensor's own, (reader, tensor): the key of that grid,
        and its quant.
        """
        found: dict[tuple[Op, Op], tuple[object, Quant]] = {}
        for unit in self.active:
            for position, (reader, x) in enumerate(unit.edges):
                quant = self.quants[self._root(x)]
                if unit in self.keeps:
                    if (unit, x) in self.apart:
                        root = self._root(unit.outputs[0])
                        found[reader, x] = root, self.quants[root]
                    continue
                own = self._own_input(reader)
                wanted = self.types[unit].input(position)
                if own is not None and self._root(x) not in self.raised_roots:
                    wanted = wanted if self._wants_zero_points_of_0(unit) else own.format
                if not same_codes(quant.format, wanted):
                    changed = replace(quant, format=with_codes(quant.format, wanted))
                    found[reader, x] = (x, changed.format), changed
        return found

    def _fixed_grids(self, borders: Iterable[object]) -> dict[Op, FixedGrid]:
        """The grids that the consumer wants of groups, where all that is in a group has the same."""
        found: dict[Op, FixedGrid | None] = dict.fromkeys(op for op in borders if isinstance(op, Op))
        for x in self.tensors:
            unit, root = self.graph.producer.get(x), self._root(x)
            if unit is None or x in self.moved:
                continue
            rule = self.graph.rule(unit) if unit in self.types else None
            grid = None if rule is None else rule.grids.get(str(codes_of(self.quants[root].format)))
            found[root] = grid if found.setdefault(root, grid) == grid else None
        return {root: grid for root, grid in found.items() if grid is not None}

    def _quantizers(self) -> Iterator[Quantizer]:
        """All quantizers: of each tensor the one for all, or for those who take it as it is, then those at borders."""
        borders = self._borders()
        fixed = self._fixed_grids(key for key, _ in borders.values())
        grids: dict[object, Grid] = {}

        def grid_of(key: object, quant: Quant) -> Grid:
            quant = powers_of_two(quant) if self.profile.power_of_two else quant
            known = fixed.get(key) if isinstance(key, Op) else None
            return grids.setdefault(key, Grid(len(grids), quant, known))

        for x in self.tensors:
            read = self.edges.get(x, [])
            readers = [reader for reader in read if (reader, x) not in borders]
            if x in self.everywhere or readers:
                name, role = self._name(x, readers or read)
                reading = None if x in self.everywhere else tuple(readers)
                grid = grid_of(self._root(x), self.quants[self._root(x)])
                yield Quantizer(x, reading, grid, name, role, moved=x in self.moved)
            others: dict[object, tuple[Quant, list[Op]]] = {}
            for reader in read:
                if (reader, x) in borders:
                    key, quant = borders[reader, x]
                    others.setdefault(key, (quant, []))[1].append(reader)
            for key, (quant, reading) in others.items():
                name, role = self._name(x, reading, as_input=True)
                yield Quantizer(x, tuple(reading), grid_of(key, quant), name, role, again=x in self.everywhere)
        for unit in self.active:  # gains of norms
            weight = self.types[unit].weight
            if weight is None or unit.kind in WITH_WEIGHT:
                continue
            names = {argument.name for argument in unit.first.schema()}
            gain = Param.of(unit.first.argument("weight")) if "weight" in names else None
            if gain is not None:
                yield Quantizer(gain, (unit.first,), grid_of((gain, unit.first), weight), gain.fqn, "value")

    def _name(self, x: Op, readers: Sequence[Op], as_input: bool = False) -> tuple[str, str]:
        """Whose tensor ``x`` is: the input of the layer that alone reads it, or the output of what gives it."""
        layers = [str(reader.node.meta[LAYER]) for reader in readers if reader.node.meta.get(LAYER)]
        if isinstance(x, Param):
            return x.fqn, "value"
        unit = self.graph.producer.get(x)
        gives = unit is not None and unit.kind in WITH_WEIGHT and unit.first.node.meta.get(LAYER)
        if layers and (as_input or not gives):
            return layers[0], "input"
        if unit is None or unit.kind == INPUT:
            return x.node.name, "value"
        return unit.name, "output"
