"""Scales that are chosen from an activation, and its codes by them, are found in one walk over it.

    scale, zero = choose_scale(x); q = quantize(x, scale, zero)   ->   q, scale, zero = quantize_dynamic(x)

Every linear that reads the same activation reads the same codes: one ``quantize_dynamic`` takes the place of all
quantizers of one ``choose_scale``.
"""

import operator
from typing import Final

from torch import fx

from graphq.ir import edit
from graphq.ir.views import ChooseScale, Op, Quantize, ops_of
from graphq.runtime import ops
from graphq.spec.formats import is_asymmetric, parse_format

_BY: Final = "fuse_quantization"


def fuse_quantization(gm: fx.GraphModule) -> int:
    """Rewrites the packed graph ``gm`` in place; gives the number of scales that are no longer chosen apart."""
    count = 0
    for op in ops_of(gm):
        if isinstance(op, ChooseScale):
            count += _fuse(gm, op)
    return count


def _fuse(gm: fx.GraphModule, chosen: ChooseScale) -> bool:
    if chosen.argument("global_scale") is not None:
        return False
    items = {user.node.args[1]: user for user in chosen.users if user.node.target is operator.getitem}
    scale, zero_point = items.get(0), items.get(1)
    wanted = zero_point if is_asymmetric(parse_format(chosen.format)) else None
    if scale is None:
        return False
    quantizers = [user for user in scale.users if isinstance(user, Quantize) and _is_by(user, chosen, scale, wanted)]
    if not quantizers:
        return False
    made = edit.insert(
        gm, chosen, ops.quantize_dynamic, chosen.x, chosen.format, chosen.block, by=_BY, like=quantizers[0]
    )
    found: dict[int, Op] = dict(enumerate(edit.items(gm, made, 3 if zero_point is not None else 2, by=_BY)))
    for quantizer in quantizers:
        edit.bypass(gm, quantizer, found[0])
    edit.bypass(gm, scale, found[1])
    if zero_point is not None:
        edit.bypass(gm, zero_point, found[2])
    gm.graph.erase_node(chosen.node)
    return True


def _is_by(op: Quantize, chosen: ChooseScale, scale: Op, zero_point: Op | None) -> bool:
    """Whether ``op`` quantizes what the scale was chosen from, as it was chosen."""
    return (
        op.x == chosen.x
        and op.scale == scale
        and op.zero_point == zero_point
        and op.global_scale is None
        and op.format == chosen.format
        and list(op.block) == list(chosen.block)
    )
