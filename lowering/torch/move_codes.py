"""What only moves elements is run on codes, where both sides of it are on one grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import Moves
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Dequantize, Op, Param, Quantize, ops_of, view
from graphq.lowering.torch.chains import is_same_grid, is_static
from graphq.runtime import ops
from graphq.state import tensor_of

aten = torch.ops.aten
_ALSO: Final = (aten.cat.default, aten.index_select.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
_UNSIGNED: Final = (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
_SMALLEST: Final = 2.0**-100  # scales between which a code's value is quantized to the code itself
_LARGEST: Final = 2.0**100


@final
@dataclass(frozen=True)
class MoveCodes(Pass):
    """The codes of moved values are the moved codes, exactly: where what is moved, joined or pooled by its maximum was
    dequantized, and is quantized on the same grid, the op runs on codes, in a quarter of the bytes.
    """

    name: ClassVar[str] = "move-codes"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        made: dict[tuple[Op, str], Op | None] = {}
        changes = 0
        for op in ops_of(gm):
            if isinstance(op, Quantize) and is_static(op) and _is_exact(gm, op):
                codes = self._codes_of(gm, op.x, op, made)
                if codes is not None:
                    edit.bypass(gm, op, codes)
                    changes += 1
        if changes:
            edit.drop_unused(gm)
        return changes

    def _codes_of(self, gm: fx.GraphModule, x: Op, on: Quantize, made: dict[tuple[Op, str], Op | None]) -> Op | None:
        """What has the codes of ``x`` on the grid of ``on``, in front of it; None where ``x`` is computed in float.

        ``made``: what was found before, by the op and the grid's scale.
        """
        key = (x, f"{on.format} {cast(Param, on.scale).fqn}")
        if key not in made:
            made[key] = self._moved(gm, x, on, made)
        return made[key]

    def _moved(self, gm: fx.GraphModule, x: Op, on: Quantize, made: dict[tuple[Op, str], Op | None]) -> Op | None:
        if isinstance(x, Dequantize):
            return x.codes if is_static(x) and is_same_grid(x, on) else None
        pooled = x.node.target == aten.max_pool2d.default
        if x.val.dim() != 4 if pooled else not _moves(x, on):
            return None
        found: dict[fx.Node, fx.Node] = {}
        for node in x.node.all_input_nodes:
            if _is_of_floats(node.meta.get("val")):
                codes = self._codes_of(gm, view(node), on, made)
                if codes is None:
                    return None
                found[node] = codes.node
        if pooled:
            codes = found[cast(fx.Node, x.argument("self"))]
            pairs = [_pair(x.argument(name)) for name in ("kernel_size", "stride", "padding", "dilation")]
            args = (view(codes), pairs[0], pairs[1] or pairs[0], pairs[2], pairs[3], x.argument("ceil_mode"))
            return edit.insert(gm, on, ops.max_pool2d, *args, by=self.name, like=x, val=_as(x.val, on.val.dtype))
        args = map_arg(x.node.args, lambda node: found.get(node, node))
        target, val = cast(Any, x.node.target), _as(x.val, on.val.dtype)
        return edit.insert(gm, on, target, *cast(Any, args), by=self.name, like=x, options=x.node.kwargs, val=val)


def _moves(x: Op, on: Quantize) -> bool:
    """Whether an op gives elements of what it reads, whatever their type is."""
    if any(isinstance(value, fx.Node) for value in x.node.kwargs.values()):
        return False
    is_unsigned = on.format.startswith("uint8")  # of signed bytes torch has no kernel for them
    target = x.node.target
    return isinstance(effect(x), Moves) or target in _ALSO or (is_unsigned and target in _UNSIGNED)


def _is_of_floats(val: object) -> bool:
    if isinstance(val, list | tuple):
        return any(map(_is_of_floats, cast(Sequence[object], val)))
    return isinstance(val, Tensor) and val.is_floating_point()


def _as(val: Any, dtype: torch.dtype) -> Any:
    """The same shapes, in another dtype."""
    return val.to(dtype) if isinstance(val, Tensor) else [_as(part, dtype) for part in val]


def _pair(sizes: Sequence[int]) -> list[int]:
    return [*sizes] * 2 if len(sizes) == 1 else [*sizes]


def _is_exact(gm: fx.GraphModule, op: Quantize) -> bool:
    """Whether a code's value, which is rounded to float32, is quantized to the code itself."""
    scale = float(tensor_of(gm, cast(Param, op.scale).fqn))
    return _SMALLEST < scale < _LARGEST
