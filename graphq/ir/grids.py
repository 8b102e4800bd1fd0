"""Where quantizers stand so that a consumer runs a graph in integers: quantizer placement.

A consumer's table (``graphq.spec.profile``) says which ops it runs in integers, of which types, and which of them leave
the grid of what they read as it is. Chains that it runs as one op are one unit. All units that could run in integers
are taken to do so, and those are dropped again that its table wants between integers alone and that do not stand there
(the greatest fixed point). Tensors that have to share a scale are the connected components of a graph; at a border
between types a tensor is quantized anew.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

from torch import Tensor, fx

from graphq.capture.source import source_of
from graphq.ir.effect_table import effect
from graphq.ir.effects import Copies, Moves, ReadsShape
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.op_kinds import INPUT, kind_of
from graphq.ir.units import WITH_WEIGHT, Unit, module_of, reading_data, units_of
from graphq.ir.views import Op, Param, Weighted, ops_of, view
from graphq.spec.activations import ActivationRule, rule_for
from graphq.spec.formats import Format, Int
from graphq.spec.plan import Plan
from graphq.spec.profile import FixedGrid, Grid, OpRule, OpTypes, Profile
from graphq.spec.quant import PerTensor, Quant

_OF_FLOATS: Final = ("Add", "Sub", "Mul", "Div", "MatMul", "Concat")  # whose operands have one type


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
    """All quantizers, in graph order; the units that run in integers with their types; lines for the report on what
    could not be had; and why the other units that compute floats from data stay float.
    """

    quantizers: tuple[Quantizer, ...]
    integer: tuple[tuple[Unit, OpTypes], ...]
    notes: tuple[str, ...]
    why_float: Mapping[Unit, str]

    def summary(self, profile: str) -> list[str]:
        """Lines on all: how many tensors are quantized, how many ops run in integers, how many stay float and why."""
        tensors = {one.x: str(one.grid.quant) for one in self.quantizers if not isinstance(one.x, Param)}
        ops = Counter(unit.kind for unit, _ in self.integer)
        kept = Counter((unit.kind, reason) for unit, reason in self.why_float.items())
        return [
            f"{profile}: quantized tensors between ops: {_counted(Counter(tensors.values()))}",
            f"{profile}: ops in integers: {_counted(ops)}",
            *(f"{profile}: ops in float: {count} {kind}: {reason}" for (kind, reason), count in kept.items()),
        ]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def place(gm: fx.GraphModule, profile: Profile, rules: Sequence[ActivationRule] = ()) -> Placement:
    """The quantizers that ``profile`` wants in a graph whose layers have decisions.

    ``rules``: what tensors are quantized to, or kept float; without any, to the profile's default.
    """
    return _Placer(gm, profile, rules).place()


def _is_of_integers(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and not val.is_floating_point()


@final
class _Placer:
    """The state of one placement."""

    def __init__(self, gm: fx.GraphModule, profile: Profile, rules: Sequence[ActivationRule]) -> None:
        self.gm = gm
        self.profile = profile
        self.rules = rules
        self.units = units_of(gm, profile.fuses)
        self.order = {op: number for number, op in enumerate(ops_of(gm))}
        self.producer = {output: unit for unit in self.units for output in unit.outputs}
        self.of_data = reading_data(gm, or_layers=True)
        self.held = self._held()
        self.of_integers = self._of_integers()
        unmet = f"{profile.name}: wants scales that are powers of two; those chosen here are not"
        self.notes: dict[str, None] = {unmet: None} if profile.power_of_two else {}
        self.why: dict[Unit, str] = {}

    def place(self) -> Placement:
        active = self._active()
        running = set(active)
        everywhere, edges = self._demands(active)
        groups = self._groups(active)
        quants: dict[Op, Quant] = {}  # by a group's representative
        fixed: dict[Op, FixedGrid | None] = {}
        for x in self._in_order({*everywhere, *edges}):
            quants.setdefault(groups(x), self._quant(x, groups))
        borders: dict[tuple[Op, Op], Format] = {}  # (reader, tensor)
        chosen: list[tuple[Unit, OpTypes]] = []
        for unit in active:
            types = self._types(unit, quants, groups)
            chosen.append((unit, types))
            same = self._rule(unit).output == "same"
            for position, (reader, x) in enumerate(unit.edges):
                own = self._own_input(reader)
                wanted = own.format if own is not None else types.input(position)
                if not same and quants[groups(x)].format != wanted:
                    borders[reader, x] = wanted
            for output in unit.outputs:
                if output in everywhere and not same and quants[groups(output)].format != types.output:
                    was = quants[groups(output)]
                    quants[groups(output)] = replace(was, format=types.output)
                    if self._asked(output) is not None:
                        told = f"{unit.name}: gives {types.output}, not {was.format}, on {self.profile.name}"
                        self.notes[told] = None
        for x in self._in_order({*everywhere, *edges}):
            root = groups(x)
            grid = self._fixed(x, quants[root].format, running)
            if x in self.producer and not self._keeps_grid(x, running):
                fixed[root] = grid if root not in fixed or fixed[root] == grid else None
        grids: dict[object, Grid] = {}

        def grid_of(key: object, quant: Quant, known: FixedGrid | None = None) -> Grid:
            return grids.setdefault(key, Grid(len(grids), quant, known))

        made: list[Quantizer] = []
        for x in self._in_order({*everywhere, *edges}):
            root, quant = groups(x), quants[groups(x)]
            readers = [reader for reader in edges.get(x, ()) if (reader, x) not in borders]
            name, role = self._name(x, readers or edges.get(x, []))
            if x in everywhere or readers:
                reading = None if x in everywhere else tuple(readers)
                grid = grid_of(root, quant, fixed.get(root))
                made.append(Quantizer(x, reading, grid, name, role, moved=self._keeps_grid(x, running)))
            others: dict[Format, list[Op]] = {}
            for reader in edges.get(x, ()):
                if (reader, x) in borders:
                    others.setdefault(borders[reader, x], []).append(reader)
            for format, reading in others.items():
                name, role = self._name(x, reading, as_input=True)
                grid = grid_of((x, format), replace(quant, format=format))
                made.append(Quantizer(x, tuple(reading), grid, name, role, again=x in everywhere))
        for unit, types in chosen:  # gains of norms
            if types.weight is None or unit.kind in WITH_WEIGHT:
                continue
            names = {argument.name for argument in unit.first.schema()}
            gain = Param.of(unit.first.argument("weight")) if "weight" in names else None
            if gain is not None:
                grid = grid_of((gain, unit.first), types.weight)
                made.append(Quantizer(gain, (unit.first,), grid, gain.fqn, "value"))
        why = {unit: self.why[unit] for unit in self.units if unit in self.why and self._is_told(unit)}
        return Placement(tuple(made), tuple(chosen), tuple(self.notes), why)

    # -- which ops run in integers

    def _held(self) -> set[Op]:
        """What parameters hold, and what moves elements of these alone: what else depends on sizes alone is computed
        from them in float, and is quantized as the constant that it is.
        """
        found = set[Op](op for op in self.order if isinstance(op, Param))
        for unit in self.units:
            rule = self.profile.ops.get(unit.kind)
            if rule is not None and rule.output == "same" and unit.edges and all(x in found for _, x in unit.edges):
                found |= set(unit.outputs)
        return found

    def _of_integers(self) -> set[fx.Node]:
        """What is computed from inputs of integers alone, and looked up in no table: positions, say, and masks."""
        floats = set[fx.Node]()
        for node in self.gm.graph.nodes:
            is_first = (node.op == "placeholder" and not _is_of_integers(node)) or isinstance(view(node), Weighted)
            if is_first or any(read in floats for read in node.all_input_nodes):
                floats.add(node)
        return self.of_data - floats

    def _rule(self, unit: Unit) -> OpRule:
        return self.profile.ops[unit.kind]

    def _why_float(self, unit: Unit) -> str | None:
        """Why a unit cannot run in integers: the consumer has not the op, a rule keeps it float, or its layer's plan is
        none for integers. None where it could.
        """
        name, rule = self.profile.name, self.profile.ops.get(unit.kind)
        if rule is None:
            return f"{name} has no row for it"
        if rule.placed == "never":
            return f"{name} runs it faster so"
        if not unit.outputs or not unit.edges:
            return "reads or gives no tensor of floats"
        if unit.kind in _OF_FLOATS and any(_is_of_integers(node) for node in unit.first.node.all_input_nodes):
            return "reads a tensor of integers"
        decided = [rule_for(self.rules, kind_of(op), module_of(op)) for op in unit.ops]
        if any(one is not None and one.quant is None for one in decided):
            return "a rule keeps it float"
        if self.rules and not any(decided):
            return "no rule for activations is for it"
        if unit.kind not in WITH_WEIGHT:
            is_constant = unit.first.node not in self.of_data and unit.outputs[0] not in self.held
            return "depends on sizes alone" if is_constant else None
        plan = unit.first.node.meta.get(PLAN)
        if not isinstance(plan, Plan) or plan.weight is None:
            return "its weight is float"
        if plan.input is not None and plan.input.dynamic:
            return "its scales are from run time"
        if not any(types.weight is None or _holds(types.weight, plan.weight) for types in rule.types):
            self.notes[f"{unit.name}: weight {plan.weight} is none that {name} multiplies in integers"] = None
            return f"{name} multiplies no {plan.weight}"
        return None

    def _active(self) -> list[Unit]:
        """The units that run in integers. What is made of integers for ops in float (positions, of which angles are
        made) is more exact in float, too. A unit that is dropped takes a reader from what it reads, and integers from
        what reads it: these are looked at again, until nothing changes.
        """
        self.why = {unit: reason for unit in self.units if (reason := self._why_float(unit)) is not None}
        active = dict.fromkeys(unit for unit in self.units if unit not in self.why)
        readers: dict[Op, dict[Unit, None]] = {}
        for unit in active:
            for _, x in unit.edges:
                readers.setdefault(x, {})[unit] = None
        firm = {x for unit in active if self._rule(unit).placed == "always" for _, x in unit.edges}
        pending = dict.fromkeys(active)
        while pending:
            unit, _ = pending.popitem()
            if unit not in active:
                continue
            placed = self._rule(unit).placed
            is_read = any(readers.get(output) for output in unit.outputs)
            if placed == "always" and (is_read or unit.first.node not in self.of_integers):
                continue
            if is_read and (placed == "through" or all(self._is_integer(x, active, firm) for _, x in unit.edges)):
                continue
            del active[unit]
            self.why[unit] = "not between ops in integers" if placed == "between" else "nothing in integers reads it"
            for _, x in unit.edges:
                readers[x].pop(unit, None)
                if x in self.producer:
                    pending[self.producer[x]] = None
            for output in unit.outputs:
                pending |= readers.get(output, {})
        return list(active)

    def _is_integer(self, x: Op, active: Mapping[Unit, None], firm: set[Op]) -> bool:
        """Whether a tensor is quantized anyway: a constant, what such an op gives, or what one that is firm reads."""
        unit = self.producer.get(x)
        given = unit is not None and unit in active and self._rule(unit).output != "optional"
        return given or x in firm or x.node not in self.of_data

    def _demands(self, active: Iterable[Unit]) -> tuple[dict[Op, None], dict[Op, list[Op]]]:
        """The tensors that all read quantized, and those that some read so, with these readers."""
        everywhere: dict[Op, None] = {}
        edges: dict[Op, list[Op]] = {}
        for unit in active:
            for reader, x in unit.edges:
                edges.setdefault(x, []).append(reader)
            if self._rule(unit).output != "optional":
                everywhere |= dict.fromkeys(unit.outputs)
        return everywhere, edges

    # -- on which grids

    def _groups(self, active: Iterable[Unit]) -> Callable[[Op], Op]:
        """The representative of each tensor's group."""
        import networkx as nx

        graph: nx.Graph[Op] = nx.Graph()
        for unit in active:
            if self._rule(unit).output == "same":
                graph.add_edges_from((x, output) for _, x in unit.edges for output in unit.outputs)
        source = source_of(self.gm)
        inputs = [op for op in ops_of(self.gm) if op.node.op == "placeholder"]
        given = next(node for node in self.gm.graph.nodes if node.op == "output").args[0]
        for pair in source.caches:
            past = inputs[[i.name for i in source.inputs].index(pair.past)]
            graph.add_edge(past, view(given[list(source.outputs).index(pair.present)]))
        first: dict[Op, Op] = {}
        for component in nx.connected_components(graph):
            root = min(component, key=self.order.__getitem__)
            first |= dict.fromkeys(component, root)
        return lambda x: first.get(x, x)

    def _quant(self, x: Op, groups: Callable[[Op], Op]) -> Quant:
        """What the group of ``x`` is quantized to: as is asked for, as what reads it wants it, or the default."""
        root = groups(x)
        if (asked := self._asked(root)) is not None:
            return asked
        for reader in root.users:
            own = self._own_input(reader)
            if own is not None:
                return own
        return self.profile.activation()

    def _asked(self, x: Op) -> Quant | None:
        """What its layer's plan says of a tensor, or a rule."""
        unit = self.producer.get(x)
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

    def _types(self, unit: Unit, quants: Mapping[Op, Quant], groups: Callable[[Op], Op]) -> OpTypes:
        """The combination that fits best: what is asked for of its output, where it is no layer with an input of its
        own; then most of its inputs' types, its output's, and the preferred one.
        """
        plan = unit.first.node.meta.get(PLAN)
        weight = plan.weight if isinstance(plan, Plan) and unit.kind in WITH_WEIGHT else None
        rows = [
            row for row in self._rule(unit).types if weight is None or row.weight is None or _holds(row.weight, weight)
        ]
        own = self._own_input(unit.first) if unit.kind in WITH_WEIGHT else None
        wanted = [own.format if own is not None else quants[groups(x)].format for _, x in unit.edges]
        given = [quants[groups(output)].format for output in unit.outputs if groups(output) in quants]

        asked = [quant for output in unit.outputs if (quant := self._asked(output)) is not None]

        def score(row: OpTypes) -> tuple[int, ...]:
            as_asked = 0 if own is not None else sum(row.output == quant.format for quant in asked)
            inputs = sum(row.input(i) == format for i, format in enumerate(wanted))
            outputs = sum(row.output == format for format in given)
            return as_asked, inputs + outputs, inputs

        return max(rows, key=score)

    def _fixed(self, x: Op, format: Format, active: set[Unit]) -> FixedGrid | None:
        unit = self.producer.get(x)
        return self._rule(unit).grids.get(str(format)) if unit is not None and unit in active else None

    def _keeps_grid(self, x: Op, active: set[Unit]) -> bool:
        """Whether all that ``x`` holds was on its grid before."""
        unit = self.producer.get(x)
        return unit is not None and unit in active and self._rule(unit).output == "same"

    # -- words

    def _is_told(self, unit: Unit) -> bool:
        """Whether a unit that stays float computes floats from data: the report has those."""
        moves = isinstance(effect(unit.first), Moves | Copies | ReadsShape)
        return unit.kind != INPUT and bool(unit.outputs) and unit.first.node in self.of_data and not moves

    def _in_order(self, tensors: Iterable[Op]) -> Iterator[Op]:
        return iter(sorted(tensors, key=self.order.__getitem__))

    def _name(self, x: Op, readers: Sequence[Op], as_input: bool = False) -> tuple[str, str]:
        """Whose tensor ``x`` is: the input of the layer that alone reads it, or the output of what gives it."""
        layers = [str(reader.node.meta[LAYER]) for reader in readers if reader.node.meta.get(LAYER)]
        if isinstance(x, Param):
            return x.fqn, "value"
        unit = self.producer.get(x)
        gives = unit is not None and unit.kind in WITH_WEIGHT and unit.first.node.meta.get(LAYER)
        if layers and (as_input or not gives):
            return layers[0], "input"
        if unit is None or unit.kind == INPUT:
            return x.node.name, "value"
        return unit.name, "output"


def _holds(row: Quant, weight: Quant) -> bool:
    """Whether a type of weights in a table takes this one: its format, or one of fewer bits that is stored as that, and
    its granularity or a coarser one.
    """
    a, b = row.format, weight.format
    if not isinstance(a, Int) or not isinstance(b, Int):
        return False
    narrower = a.bits == 8 and a.signed and 4 < b.bits < 8  # held as int8
    if (a.signed, a.symmetric) != (b.signed, b.symmetric) or (a.bits != b.bits and not narrower):
        return False
    return row.granularity == weight.granularity or isinstance(weight.granularity, PerTensor)
