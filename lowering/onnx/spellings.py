"""The QDQ form with its linears as one consumer wants them spelled: the same function in other operators.

- ``matmul``: ``MatMul(DQ(x), DQ(W[in, out])) + bias[1, 1, out]``, which ONNX Runtime computes as MatMulIntegerToFloat.
  With a bias of one axis, or as Gemm, it goes back to float.
- ``matmul_integer``: inputs with scales by token, as MatMulInteger of uint8 codes raised to a zero point of 128, then
  ``(y * weight_scale) * scale + bias``. ONNX Runtime 1.31 fuses ``y * (weight_scale * scale) + bias`` and loses the
  bias. Of inputs with a zero point by token, ``zero_point * sum(W)`` is taken off first, in int32.
- ``matmul_nbits``: weights of at most 4 bits as ONNX Runtime's MatMulNBits at accuracy level 0, which rounds no input.
  Weights in groups under inputs by token in 8 bits: at level 4, which rounds the input itself to int8, by group instead
  of by token. That is the one spelling which is not the same function.

What a linear does not fit stays as it is: the portable form is right everywhere.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.edit import copy_graph
from graphq.ir.views import ChooseScale, Dequantize, Linear, Op, Param, Quantize, TransposedLinear, ops_of, view
from graphq.lowering.legalize import where
from graphq.lowering.onnx.form import OnnxBlock, onnx_block, set_tensor
from graphq.lowering.onnx.nbits import BLOCKS, packed_codes, packed_zero_points
from graphq.lowering.onnx.trace_ops import integer_matmul, nbits_matmul
from graphq.numerics import parse_format
from graphq.spec.formats import Int
from graphq.spec.profile import Profile
from graphq.state import put_tensor, same_tensors, tensor_of

aten = torch.ops.aten
_BY: Final = "spell"
Spelling = Literal["matmul", "matmul_integer", "matmul_nbits"]


@final
@dataclass(frozen=True)
class Product:
    """A linear ``x @ weight.T + bias`` in float32; ``weight`` reads its rows ``[N, K]``, ``bias`` is ``[N]``."""

    op: Op
    x: Op
    weight: Dequantize
    bias: Op | None
    format: Int

    @property
    def codes(self) -> str:
        assert isinstance(self.weight.codes, Param)
        return self.weight.codes.fqn

    @property
    def block(self) -> OnnxBlock:
        return onnx_block(self.weight.block, self.weight.val.shape)

    @property
    def is_by_group(self) -> bool:
        """Whether the weight has more scales than one for each of its rows."""
        return self.block not in (OnnxBlock(None, None), OnnxBlock(0, None))


def product_of(op: Op) -> Product | None:
    """The linear with a weight of integers that ``op`` is, None where it is none."""
    match op:
        case Linear(x, weight, bias):
            pass
        case TransposedLinear(bias, x, mat2) if mat2.node.target is aten.t.default:
            weight = view(cast(fx.Node, mat2.node.args[0]))
        case _:
            return None
    if not isinstance(weight, Dequantize) or not isinstance(weight.codes, Param):
        return None
    format = parse_format(weight.format)
    if not isinstance(format, Int) or format.bits > 8 or op.val.dtype != torch.float32:
        return None
    if x.val.dim() < 2 or (bias is not None and bias.val.dim() != 1):
        return None
    return Product(op, x, weight, bias, format)


def token_quantizer(x: Op) -> Quantize | None:
    """What quantizes ``x`` to 8 bits at run time, with scales by token or with one; None where nothing does."""
    match x:
        case Dequantize(Quantize(source, scale) as q) if scale == x.scale and scale.node.target is operator.getitem:
            chosen = view(cast(fx.Node, scale.node.args[0]))
        case _:
            return None
    format = parse_format(q.format)
    by_token = list(q.block) == [1] * (len(q.block) - 1) + [-1] or set(q.block) == {-1}
    fits = isinstance(format, Int) and format.bits == 8 and by_token
    return q if fits and isinstance(chosen, ChooseScale) and chosen.x == source else None


def is_static(x: Op) -> bool:
    """Whether ``x`` comes from codes of 8 bits with one scale that was calibrated."""
    if not isinstance(x, Dequantize) or isinstance(x.codes, Param) or not isinstance(x.scale, Param):
        return False
    format = parse_format(x.format)
    return isinstance(format, Int) and format.bits == 8 and x.scale.val.numel() == 1


@final
@dataclass(frozen=True)
class Choice:
    """How a linear is spelled, None: as it is; and what a user who asked for this profile would not expect of that."""

    spelling: Spelling | None
    note: str = ""


def spelling_of(product: Product, profile: Profile) -> Choice:
    """How ``profile`` wants a linear."""
    dynamic = token_quantizer(product.x) is not None
    bits, by_group = product.format.bits, product.is_by_group
    if dynamic and not by_group and profile.dynamic == "matmul_integer":
        return Choice("matmul_integer")
    form = profile.linear_of_rows if product.x.val.dim() == 2 and profile.linear == "matmul" else profile.linear
    if is_static(product.x) and not by_group and bits > 4 and form == "matmul":
        return Choice("matmul")
    narrow = bits <= 4 or (dynamic and by_group)  # 8 bits at level 0 take ten times as long as in float
    if profile.weight_only != "matmul_nbits" or not product.format.signed or not narrow:
        return Choice(None)
    if _block_size(product) is None:
        return Choice(None, f"MatMulNBits has groups of {', '.join(map(str, BLOCKS))} alone: computed in float")
    return Choice("matmul_nbits", "MatMulNBits rounds its input to int8 by group, not by token" if dynamic else "")


def _block_size(product: Product) -> int | None:
    """The size of MatMulNBits's blocks for a weight, None where it has none such."""
    if product.is_by_group:
        return product.block.size if product.block.axis == 1 and product.block.size in BLOCKS else None
    width = int(product.weight.val.shape[1])
    return next((size for size in reversed(BLOCKS) if width % size == 0), BLOCKS[0])


