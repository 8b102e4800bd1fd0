"""Caches of codes in ONNX's terms: its Concat joins no float8, and few runtimes take bfloat16 from their callers.

Codes of float8 are joined dequantized, and quantized again for the output: what the value of a code is quantized to is
that code. Scales of run time are rounded to bfloat16 as in the QDQ form, and are float32 where they come in and go out.
"""

from dataclasses import replace
from typing import Final

import torch
from torch import fx

from graphq.capture.source import KEY, source_of
from graphq.ir import edit
from graphq.ir.index import GraphIndex
from graphq.ir.views import Dequantize, Op, Quantize, view
from graphq.runtime import ops
from graphq.spec.formats import Float, parse_format

aten = torch.ops.aten
_BY: Final = "onnx-form"


def spell_caches(gm: fx.GraphModule) -> int:
    """Every cache of codes is one that ONNX can write; how many were changed."""
    index = GraphIndex(gm)
    pairs = [(view(past), view(present)) for present, past in index.caches.items()]
    widened = [_widen_scales(gm, past, present) for past, present in pairs]
    names = [name for past, name in index.input_names.items() if any(one == view(past) for one in widened)]
    source = source_of(gm)
    inputs = tuple(replace(i, dtype=torch.float32) if i.name in names else i for i in source.inputs)
    gm.meta[KEY] = replace(source, inputs=inputs)
    joined = [_join_values(gm, past, present) for past, present in pairs]
    edit.drop_unused(gm)
    return len(names) + sum(joined)


def holds_scales(op: Op) -> bool:
    """Whether an op gives scales of a cache of codes: alone what is quantized or dequantized reads them."""
    readers = [user for user in op.users if user.node.op != "output"]
    return bool(readers) and all(
        (isinstance(user, Quantize | Dequantize) and user.scale == op)
        or (user.node.target is aten.cat.default and holds_scales(user))
        for user in readers
    )


def _widen_scales(gm: fx.GraphModule, past: Op, present: Op) -> Op | None:
    """The cache, if it is one of scales, which are float32 then."""
    if past.val.dtype != torch.bfloat16 or not holds_scales(present):
        return None
    new = view(present.argument("tensors")[1])
    wide = edit.insert(gm, edit.following(new), aten.to.dtype, new, torch.float32, by=_BY, like=new)
    for user in new.users:
        if user != wide:
            user.node.replace_input_with(new.node, wide.node)
    for op in (past, present):
        op.node.meta["val"] = op.val.to(torch.float32)
    return past


def _join_values(gm: fx.GraphModule, past: Op, present: Op) -> bool:
    """Codes of floats are joined as their values. Gives whether it is so."""
    readers = [user for user in present.users if isinstance(user, Dequantize) and user.codes == present]
    if not readers or not isinstance(parse_format(readers[0].format), Float):
        return False
    new = view(present.argument("tensors")[1])
    read, axis = readers[0], present.argument("dim")
    rest = (read.zero_point, read.global_scale, read.format, list(read.block))
    own, whole = (new.scale, read.scale) if isinstance(new, Quantize) else (read.scale, read.scale)
    before = past if own == whole else view(read.scale.argument("tensors")[0])
    level = whole if own == whole else before
    values = [
        edit.insert(gm, read, ops.dequantize, codes, scale, *rest, read.val.dtype, by=_BY)
        for codes, scale in ((past, level), (new, own))
    ]
    joined = edit.insert(gm, read, aten.cat.default, values, axis, by=_BY)
    again = edit.insert(gm, read, ops.quantize, joined, whole, *rest, by=_BY)
    for reader in readers:
        edit.bypass(gm, reader, joined)
    edit.bypass(gm, present, again)
    return True
