"""Weights that a model computes from its own tensors alone, as tensors: weight norm, standardized convolutions, slices.

Salimans and Kingma, "Weight Normalization", arXiv 1602.07868; Miyato et al., "Spectral Normalization for GANs", arXiv
1802.05957; Qiao et al., "Weight Standardization", arXiv 1903.10520. At inference all of them are constants.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from graphq.ir import edit
from graphq.ir.constants import computation_of, constants_of, evaluate
from graphq.ir.layers import MADE_OF
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.products import FORMS, is_moved, is_weight
from graphq.ir.views import Cast, GroupedLinear, Op, Param, TransposedLinear, Weighted, ops_of, view
from graphq.state import remove_tensor, same_tensors, tensor_of

_PACKED: Final = re.compile(r"(.*\.)?in_proj_(weight|bias)")
# The thirds of an attention's packed projection that a slice of it holds, and what torch calls them apart.
_THIRDS: Final[Mapping[tuple[int, ...], str]] = {(0,): "q", (1,): "k", (2,): "v", (1, 2): "kv"}


@final
@dataclass(frozen=True)
class FoldWeights(Pass):
    """A weight or bias that is computed from parameters, buffers and constants alone is a parameter.

    It has the name that the module gives it: that of the parameter that it is made of, without what parametrizations
    add; ``q_proj_weight`` and the like for parts of an attention's ``in_proj_weight``; several that are made of one
    parameter are numbered. Equal computations are one tensor, under each of their names. What only moves the weight of
    a linear stays: a transposed one, say; and a weight with more elements than what it is made of, such as the product
    of two narrow matrices. A model without data has folded weights without.
    """

    name: ClassVar[str] = "fold-weights"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        computations = _Computations(gm)
        roots = computations.roots()
        if not roots:
            return 0
        dead = _dead(gm, roots)
        names = _names(gm, computations, roots, dead)
        numbers = [computations.number(root.node) for root in roots]
        origins = [computations.origin(root).fqn for root in roots]
        values = {number: computations.value(root) for number, root in zip(numbers, roots, strict=True)}
        held: dict[str, Op] = {}
        for root, name, number, origin in zip(roots, names, numbers, origins, strict=True):
            if name not in held:
                if edit.has_tensor(gm, name):
                    remove_tensor(gm, name)  # only what is folded read it
                held[name] = edit.add_tensor(gm, root, name, values[number], by=self.name, like=root, of=origin)
                _record(gm, name, origin)
            edit.bypass(gm, root, held[name])
        for node in reversed(list(gm.graph.nodes)):
            if node in dead and not node.users:
                gm.graph.erase_node(node)
        edit.drop_unused(gm)
        return len(roots)


@final
class _Computations:
    """What a graph computes from its own tensors alone."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._constant = constants_of(gm)
        self._first: Mapping[str, str] = same_tensors(gm)
        self._numbers: dict[tuple[str, ...], int] = {}
        self._number_of: dict[fx.Node, int] = {}

    def roots(self) -> list[Op]:
        """The computations of weights and biases, in graph order of the ops that read them."""
        found: dict[Op, None] = {}
        for op in ops_of(self.gm):
            if op.node in self._constant:
                continue
            for operand in _operands(op):
                root = self._root(op, operand)
                if not isinstance(root, Param) and root.node in self._constant and self._is_smaller(root):
                    found[root] = None
        return list(found)

    def _is_smaller(self, root: Op) -> bool:
        """Whether ``root`` is a tensor made of parameters, and has no more elements than all that it is made of."""
        if not isinstance(root.val, Tensor) or not self._weights(root):
            return False
        return root.val.numel() <= sum(n.meta["val"].numel() for n in computation_of(root.node) if n.op == "get_attr")

    def _root(self, op: Op, operand: Op) -> Op:
        """What computes an operand, behind what the readers of weights see through."""
        skips = is_moved if op.node.target in FORMS or isinstance(op, GroupedLinear) else _is_cast
        while skips(operand):
            operand = view(operand.node.all_input_nodes[0])
        if isinstance(op, Weighted) or operand.node not in self._constant:
            return operand
        is_matrix = isinstance(operand.val, Tensor) and operand.val.dim() == 2  # what raise-linear makes a layer of
        return (
            operand
            if is_matrix and not any(isinstance(view(n), Weighted) for n in computation_of(operand.node))
            else op
        )

    def _weights(self, root: Op) -> list[Param]:
        """The parameters that ``root`` is computed from."""
        read = (Param.of(node) for node in computation_of(root.node))
        return [param for param in read if param is not None and is_weight(self.gm, param)]

    def origin(self, root: Op) -> Param:
        """The parameter that ``root`` is a form of: one of its shape, or else the largest."""
        return max(self._weights(root), key=lambda p: (p.val.shape == root.val.shape, p.val.numel()))

    def name(self, root: Op) -> str:
        """What the module calls the weight that ``root`` computes."""
        origin = self.origin(root).fqn
        if found := re.fullmatch(r"((?:.*\.)?)parametrizations\.(\w+)\.original\d*", origin):
            return found[1] + found[2]
        read = {param.fqn for param in self._weights(root)}
        if origin.endswith("_v") and f"{origin[:-2]}_g" in read:
            return origin[:-2]
        packed = _PACKED.fullmatch(origin)
        if packed is not None and (thirds := self._thirds(root)) in _THIRDS:
            return f"{packed[1] or ''}{_THIRDS[thirds]}_proj_{packed[2]}"
        return origin.removesuffix("_orig")

    def _thirds(self, root: Op) -> tuple[int, ...]:
        """The thirds of the one tensor that ``root`` is cut from along its first axis; nothing where it is not."""
        read = [node for node in computation_of(root.node) if node.op == "get_attr"]
        whole = view(read[0])
        size = int(whole.val.shape[0]) // 3
        if len(read) != 1 or size == 0 or whole.val.shape[0] != 3 * size:
            return ()
        rows = torch.arange(3 * size).view(-1, *[1] * (whole.val.dim() - 1)).expand(tuple(whole.val.shape))
        made = evaluate(root.node, lambda _: rows)
        first = made.flatten(1)[:, 0] if made.dim() > 1 else made
        return tuple(int(start) // size for start in first[::size]) if first.numel() % size == 0 else ()

    def number(self, node: fx.Node) -> int:
        """Equal for nodes that compute the same from the same tensors."""
        for step in computation_of(node):
            if step in self._number_of:
                continue
            if step.op == "get_attr":
                text = ("@", self._first.get(str(step.target), str(step.target)))
            else:
                numbered = cast(Any, lambda node: f"%{self._number_of[node]}")
                text = (str(step.target), repr(map_arg((step.args, step.kwargs), numbered)))
            self._number_of[step] = self._numbers.setdefault(text, len(self._numbers))
        return self._number_of[node]

    def value(self, root: Op) -> Tensor:
        """What ``root`` computes, as a parameter; what the graph knows of it, where the model has no data."""
        tensors = [tensor_of(self.gm, str(n.target)) for n in computation_of(root.node) if n.op == "get_attr"]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return nn.Parameter(root.val, requires_grad=False)
        made = evaluate(root.node, lambda fqn: tensor_of(self.gm, fqn).detach())
        return nn.Parameter(made, requires_grad=False) if made.is_floating_point() else made


def _record(gm: fx.GraphModule, name: str, origin: str) -> None:
    if name != origin:
        gm.meta[MADE_OF] = {**gm.meta.get(MADE_OF, {}), name: (origin,)}


def _is_cast(op: Op) -> bool:
    return isinstance(op, Cast)


def _operands(op: Op) -> Iterator[Op]:
    """The weight and the bias of a layer; all operands of other products."""
    if isinstance(op, Weighted):
        yield op.weight_op
        bias = op.self_ if isinstance(op, TransposedLinear) else getattr(op, "bias", None)
        if bias is not None:
            yield bias
    elif op.node.target in FORMS:
        yield from map(view, op.node.all_input_nodes)


def _dead(gm: fx.GraphModule, roots: Sequence[Op]) -> set[fx.Node]:
    """The nodes that nothing reads but ``roots``, and these."""
    found = {root.node for root in roots}
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("get_attr", "call_function") and node.users and found.issuperset(node.users):
            found.add(node)
    return found


def _names(gm: fx.GraphModule, computations: _Computations, roots: Sequence[Op], dead: set[fx.Node]) -> list[str]:
    """A name for each root that no other computation has, and no tensor that stays."""
    wanted: dict[str, dict[int, None]] = {}
    for root in roots:
        wanted.setdefault(computations.name(root), {})[computations.number(root.node)] = None
    names: dict[tuple[str, int], str] = {}
    taken = set[str]()
    for name, numbers in wanted.items():
        stem, suffix = (name[:-7], ".weight") if name.endswith(".weight") else (name, "")
        free = (c for c in _candidates(name, stem, suffix, len(numbers)) if c not in taken and _is_free(gm, c, dead))
        for number in numbers:
            names[name, number] = next(free)
            taken.add(names[name, number])
    return [names[computations.name(root), computations.number(root.node)] for root in roots]


def _candidates(name: str, stem: str, suffix: str, count: int) -> Iterator[str]:
    if count == 1:
        yield name
    number = 0
    while True:
        yield f"{stem}_{number}{suffix}"
        number += 1


def _is_free(gm: fx.GraphModule, name: str, dead: set[fx.Node]) -> bool:
    """Whether the graph has nothing of this name but a tensor that is about to go."""
    reads = gm.graph.find_nodes(op="get_attr", target=name)
    return dead.issuperset(reads) if reads else not edit.has_tensor(gm, name)
