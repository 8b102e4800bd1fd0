"""What a consumer runs, and not as one might think: zero points that are left out, rounded or lost biases, saturating
products, activations that become int8 by the way, known faults.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from graphq.linter.graph import DEQUANTIZE, QUANTIZE, Graph
from graphq.linter.grids import output_grid, source_grid
from graphq.linter.ops import Op, row
from graphq.linter.report import LintWarning
from graphq.linter.rules import Verdict, bias_scale_is_off
from graphq.spec.formats import Int
from graphq.spec.profile import Profile

_SEVEN_BITS: Final = 64
_LARGE: Final = 1 << 24  # elements: one of so many has more than seven bits, and reading all takes long
_INT32: Final = 2**31


def warnings_of(graph: Graph, profile: Profile, verdicts: Mapping[Op, Verdict]) -> Iterator[LintWarning]:
    """Each of them, once for all that it holds of."""
    yield from _zero_points(graph)
    yield from _float_weights(graph, profile)
    running = [op for op, verdict in verdicts.items() if verdict.runs == "integers"]
    yield from _saturation(graph, profile, running)
    yield from _weights_alone(profile, [op for op, verdict in verdicts.items() if verdict.runs == "weights"])
    for op in running:
        yield from _bias(graph, profile, op)
        yield from _fixed_grid(graph, profile, op)
    yield from _faults(graph, profile, running)
    if profile.linear == "gemm" and profile.whole:
        apart = [op.node.name for op in verdicts if op.node.kind == "MatMul" and op.bias is not None]
        if apart:
            reason = f"a MatMul and an Add are two ops to {profile.name}"
            yield LintWarning(_named(apart), reason, "write a Gemm with a bias")


def _named(names: Sequence[str]) -> str:
    """The names, or the first three and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _zero_points(graph: Graph) -> Iterator[LintWarning]:
    bare = [node.name for node in graph.nodes if node.kind in (QUANTIZE, DEQUANTIZE) and node.input(2) is None]
    if bare:
        reason = (
            "no zero point: two vendors' compilers refuse or misread QuantizeLinear and DequantizeLinear without one"
        )
        yield LintWarning(_named(bare), reason, "write zero points of 0, in the codes' type")


def _float_weights(graph: Graph, profile: Profile) -> Iterator[LintWarning]:
    """Recurrent ops with codes as weights beside quantized activations, which the consumer does not load."""
    if not any(node.kind == QUANTIZE for node in graph.nodes):
        return
    met = [
        node
        for node in graph.nodes
        if node.kind in profile.float_weights and any(graph.grid(node.input(i)) is not None for i in (1, 2))
    ]
    if met:
        reason = f"{profile.name} does not load codes as weights of {met[0].kind} beside quantized activations"
        fix = f"write these weights as floats, as graphq's profile {profile.name} does"
        yield LintWarning(_named([node.name for node in met]), reason, fix)


def _saturation(graph: Graph, profile: Profile, running: Sequence[Op]) -> Iterator[LintWarning]:
    if not profile.saturates:
        return
    wide: list[str] = []
    for op in running:
        x, weight = source_grid(graph, profile, op.inputs[0]), graph.grid(op.weight)
        if x is None or weight is None or x.type != "uint8" or weight.type != "int8":
            continue
        if np.prod([size for size in graph.shapes.get(weight.codes, ()) if isinstance(size, int)]) > _LARGE:
            wide.append(op.node.name)
            continue
        codes = graph.array(weight.codes)
        if codes is not None and np.any(np.abs(codes.astype(np.int16)) > _SEVEN_BITS):
            wide.append(op.node.name)
    if wide:
        base = profile.name.partition("+")[0]
        fix = f"quantize weights to 7 bits (profile {base}+reduce_range) where such machines count"
        yield LintWarning(_named(wide), f"products of uint8 and int8 saturate {profile.saturates}", fix)