def spell(gm: fx.GraphModule, profile: Profile, note: Callable[[str], None]) -> fx.GraphModule:
    """A copy of the ONNX form ``gm``, its linears spelled as ``profile`` wants them.

    A weight with several readers, such as a tied head and embedding, is spelled anew where all want it so. A layer that
    stays as it is although its like have a spelling, or that is rounded otherwise, is said to ``note``.
    """
    made = copy_graph(gm)
    products = {p.op: p for op in ops_of(made) if (p := product_of(op)) is not None}
    choices = {op: spelling_of(product, profile) for op, product in products.items()}
    first = same_tensors(made)
    wanted: dict[str, set[Spelling | None]] = {}
    for op in ops_of(made):
        if isinstance(op, Dequantize) and isinstance(op.codes, Param):
            asked = wanted.setdefault(first.get(op.codes.fqn, op.codes.fqn), set())
            asked.update(choices[reader].spelling if reader in choices else None for reader in _readers(op))
    for op, choice in choices.items():
        shared = len(wanted[first.get(products[op].codes, products[op].codes)]) > 1
        reason = "other ops read its weight, too: spelled as for any consumer" if shared else choice.note
        if reason:
            note(f"onnx: {profile.name}: {where(op)}: {reason}")
    speller = _Speller(made, first)
    for product in products.values():
        match list(wanted[first.get(product.codes, product.codes)]):
            case ["matmul"]:
                y = speller.matmul(product)
            case ["matmul_integer"]:
                y = speller.integer_matmul(product)
            case ["matmul_nbits"]:
                y = speller.nbits_matmul(product)
            case _:
                continue
        edit.bypass(made, product.op, y)
    edit.drop_unused(made)
    made.graph.lint()
    made.recompile()
    return made


def _readers(weight: Op) -> list[Op]:
    """What reads a weight, through transposes."""
    readers: list[Op] = []
    for reader in weight.users:
        readers += reader.users if reader.node.target is aten.t.default else [reader]
    return readers


