"""Which units of a graph a consumer runs in integers, and why the others stay float.

All units that could run in integers are taken to do so, and those are dropped again that the consumer's table wants
between integers alone and that do not stand there (the greatest fixed point).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from torch import Tensor, fx

from graphq.ir.effect_table import effect
from graphq.ir.effects import Copies, Moves, ReadsShape
from graphq.ir.layers import PLAN
from graphq.ir.op_kinds import INPUT, kind_of
from graphq.ir.units import WITH_WEIGHT, Unit, module_of, reading_data, units_of
from graphq.ir.views import Op, Param, Weighted, ops_of, view
from graphq.spec.activations import ActivationRule, rule_for
from graphq.spec.formats import Int
from graphq.spec.plan import Plan
from graphq.spec.profile import OpRule, Profile
from graphq.spec.quant import PerTensor, Quant

_OF_FLOATS: Final = ("Add", "Sub", "Mul", "Div", "MatMul", "Concat")  # whose operands have one type


@final
class UnitGraph:
    """A graph as the units that one consumer makes of it: who gives a tensor, in which order they stand, and which
    tensors are known once the sizes are.
    """

    def __init__(self, gm: fx.GraphModule, profile: Profile) -> None:
        self.gm = gm
        self.profile = profile
        self.units = units_of(gm, profile.fuses)
        self.order = {op: number for number, op in enumerate(ops_of(gm))}
        self.producer = {output: unit for unit in self.units for output in unit.outputs}
        self.of_data = reading_data(gm, or_layers=True)
        self.held = self._held()
        self.of_integers = self._of_integers()

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

    def rule(self, unit: Unit) -> OpRule:
        """The row of a unit that has one."""
        return self.profile.ops[unit.kind]

    def in_order(self, tensors: Iterable[Op]) -> Iterator[Op]:
        """The tensors as they stand in the graph."""
        return iter(sorted(tensors, key=self.order.__getitem__))


@final
@dataclass(frozen=True)
class IntegerUnits:
    """The units that run in integers, in graph order; why the others that compute floats from data stay float; and
    lines for the report on what could not be had.
    """

    units: tuple[Unit, ...]
    why_float: Mapping[Unit, str]
    notes: tuple[str, ...]


def integer_units(
    graph: UnitGraph, rules: Sequence[ActivationRule] = (), kept: Mapping[Op, str] | None = None
) -> IntegerUnits:
    """Which units run in integers where ``rules`` say what tensors are quantized to; without any, all may.

    kept: the first ops of units that stay float whatever the table and the rules say, with the reason.
    """
    notes: dict[str, None] = {}
    why = {unit: reason for unit in graph.units if (reason := _why_float(graph, unit, rules, kept or {}, notes))}
    active = _between_integers(graph, why)
    told = {unit: why[unit] for unit in graph.units if unit in why and _computes_floats(graph, unit)}
    return IntegerUnits(tuple(active), told, tuple(notes))


def _why_float(
    graph: UnitGraph, unit: Unit, rules: Sequence[ActivationRule], kept: Mapping[Op, str], notes: dict[str, None]
) -> str | None:
    """Why a unit cannot run in integers: the consumer has not the op, a rule keeps it float, or its layer's plan is
    none for integers. None where it could.
    """
    name, rule = graph.profile.name, graph.profile.ops.get(unit.kind)
    if rule is None:
        return graph.profile.no_row(unit.kind)
    if rule.placed == "never":
        return f"{name} runs it faster so"
    if not unit.outputs or not unit.edges:
        return "reads or gives no tensor of floats"
    if unit.kind in _OF_FLOATS and any(_is_of_integers(node) for node in unit.first.node.all_input_nodes):
        return "reads a tensor of integers"
    decided = [rule_for(rules, kind_of(op), module_of(op)) for op in unit.ops]
    for one in decided:
        if one is not None and one.quant is None:
            return f"a rule keeps it float: {one}" + (f" ({one.source})" if one.source else "")
    if rules and not any(decided):
        return "no rule for activations is for it"
    if unit.first in kept:
        return kept[unit.first]
    if unit.kind not in WITH_WEIGHT:
        is_constant = unit.first.node not in graph.of_data and unit.outputs[0] not in graph.held
        return "depends on sizes alone" if is_constant else None
    plan = unit.first.node.meta.get(PLAN)
    if not isinstance(plan, Plan) or plan.weight is None:
        return "its weight is float"
    if plan.input is not None and plan.input.dynamic:
        return "its scales are from run time"
    if not any(types.weight is None or takes_weight(types.weight, plan.weight) for types in rule.types):
        notes[f"{unit.name}: weight {plan.weight} is none that {name} multiplies in integers"] = None
        return f"{name} multiplies no {plan.weight}"
    return None


def _between_integers(graph: UnitGraph, why: dict[Unit, str]) -> list[Unit]:
    """The units that run in integers; ``why`` gets the reasons of those that do not stand between such.

    What is made of integers for ops in float (positions, of which angles are made) is more exact in float, too. A unit
    that is dropped takes a reader from what it reads, and integers from what reads it: these are looked at again, until
    nothing changes.
    """
    active = dict.fromkeys(unit for unit in graph.units if unit not in why)
    readers: dict[Op, dict[Unit, None]] = {}
    for unit in active:
        for _, x in unit.edges:
            readers.setdefault(x, {})[unit] = None
    firm = {x for unit in active if graph.rule(unit).placed == "always" for _, x in unit.edges}

    def is_integer(x: Op) -> bool:
        """Whether a tensor is quantized anyway: a constant, what such an op gives, or what one that is firm reads."""
        unit = graph.producer.get(x)
        given = unit is not None and unit in active and graph.rule(unit).output != "optional"
        return given or x in firm or x.node not in graph.of_data

    pending = dict.fromkeys(active)
    while pending:
        unit, _ = pending.popitem()
        if unit not in active:
            continue
        placed = graph.rule(unit).placed
        is_read = any(readers.get(output) for output in unit.outputs)
        if placed == "always" and (is_read or unit.first.node not in graph.of_integers):
            continue
        if is_read and (placed == "through" or all(is_integer(x) for _, x in unit.edges)):
            continue
        del active[unit]
        why[unit] = "not between ops in integers" if placed == "between" else "nothing in integers reads it"
        for _, x in unit.edges:
            readers[x].pop(unit, None)
            if x in graph.producer:
                pending[graph.producer[x]] = None
        for output in unit.outputs:
            pending |= readers.get(output, {})
    return list(active)


def takes_weight(row: Quant, weight: Quant) -> bool:
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


def _is_of_integers(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and not val.is_floating_point()


def _computes_floats(graph: UnitGraph, unit: Unit) -> bool:
    """Whether a unit computes floats from data: the report has the reasons of those."""
    moves = isinstance(effect(unit.first), Moves | Copies | ReadsShape)
    return unit.kind != INPUT and bool(unit.outputs) and unit.first.node in graph.of_data and not moves
