"""Groups of layers whose inputs' channels are scaled together, and the two ways to do it: folded, or a product."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.channels import Flow, Flows, move_factors, subgraph_of
from graphq.ir.choices import Choices
from graphq.ir.edit import free_path
from graphq.ir.effects import Stopped
from graphq.ir.index import GraphIndex
from graphq.ir.labels import NONE, LabelledParam, Reader
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.matrices import as_matrices, scale_block
from graphq.ir.views import Convolution, GroupedLinear, Op, Param, Weighted, ops_of
from graphq.numerics import fake_quantize
from graphq.numerics.ranges import weight_scales
from graphq.spec.folds import EVERYWHERE, Folds
from graphq.spec.plan import Plan, weight_quants
from graphq.spec.quant import MinMax, Mse, Quant
from graphq.state import tensor_of

Where = Literal["fold", "fold-or-multiply", "multiply"]


@final
@dataclass(frozen=True)
class Group:
    """Layers whose inputs' channels have factors in common, ``count`` of them.

    ``readers``: all weights that take factors up; ``chosen``: those of them that decide on the factors. ``flow`` is
    None where the factors are multiplied by at run time.
    """

    count: int
    moved: Tensor
    readers: tuple[Reader, ...]
    chosen: tuple[Reader, ...]
    flow: Flow | None

    @property
    def name(self) -> str:
        """What no other group of the graph is called."""
        return f"factors {self.readers[0].weight.fqn}"

    def by_label(self, values: Sequence[Tensor], labels: Sequence[Tensor], how: Literal["amax", "mean"]) -> Tensor:
        """Values of channels, brought together by label; 0 for labels without any."""
        flat = torch.cat([v.flatten().double() for v in values])
        where = torch.cat([label.flatten() for label in labels])
        flat, where = flat[where != NONE], where[where != NONE]
        return torch.zeros(self.count, dtype=torch.float64).scatter_reduce_(0, where, flat, how, include_self=False)

    def at(self, factors: Tensor, labels: Tensor) -> Tensor:
        """The factor of each label; 1 where there is none."""
        return torch.cat([factors.double(), torch.ones(1, dtype=torch.float64)])[labels]


def chosen_layers(gm: fx.GraphModule, only: frozenset[str] | None) -> list[Weighted]:
    """The uses of float weights with a plan, of the layers ``only``, that multiply an activation."""
    found: list[Weighted] = []
    for op in ops_of(gm):
        if not isinstance(op, Weighted) or not op.is_product or not isinstance(op.weight_op, Param):
            continue
        decision = op.node.meta.get(PLAN)
        is_planned = isinstance(decision, Plan) or any(weight_quants(decision))
        if is_planned and (only is None or not only.isdisjoint(names_of(op))):
            found.append(op)
    return found


def names_of(op: Weighted) -> list[str]:
    """The layers that an op uses: each expert of a stack."""
    path = str(op.node.meta[LAYER])
    if not isinstance(op, GroupedLinear):
        return [path]
    stack, dot, role = path.rpartition(".")
    return [f"{stack}{dot}{i}.{role}" for i in range(int(op.weight_op.val.shape[0]))]


def groups(
    gm: fx.GraphModule,
    only: frozenset[str] | None,
    where: Where,
    note: Callable[[str], None] | None,
    folds: Folds = EVERYWHERE,
) -> Iterator[Group]:
    """The groups of the chosen layers, in graph order. A layer in no group is noted with the reason.

    ``folds``: what factors may be folded into; layers whose input is made by something else are in no group.
    """
    chosen = chosen_layers(gm, only)
    flows = Flows(gm)
    readers = _by_input(chosen)
    decisive, done = set(chosen), set[Op]()
    for op in chosen:
        if op in done:
            continue
        reason = ""
        if where != "multiply":
            flow = flows.into(op)
            if isinstance(flow, Flow):
                own = tuple(reader for reader in flow.readers if reader.op in decisive)
                done |= {reader.op for reader in own}
                if _may_fold(folds, flow, op, note):
                    yield Group(flow.count, flow.moved, flow.readers, own, flow)
                continue
            reason = flow.reason
        if where != "fold":
            group = _group_of_input(flows.index, op, readers[op.input_op])
            if isinstance(group, Group):
                done |= {reader.op for reader in group.readers}
                yield group
                continue
            reason = f"{reason}; {group.reason}" if reason else group.reason
        done.add(op)
        if note is not None:
            note(f"{op.node.meta[LAYER]}: its input's channels keep their scale: {reason}")


def _may_fold(folds: Folds, flow: Flow, op: Weighted, note: Callable[[str], None] | None) -> bool:
    """Whether factors may be folded into what makes the input of ``op``."""
    kind = subgraph_of(flow.producer, op)
    taken = [folds.takes(kind, name) for name in _sources(flow)]
    if any(taken) and not all(taken) and note is not None:
        note(f"{op.node.meta[LAYER]}: its input's channels keep their scale: only some experts that make it are chosen")
    return all(taken)


def _sources(flow: Flow) -> list[str]:
    """The names of what factors are folded into: a norm, a layer, or each expert of a stack."""
    weight = flow.produced[0]
    module, dot, role = weight.fqn.rpartition(".")
    if isinstance(flow.producer, GroupedLinear):
        return [f"{module}{dot}{i}.{role}" for i in range(weight.labels.shape[0])]
    return [module]


def _by_input(ops: Sequence[Weighted]) -> dict[Op, list[Weighted]]:
    found: dict[Op, list[Weighted]] = {}
    for op in ops:
        found.setdefault(op.input_op, []).append(op)
    return found


def _group_of_input(index: GraphIndex, op: Weighted, alike: Sequence[Weighted]) -> Group | Stopped:
    """The layers among ``alike``, which read the input of ``op``, that have its channels, as a group of its own."""
    x = op.input_op
    axis = op.input_axis % x.val.dim()
    count = int(x.val.shape[axis])
    readers: list[Reader] = []
    for other in alike:
        if other.input_axis % x.val.dim() != axis:
            continue
        param = other.weight_op
        if not isinstance(param, Param) or not index.is_own(param):
            if other == op:
                return Stopped("its weight has other readers")
            continue
        if isinstance(other, Convolution) and other.groups != 1:
            if other == op:
                return Stopped("it is a convolution of groups")
            continue
        shape = tuple(param.val.shape)
        line = torch.arange(count)
        labels = line.view([count if axis == other.in_axis else 1 for axis in range(len(shape))]).expand(shape)
        readers.append(Reader(other, LabelledParam(param.fqn, labels), line))
    return Group(count, torch.ones(count, dtype=torch.bool), tuple(readers), tuple(readers), None)


def apply_factors(index: GraphIndex, group: Group, factors: Tensor, by: str, choices: Choices | None = None) -> int:
    """The inputs' channels are divided by ``factors``, and the weights multiplied; how many tensors changed.

    ``choices``: where the factors are kept.
    """
    factors = torch.where(group.moved, factors.double(), 1.0)
    if choices is not None:
        choices.keep(group.name, factors)
    if group.flow is not None:
        return move_factors(index, group.flow, factors, by)
    gm, first = index.gm, group.readers[0].op
    x = first.input_op
    axis = first.input_axis % x.val.dim()
    shape = [-1 if a == axis else 1 for a in range(axis, x.val.dim())]
    held = (1 / factors).to(tensor_of(gm, group.readers[0].weight.fqn).dtype).view(shape)
    after = edit.following(x)
    path = free_path(gm, str(first.node.meta[LAYER]), ["input_factor"])
    inverse = edit.add_tensor(gm, after, f"{path}.input_factor", held, by=by, like=first)
    product = edit.insert(gm, after, torch.ops.aten.mul.Tensor, x, inverse, by=by, like=first)
    for reader in group.readers:
        part = reader.weight
        edit.set_param(gm, part.fqn, partial(part.times, factor=factors), by, index.reads(part.fqn))
        edit.redirect(reader.op, x, product, by)
    return 1 + len(group.readers)


def rounding_change(op: Weighted, w: Tensor, factors: Tensor) -> Tensor:
    """What rounding ``w``, multiplied by ``factors`` (of its shape), by its plan adds to it: [B, N, K] as
    ``as_matrices`` has it, in units of ``w`` itself. 0 for experts that stay float.
    """
    members: dict[Quant, list[int]] = {}
    for index, quant in enumerate(weight_quants(op.node.meta[PLAN])):
        if quant is not None:
            members.setdefault(quant, []).append(index)
    made = torch.zeros_like(w)
    for quant, own in members.items():
        pick = own if isinstance(op, GroupedLinear) else slice(None)
        scaled = w[pick] * factors[pick]
        block = scale_block(op, quant.granularity)
        method = quant.method if isinstance(quant.method, Mse) else MinMax()
        found = weight_scales(scaled, quant.format, block, method)
        made[pick] = (fake_quantize(scaled, found, quant.format, block) - scaled) / factors[pick]
    return as_matrices(made, op)


def column_magnitudes(gm: fx.GraphModule, group: Group) -> Tensor:
    """The largest magnitude of the weights of each label, over the layers that decide."""
    weights = [tensor_of(gm, reader.weight.fqn).detach().abs() for reader in group.chosen]
    return group.by_label(weights, [reader.weight.labels for reader in group.chosen], "amax")
