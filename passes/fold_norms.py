"""Gains of RMS norms, gains and biases of layer norms, in the layers that read them.

For y = W (g * x + b) + c the layer's weight becomes W diag(g) and its bias W b + c (SliceGPT, arXiv:2401.15024,
section 3.1; QuaRot, arXiv:2404.00456, section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from graphq.ir import edit
from graphq.ir.biases import bias_name
from graphq.ir.effect_table import effect
from graphq.ir.effects import Normalizes, ReadsShape
from graphq.ir.index import GraphIndex
from graphq.ir.layers import weight_param
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.vectors import constant, gain_of, is_normalized, moved, place, width
from graphq.ir.views import Cast, GroupedLinear, Linear, Op, Param, TransposedLinear, Weighted, ops_of, view
from graphq.passes.quantize_weights import with_weights
from graphq.state import tensor_of

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class FoldNorms(Pass):
    """Norms that only linears read have gain 1 and bias 0; the linears have taken them up.

    The parameters stay, as ones and zeros (a gain of ``1 + weight``: as zeros). A linear that needs a bias gets one.
    ``note`` is told of each norm that keeps its gain, and why.
    """

    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "fold-norms"
    requires = (with_weights,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        index = GraphIndex(gm)
        for op in ops_of(gm):
            norm = _norm(gm, op)
            if norm is None or norm.is_neutral:
                continue
            readers = _readers(op)
            why = readers if isinstance(readers, str) else _kept(index, norm, readers)
            if why is None:
                self._fold(index, norm, [r for r in readers if isinstance(r, Weighted)])
                count += 1
            elif self.note is not None:
                self.note(f"{self.name}: {norm.name}: kept: {why}")
        return count

    def _fold(self, index: GraphIndex, norm: "_Norm", readers: list[Weighted]) -> None:
        gm = index.gm
        for reader in readers:
            fqn = _weight(reader)
            if norm.bias is not None and norm.has_bias:
                self._add_bias(index, reader, bias_through(tensor_of(gm, fqn).detach(), reader.in_axis, norm.bias))
            if norm.gain is not None:
                scale = partial(scale_axis, axis=reader.in_axis, gain=norm.gain)
                edit.set_param(gm, fqn, scale, by=self.name, reads=index.reads(fqn))
        for fqn, value in norm.neutral.items():
            neutral = partial(torch.full_like, fill_value=value)
            edit.set_param(gm, fqn, neutral, by=self.name, reads=index.reads(fqn))

    def _add_bias(self, index: GraphIndex, reader: Weighted, added: Tensor) -> None:
        gm, own, fqn = index.gm, _bias(reader), _weight(reader)
        if isinstance(own, Param):
            edit.set_param(gm, own.fqn, lambda c: (c.double() + added).to(c.dtype), self.name, index.reads(own.fqn))
            return
        held = nn.Parameter(added.to(tensor_of(gm, fqn).dtype), requires_grad=False)
        bias = edit.add_tensor(gm, reader, bias_name(fqn), held, by=self.name)
        edit.replace(gm, reader, Linear.target, reader.input_op, reader.weight_op, bias, by=self.name)


@final
@dataclass(frozen=True)
class _Norm:
    """A norm's gain and bias, and what each of their parameters becomes when they are folded."""

    name: str
    gain: Tensor | None
    bias: Tensor | None
    neutral: dict[str, float]
    uses: tuple[Op, ...]  # the ops that may read these parameters
    why: str | None = None

    @property
    def has_bias(self) -> bool:
        return self.bias is not None and bool((self.bias != 0).any())

    @property
    def is_neutral(self) -> bool:
        return not self.has_bias and (self.gain is None or bool((self.gain == 1).all()))