@final
class _Speller:
    """Writes products anew, and each weight that they read once: tied ones stay tied."""

    def __init__(self, gm: fx.GraphModule, first: Mapping[str, str]) -> None:
        self.gm, self.first = gm, first
        self.done: set[str] = set()
        self.made: dict[str, Tensor] = {}
        self.codes: dict[fx.Node, Op] = {}  # of inputs, by what quantizes them

    def _store(self, part: Op | None, change: Callable[[Tensor], Tensor]) -> None:
        """What ``part`` reads is stored as ``change`` of it."""
        if not isinstance(part, Param):
            return
        if part.fqn not in self.done:
            name = self.first.get(part.fqn, part.fqn)
            if name not in self.made:
                self.made[name] = change(tensor_of(self.gm, part.fqn).detach())
            self.done.add(part.fqn)
            put_tensor(self.gm, part.fqn, self.made[name])
        set_tensor(self.gm, part, tensor_of(self.gm, part.fqn))

    def _insert(self, product: Product, target: Any, *args: Any) -> Op:
        return edit.insert(self.gm, product.op, target, *args, by=_BY)

    def matmul(self, product: Product) -> Op:
        """In ranks of 3 and more: a Gemm, which ONNX Runtime makes of two axes, is not fused."""
        weight = product.weight
        self._store(weight.codes, _transposed)
        block = list(weight.block)[::-1]
        parts = (weight.codes, weight.scale, weight.zero_point, None, weight.format, block, weight.dtype)
        y = self._insert(product, aten.matmul.default, product.x, self._insert(product, Dequantize.target, *parts))
        if product.bias is None:
            return y
        bias, rank = product.bias, y.val.dim()
        for _ in range(2):
            bias = self._insert(product, aten.unsqueeze.default, bias, 0)
        y = self._insert(product, aten.add.Tensor, y, bias)
        return y if rank > 2 else self._insert(product, aten.squeeze.dim, y, 0)

    def integer_matmul(self, product: Product) -> Op:
        q, weight = token_quantizer(product.x), product.weight
        assert q is not None, "so spelled"
        format = parse_format(q.format)
        assert isinstance(format, Int), "of 8 bits"
        raised = 128 if format.signed else 0
        if raised and q.node not in self.codes:
            self.codes[q.node] = self._raised(q, format)
        self._store(weight.codes, _transposed)
        codes = self.codes.get(q.node, q)
        y = self._insert(product, integer_matmul, codes, weight.codes, weight.zero_point, raised, weight.format)
        if q.zero_point is not None:
            zero_point = self._insert(product, aten.to.dtype, q.zero_point, torch.int32)
            sums = self._insert(product, aten.mul.Tensor, zero_point, self._sums(product))
            y = self._insert(product, aten.sub.Tensor, y, sums)
        y = self._insert(product, aten.to.dtype, y, torch.float32)
        y = self._insert(product, aten.mul.Tensor, y, weight.scale)
        y = self._insert(product, aten.mul.Tensor, y, q.scale)
        return y if product.bias is None else self._insert(product, aten.add.Tensor, y, product.bias)

    def _raised(self, q: Quantize, format: Int) -> Op:
        """The codes of ``q`` as bytes, each 128 more."""

        def insert(target: Any, *args: Any, **options: Any) -> Op:
            return edit.insert(self.gm, q, target, *args, by=_BY, like=q, options=options)

        if q.zero_point is None:
            zero_point = insert(aten.full.default, [], 128, dtype=torch.uint8)
        else:
            zero_point = insert(aten.add.Tensor, insert(aten.to.dtype, q.zero_point, torch.int32), 128)
            zero_point = insert(aten.to.dtype, zero_point, torch.uint8)
        unsigned = Int(8, symmetric=False, signed=False, joint=format.joint)
        return insert(Quantize.target, q.x, q.scale, zero_point, None, str(unsigned), list(q.block))

    def _sums(self, product: Product) -> Op:
        """The sum of each of the weight's columns ``[N]``, less its zero points."""
        name = f"{product.codes}_sums"
        if not edit.has_tensor(self.gm, name):
            codes = tensor_of(self.gm, product.codes).to(torch.int32)
            zero_point = product.weight.zero_point
            if isinstance(zero_point, Param):
                codes = codes - tensor_of(self.gm, zero_point.fqn).to(torch.int32)
            return edit.add_tensor(self.gm, product.op, name, codes.sum(0, dtype=torch.int32), by=_BY)
        with self.gm.graph.inserting_before(product.op.node):
            node = self.gm.graph.get_attr(name)
        node.meta["val"] = edit.fake_mode_of(self.gm).from_tensor(tensor_of(self.gm, name), static_shapes=True)
        return view(node)

    def nbits_matmul(self, product: Product) -> Op:
        weight, size = product.weight, _block_size(product)
        q = token_quantizer(product.x) if product.is_by_group else None
        n, k = (int(length) for length in weight.val.shape)
        assert size is not None, "so spelled"
        bits, blocks = (4 if product.format.bits <= 4 else 8), -(-k // size)

        def by_block(part: Tensor) -> Tensor:
            return part if part.dim() == 2 else part.reshape(-1, 1).expand(n, blocks)

        self._store(weight.codes, lambda codes: packed_codes(codes, bits, size))
        self._store(weight.zero_point, lambda zero_point: packed_zero_points(by_block(zero_point), bits))
        scale = weight.scale
        if not product.is_by_group:
            scale = self._insert(product, aten.reshape.default, scale, [-1, 1])
            scale = self._insert(product, aten.expand.default, scale, [n, blocks])
        x, level = (product.x, 0) if q is None else (q.x, 4)
        layout = (k, n, bits, size, level)
        return self._insert(product, nbits_matmul, x, weight.codes, scale, weight.zero_point, product.bias, *layout)


def _transposed(codes: Tensor) -> Tensor:
    return codes.t().contiguous()