def _weights_alone(profile: Profile, ops: Sequence[Op]) -> Iterator[LintWarning]:
    rule = profile.weights_alone
    if ops and rule is not None and rule.rounded:
        yield LintWarning(_named([op.node.name for op in ops]), rule.rounded, rule.exact)


def _bias(graph: Graph, profile: Profile, op: Op) -> Iterator[LintWarning]:
    """A bias whose scale is not that of the products; or one in float that the consumer rounds to it, and loses."""
    rule = row(profile, op.kind)
    if op.bias is None or rule is None:
        return
    x, weight = source_grid(graph, profile, op.inputs[0]), graph.grid(op.weight)
    if graph.grid(op.bias) is not None:
        if bias_scale_is_off(graph, op, [x]):
            reason = "the bias's scale is not scale x times scale w, by which kernels in integers read it"
            yield LintWarning(f"{op.node.name}: {op.bias}", reason, "requantize the bias")
        return
    out, bias = output_grid(graph, profile, op.outputs[0]), graph.array(op.bias)
    if rule.bias != "int32" or out is None or bias is None or x is None or weight is None:
        return
    if x.scale is None or weight.scale is None or out.scale is None:
        return
    products: np.ndarray[Any, Any] = (x.scale * weight.scale).reshape(-1).astype(np.float64)
    if products.size not in (1, bias.size) or not np.all((products > 0) & np.isfinite(products)):
        return
    codes = np.round(bias.reshape(-1) / products)
    error = np.abs(np.clip(codes, -_INT32, _INT32 - 1) * products - bias.reshape(-1))
    lost = np.flatnonzero(error > float(out.scale.reshape(-1)[0]) / 2)
    if lost.size:
        reason = (
            f"the bias is rounded to int32 with scale x times scale w, which takes up to {error.max():.3g} from"
            f" {lost.size} of {codes.size} channels (channel {lost[0]} first)"
        )
        yield LintWarning(
            f"{op.node.name}: {op.bias}", reason, "choose the weight's scales of these channels by their bias"
        )


def _fixed_grid(graph: Graph, profile: Profile, op: Op) -> Iterator[LintWarning]:
    """An output on another grid than the one that the consumer wants of this kind of op."""
    rule = row(profile, op.kind)
    grid = output_grid(graph, profile, op.outputs[0])
    wanted = rule.grids.get(grid.type) if rule is not None and grid is not None else None
    if wanted is None or grid is None or grid.scale is None:
        return
    zero = 0 if grid.zero_point is None else int(grid.zero_point.reshape(-1)[0])
    scale = float(grid.scale.reshape(-1)[0])
    if zero != wanted.zero_point or not np.isclose(scale, wanted.scale, rtol=1e-6, atol=0.0):
        said = f"scale {wanted.scale:.6g} and zero point {wanted.zero_point}"
        reason = f"the output has scale {scale:.6g} and zero point {zero}; {profile.name} computes with {said}"
        yield LintWarning(f"{op.node.name}: {op.outputs[0]}", reason, f"give it {said}")


def _faults(graph: Graph, profile: Profile, running: Sequence[Op]) -> Iterator[LintWarning]:
    met: dict[tuple[str, str], list[str]] = {}
    for op in running:
        rule = row(profile, op.kind)
        grids = [source_grid(graph, profile, name) for name in op.inputs]
        for fault in () if rule is None else rule.faults:
            for grid in filter(None, grids):
                wanted = [
                    f
                    for f in fault.inputs
                    if isinstance(f, Int) and grid.type == f"{'' if f.signed else 'u'}int{f.bits}"
                ]
                if any(f.symmetric or not grid.symmetric for f in wanted):
                    met.setdefault((f"{op.kind} of {grid.type} {fault.effect}", fault.instead), []).append(op.node.name)
                    break
    for (reason, instead), names in met.items():
        yield LintWarning(_named(names), reason, instead)