def _norm(gm: fx.GraphModule, op: Op) -> _Norm | None:
    """The norm whose output ``op`` is; None if it is none, or has neither gain nor bias."""
    effect_of = effect(op)
    if isinstance(effect_of, Normalizes) and effect_of.over == "row" and isinstance(op.val, Tensor):
        names = effect_of.parameters
        given = {name: view(op.argument(name)) for name in names if op.argument(name) is not None}
        held = {name: constant(gm, factor) for name, factor in given.items()}
        wanted = {name: _neutral(factor, 1.0 if name == "weight" else 0.0) for name, factor in given.items()}
        neutral = {param.fqn: value for found in wanted.values() if found is not None for param, value in [found]}
        is_known = all(found is not None for found in (*held.values(), *wanted.values()))
        why = None if is_known else "its gain or bias is computed"
        if any(tensor is not None and tensor.dim() != 1 for tensor in held.values()):
            why = "its gain is not one number for each channel"
        if len(neutral) < sum(found is not None for found in wanted.values()):
            why = "its gain is its bias, too"
        return _Norm(place(op), held.get("weight"), held.get("bias"), neutral, (op,), why)
    match gain_of(gm, op):
        case (x, factor, held) if is_normalized(x):
            found = _neutral(factor, 1.0)
            neutral = {} if found is None else {found[0].fqn: found[1]}
            why = "its gain is computed" if found is None else None
            return _Norm(place(op), held.flatten(), None, neutral, (op, factor), why)
        case _:
            return None


def _neutral(factor: Op, wanted: float) -> tuple[Param, float] | None:
    """The parameter in ``factor``, and what it must be for ``factor`` to be ``wanted``; None for other factors."""
    match factor:
        case Param():
            return factor, wanted
        case Cast(inner, torch.dtype()):
            return _neutral(inner, wanted) if len(factor.users) == 1 else None
        case Op(node=fx.Node(target=aten.add.Tensor, args=(fx.Node() as inner, int() | float() as number))):
            return _neutral(view(inner), wanted - number) if len(factor.users) == 1 else None
        case _:
            return None


def _readers(op: Op) -> list[Weighted] | str:
    """The linears that read ``op``, wherever it is moved to; or what else reads it."""
    found: list[Weighted] = []
    pending = [op]
    while pending:
        x = pending.pop()
        for user in x.users:
            if isinstance(user, Linear | TransposedLinear | GroupedLinear) and user.input_op == x != user.weight_op:
                found.append(user)
            elif moved(user, width(op) or 0) == x and width(user) == width(op):
                pending.append(user)
            elif not isinstance(effect(user), ReadsShape):
                return f"{place(user)}: {user.node.target} reads it"
    return found if found else "no linear reads it"


def _kept(index: GraphIndex, norm: _Norm, readers: list[Weighted]) -> str | None:
    """Why the norm cannot be folded into its readers; None if it can."""
    if norm.why is not None:
        return norm.why
    changed = [(fqn, {op.node for op in norm.uses}) for fqn in norm.neutral]  # with what may read it
    for reader in readers:
        if weight_param(reader) is None:
            return f"{place(reader)}: its weight is computed"
        changed.append((_weight(reader), {reader.node}))
        if norm.has_bias:
            own = _bias(reader)
            if isinstance(reader, GroupedLinear):
                return f"{place(reader)}: experts take no bias"
            if own is None and edit.has_tensor(index.gm, name := bias_name(_weight(reader))):
                return f"{name}: the model has a tensor of this name"
            if own is not None and not (isinstance(own, Param) and own.val.dim() == 1 and width(own) == width(reader)):
                return f"{place(reader)}: its bias is computed"
            changed += [(own.fqn, {reader.node})] if isinstance(own, Param) else []
    names = [fqn for fqn, _ in changed]
    twice = next((fqn for fqn in names if names.count(fqn) > 1), None)
    if twice is not None:
        return f"{twice}: it is read several times"
    reasons = (index.why_shared(fqn, users) for fqn, users in changed)
    return next((reason for reason in reasons if reason is not None), None)


def _weight(reader: Weighted) -> str:
    param = weight_param(reader)
    assert param is not None
    return param.fqn


def _bias(reader: Weighted) -> Any:
    match reader:
        case Linear(_, _, bias):
            return bias
        case TransposedLinear(self_, _, _):
            return self_
        case _:
            return None


def scale_axis(w: Float[Tensor, "*shape"], axis: int, gain: Float[Tensor, " n"]) -> Float[Tensor, "*shape"]:
    """``w`` times ``gain`` along ``axis``."""
    return (w.double().movedim(axis, -1) * gain.double()).movedim(-1, axis).contiguous().to(w.dtype)


def bias_through(w: Float[Tensor, "a b"], axis: int, bias: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    """What a layer of weight ``w`` makes of ``bias``, a vector along its input axis; in float64."""
    return w.double().movedim(axis, -1) @ bias.double()
