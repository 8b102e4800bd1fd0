"""The kind of each op, as profiles and rules for activations name it: ONNX's op types, after what an op is exported to.

``Linear`` is a product with a constant weight, ``MatMul`` one of two activations, ``Input`` an input of the graph.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from graphq.ir.layers import gives_gates
from graphq.ir.views import Embedding, Input, Linear, Op, Param, Recurrence, Weighted, view
from graphq.runtime import ops

aten = torch.ops.aten

_ROWS: Final[tuple[tuple[str, tuple[Any, ...]], ...]] = (
    ("Linear", (aten.linear.default, aten.addmm.default)),
    ("Experts", (ops.grouped_linear,)),
    (
        "Conv",
        (
            *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
            *(aten.conv3d.default, aten.conv3d.padding),
        ),
    ),
    ("ConvTranspose", (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)),
    ("MatMul", (aten.matmul.default, aten.bmm.default, aten.mm.default)),
    ("Attention", (aten.scaled_dot_product_attention.default,)),
    ("Add", (aten.add.Tensor, aten.add.Scalar)),
    ("Sub", (aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar)),
    ("Mul", (aten.mul.Tensor, aten.mul.Scalar)),
    ("Div", (aten.div.Tensor, aten.div.Scalar)),
    ("Neg", (aten.neg.default,)),
    ("Pow", (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)),
    ("Sqrt", (aten.sqrt.default,)),
    ("Exp", (aten.exp.default,)),
    ("Erf", (aten.erf.default,)),
    ("Relu", (aten.relu.default,)),
    ("Clip", (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default)),
    ("Clip", (aten.relu6.default,)),
    ("LeakyRelu", (aten.leaky_relu.default,)),
    ("PRelu", (aten.prelu.default,)),
    ("Elu", (aten.elu.default,)),
    ("Sigmoid", (aten.sigmoid.default,)),
    ("HardSigmoid", (aten.hardsigmoid.default,)),
    ("Tanh", (aten.tanh.default,)),
    ("Gelu", (aten.gelu.default,)),
    ("Silu", (aten.silu.default,)),
    ("HardSwish", (aten.hardswish.default,)),
    ("Softmax", (aten.softmax.int, aten._softmax.default)),
    ("LayerNormalization", (aten.layer_norm.default,)),
    ("RMSNormalization", (aten.rms_norm.default,)),
    ("GroupNormalization", (aten.group_norm.default,)),
    ("InstanceNormalization", (aten.instance_norm.default,)),
    ("BatchNormalization", (aten.batch_norm.default,)),
    ("Concat", (aten.cat.default,)),
    ("AveragePool", (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)),
    (
        "GlobalAveragePool",
        (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    ),
    ("ReduceMean", (aten.mean.dim,)),
    ("ReduceSum", (aten.sum.dim_IntList,)),
    ("Where", (aten.where.self,)),
    ("Max", (aten.maximum.default,)),
    ("Min", (aten.minimum.default,)),
    ("ReduceMax", (aten.amax.default,)),
    ("ReduceMin", (aten.amin.default,)),
    ("MaxPool", (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)),
    ("Pad", (aten.constant_pad_nd.default, aten.pad.default)),
    (
        "Resize",
        (
            *(aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec),
            *(aten.upsample_nearest1d.vec, aten.upsample_linear1d.vec, aten.upsample_nearest3d.vec),
            *(aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default),
        ),
    ),
    ("GridSample", (aten.grid_sampler.default, aten.grid_sampler_2d.default)),
    ("Reshape", (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)),
    ("Reshape", (aten.unflatten.int,)),
    ("Unsqueeze", (aten.unsqueeze.default,)),
    ("Squeeze", (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)),
    (
        "Transpose",
        (
            *(aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.numpy_T.default),
            *(aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default),
        ),
    ),
    ("Slice", (aten.slice.Tensor, aten.narrow.default)),
    ("Gather", (aten.select.int, aten.index_select.default)),
    ("Expand", (aten.expand.default,)),
    ("Tile", (aten.repeat.default,)),
    ("Split", (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)),
    ("DepthToSpace", (aten.pixel_shuffle.default,)),
    ("SpaceToDepth", (aten.pixel_unshuffle.default,)),
    ("LSTM", (aten.lstm.input,)),
    ("GRU", (aten.gru.input,)),
)
_KINDS: Final[Mapping[Any, str]] = {target: kind for kind, targets in _ROWS for target in targets}
assert len(_KINDS) == sum(len(targets) for _, targets in _ROWS), "an op has two kinds"
INPUT: Final = "Input"
KINDS: Final = (*dict.fromkeys(kind for kind, _ in _ROWS), "Embedding", INPUT)


def kind_of(op: Op) -> str:
    """The kind of an op; the last part of its own name for one that no row has, such as ``cumsum``."""
    if isinstance(op, Input):
        return INPUT
    if isinstance(op, Embedding):
        return "Embedding"
    if isinstance(op, Linear) and gives_gates(op):  # of which consumers make one op
        return kind_of(op.users[0])
    if isinstance(op, Recurrence):
        return op.kind.upper() if op.kind in ("lstm", "gru") else "RNN"
    kind = _KINDS.get(op.node.target)
    if kind is not None and not (kind in ("Add", "Sub") and op.argument("alpha") != 1):
        return kind
    name = str(op.node.target)
    return name.split(".")[1] if name.startswith("aten.") else name


def gives_no_negatives(op: Op) -> bool:
    """Whether no element that an op gives is below 0, whatever it reads."""
    kind = kind_of(op)
    if kind == "Clip" and op.node.target is not aten.relu6.default:
        name = "min_val" if op.node.target is aten.hardtanh.default else "min"
        least = op.argument(name) if name in {argument.name for argument in op.schema()} else None
        return isinstance(least, int | float) and least >= 0
    return kind in ("Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax")


def is_float(op: Op) -> bool:
    """Whether an op gives one tensor of floating-point numbers."""
    return isinstance(op.val, Tensor) and op.val.is_floating_point()


def activations_of(op: Op) -> tuple[Op, ...]:
    """The float tensors that an op computes from, in order, each once; of a layer without weight and bias, of a norm
    without gain and bias.
    """
    if isinstance(op, Embedding):  # rows of its weight, which is looked up as any other tensor is
        return (op.weight_op,) if isinstance(op.weight_op, Param) else ()
    if isinstance(op, Weighted):
        return (op.input_op,) if is_float(op.input_op) else ()
    names = {argument.name for argument in op.schema()}
    own = {"weight", "bias", "running_mean", "running_var"} if "input" in names else set[str]()
    parameters = {op.argument(name) for name in own & names}
    found = [view(node) for node in op.node.all_input_nodes if node not in parameters]
    return tuple(one for one in dict.fromkeys(found) if is_float(one))
