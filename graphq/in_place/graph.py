"""One layer of a module tree as a graph of its own, on which the passes run as they do on a whole model's."""

from typing import Any, Final

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from graphq.capture.source import BATCH, KEY, Source, TensorInput
from graphq.ir.layers import LAYER, PLAN
from graphq.numerics import Scales
from graphq.runtime.layers import Convolution, Factors, Form
from graphq.spec.plan import Plan
from graphq.state import put_tensor

aten = torch.ops.aten
Layer = nn.Linear | nn.Conv2d
_ROWS: Final = 2


def form_of(layer: Layer, plan: Plan) -> Form:
    """What a float layer is when it is quantized as planned."""
    convolution = None
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        convolution = Convolution(tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)
    assert plan.weight is not None, "refused by quantize"
    return Form(tuple(layer.weight.shape), layer.weight.dtype, plan.weight, plan.input, convolution)


def layer_graph(fqn: str, layer: Layer, form: Form) -> fx.GraphModule:
    """The graph of a layer alone, of a flat input, with its plan. It holds the layer's own tensors."""
    root, graph = nn.Module(), fx.Graph()
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    conv = form.convolution
    x = graph.placeholder("x")
    x.target = x.name
    shape: tuple[int, ...] = (_ROWS, form.shape[1])
    if conv is not None:
        taps = (dilation * (size - 1) + 1 for size, dilation in zip(form.shape[2:], conv.dilation, strict=True))
        shape = (_ROWS, form.shape[1] * conv.groups, *taps)
    with mode:
        x.meta["val"] = torch.empty(shape, dtype=form.dtype, device=layer.weight.device)
    reads: list[fx.Node | None] = []
    for name, tensor in (("weight", layer.weight), ("bias", layer.bias)):
        if tensor is None:
            reads.append(None)
            continue
        put_tensor(root, f"{fqn}.{name}", tensor)
        read = graph.get_attr(f"{fqn}.{name}")
        read.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
        reads.append(read)
    op = aten.linear.default
    args: tuple[Any, ...] = (x, *reads)
    if conv is not None:
        op = aten.conv2d.padding if isinstance(conv.padding, str) else aten.conv2d.default
        padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
        args = (*args, list(conv.stride), padding, list(conv.dilation), conv.groups)
    node = graph.call_function(op, args)
    with mode, torch.no_grad():
        node.meta["val"] = op(*map_arg(args, lambda n: n.meta["val"]))
    node.meta |= {LAYER: fqn, PLAN: Plan(form.weight, form.input)}
    graph.output((node,))
    gm = fx.GraphModule(root, graph)
    inputs = (TensorInput("x", form.dtype, (BATCH, *shape[1:])),)
    gm.meta[KEY] = Source(inputs, ("output",), "tensor", form.dtype)
    return gm


def factors_of(gm: fx.GraphModule, fqn: str) -> Factors:
    """What the passes found, from the QDQ form of ``layer_graph``."""
    held = {name.removeprefix(f"{fqn}."): tensor for name, tensor in gm.state_dict().items()}
    weight = Scales(held["weight_scale"], held.get("weight_zero_point"), held.get("weight_global_scale"))
    scale = held.get("input_scale", held.get("input_global_scale"))
    fixed = None if scale is None else Scales(scale, held.get("input_zero_point"))
    return Factors(held["weight"], weight, fixed, held.get("input_factor"))
