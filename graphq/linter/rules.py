"""Whether an op runs in integers by its row in a profile; else the rule that it breaks, the tensor, and the fix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from graphq.linter.graph import DEQUANTIZE, QUANTIZE, Graph, Node, TensorGrid
from graphq.linter.grids import code_range, effective_type, output_grid, source_grid
from graphq.linter.ops import Op, only_reader, row
from graphq.linter.report import Problem, Runs
from graphq.spec.formats import Format, Int
from graphq.spec.profile import GEMM, LINEAR, OpRule, OpTypes, Profile, WeightsAlone
from graphq.spec.quant import PerChannel, PerGroup, PerTensor, Quant

BIAS_TOLERANCE: Final = 1e-5  # of scale_x * scale_w, which float32 rounds to 6e-8


@final
@dataclass(frozen=True)
class Verdict:
    """How an op runs, whether it is one of those that should in integers, and what is in the way."""

    runs: Runs
    counted: bool
    problem: Problem | None = None


def judge(graph: Graph, profile: Profile, op: Op) -> Verdict:
    """How a consumer runs an op, by its profile."""
    if op.node.kind in profile.operators:
        return Verdict("weights" if op.node.kind in ("MatMulNBits", "GatherBlockQuantized") else "integers", True)
    rule = row(profile, op.kind)
    if rule is None:
        known = profile.lacks.get(op.kind)
        reason = f"{profile.name} has no form of {op.kind} in integers" + (f": {known}" if known else "")
        problem = Problem(op.outputs[0], reason, "replace it, or keep it outside of what this consumer runs")
        return Verdict("float", profile.whole, problem if profile.whole else None)
    grids = [source_grid(graph, profile, name) for name in op.inputs]
    alone = not rule.one_reader or only_reader(graph, op.inputs[0]) is not None
    if rule.lifts and alone and not all(grids) and _lifted(graph, profile, rule, op.outputs[0]):
        return Verdict("integers", True)
    stripped = any(name in graph.stripped for name in op.inputs)
    if rule.placed != "always" and not profile.whole and not any(grids) and not stripped:
        return Verdict("float", False)
    problem = _Check(graph, profile, op, rule).problem(grids)
    if problem is None:
        return Verdict("integers", True)
    bias = op.bias is not None and problem.tensor == op.bias
    if bias or graph.grid(op.weight) is None or profile.weights_alone is None or op.kind not in (LINEAR, GEMM):
        return Verdict("float", True, problem)
    stored = _weight_alone(graph, profile.weights_alone, op, grids)
    if stored is None:
        return Verdict("weights", True)
    return Verdict("float", True, problem if any(grids) else stored)


def _lifted(graph: Graph, profile: Profile, rule: OpRule, tensor: str) -> bool:
    """Whether the QuantizeLinear behind an op comes in front of it, between codes of one type that the op takes."""
    grid, reader = output_grid(graph, profile, tensor), only_reader(graph, tensor)
    if grid is None or reader is None:
        return False
    element = effective_type(graph, profile, grid)
    if not any(_is_of(element, grid, types.output) for types in (*rule.types, *rule.also)):
        return False
    behind = reader.kind != QUANTIZE  # further behind: codes of the moved ones are on both sides
    return behind or element == profile.retypes.get(grid.type, grid.type)


def output_axis(op: Op, rank: int) -> int:
    """The axis of a weight's output channels."""
    match op.node.kind:
        case "MatMul":
            return rank - 1
        case "Gemm":
            return 0 if op.node.attributes.get("transB") else 1
        case "ConvTranspose":
            return 1
        case _:
            return 0


@final
@dataclass(frozen=True)
class _Check:
    graph: Graph
    profile: Profile
    op: Op
    rule: OpRule

    def problem(self, grids: Sequence[TensorGrid | None]) -> Problem | None:
        """The first rule that the op breaks."""
        left: Sequence[OpTypes] = (*self.rule.types, *self.rule.also)
        if self.rule.retyped_alone:
            left = [types for types in left if not any(_element(one) in self.profile.retypes for one in types.inputs)]
        for i, (name, grid) in enumerate(zip(self.op.inputs, grids, strict=True)):
            if grid is None and self.rule.float_constants and name in self.graph.constants:
                continue
            allowed = list(dict.fromkeys(str(types.input(i)) for types in left))
            if grid is None and name in self.graph.stripped:
                own, element = self.graph.stripped[name]
                reason = f"it is {element}, which {self.profile.name} leaves in float, not {_any_of(allowed)}"
                return Problem(own, reason, f"quantize it to {allowed[0]}")
            if grid is None and self.op.weight is not None and self.graph.grid(self.op.weight) is None:
                return Problem(
                    name, "neither it nor the weight is quantized", f"quantize it to {allowed[0]}, and the weight"
                )
            if grid is None:
                kind = "a constant in float" if name in self.graph.constants else "not quantized"
                return Problem(name, f"it is {kind}", f"quantize it to {allowed[0]}")
            if grid.scale is None and not self.rule.run_time_scales:
                return Problem(name, "its scale is computed at run time", "give it a scale of calibration")
            fitting = [types for types in left if self._fits(types.input(i), grid)]
            if not fitting:
                beside = f" like {self.op.inputs[0]}" if i else ""
                reason = f"it is {self._described(grid)}, not {_any_of(allowed)}{beside}"
                return Problem(name, reason, self._retype(grid, allowed[0]))
            if self.profile.power_of_two and not _is_power_of_two(grid):
                return Problem(name, "its scale is no power of two", "choose scales of powers of two")
            if grid.scale is not None and self.profile.scales and grid.scale.dtype.name not in self.profile.scales:
                reason = f"its scale is {grid.scale.dtype.name}, not {_any_of(self.profile.scales)}"
                return Problem(name, reason, f"keep the activations in {self.profile.scales[0]}")
            if self.rule.zero_points == "zero" and not grid.symmetric:
                return Problem(
                    name, "its zero point is not 0", f"quantize it to int8, or to {grid.type} with zero point 0"
                )
            left = fitting
        attribute = self._attribute()
        return attribute or self._weight(left) or self._bias(grids) or self._output(left, grids)

    def _attribute(self) -> Problem | None:
        node = self.op.node
        more = [name for name in node.outputs[self.rule.outputs :] if name] if self.rule.outputs is not None else []
        if more:
            return Problem(more[0], f"it is given beside {node.outputs[0]}", "leave it out")
        for name, values in self.rule.attributes.items():
            value: object = node.attributes.get(name, values[0])
            value = value.decode(errors="replace") if isinstance(value, bytes) else value
            if value not in values:
                return Problem(node.outputs[0], f"its {name} is {value}", f"make it {_any_of(list(map(str, values)))}")
        return None

    def _weight(self, left: Sequence[OpTypes]) -> Problem | None:
        wanted = [types.weight for types in left if types.weight is not None]
        if not wanted or self.op.weight is None:
            return None
        name, grid = self.op.weight, self.graph.grid(self.op.weight)
        if name not in self.graph.constants and not (self.rule.run_time_weights and grid is not None):
            return Problem(name, "the weight is computed at run time", "fold it to a constant")
        allowed = list(dict.fromkeys(map(str, wanted)))
        if grid is None:
            return Problem(name, "the weight is in float", f"quantize it to {allowed[0]}")
        rank = self.graph.rank(name) or self.graph.rank(grid.codes) or 2
        if grid.axis is not None and grid.block is None and grid.axis != output_axis(self.op, rank):
            fix = f"its scales belong to axis {output_axis(self.op, rank)}"
            return Problem(name, f"the weight's scales are along axis {grid.axis}", fix)
        if any(_weight_fits(weight, grid) for weight in wanted):
            if self.profile.power_of_two and not _is_power_of_two(grid):
                return Problem(name, "the weight's scale is no power of two", "choose scales of powers of two")
            return None
        zero = "" if grid.symmetric or grid.type.startswith("u") else ", with zero points"
        described = f"{grid.type}/{_granularity(grid)}{zero}"
        return Problem(name, f"the weight is {described}, not {_any_of(allowed)}", f"quantize it to {allowed[0]}")

    def _bias(self, grids: Sequence[TensorGrid | None]) -> Problem | None:
        if self.op.bias is None:
            return None
        grid = self.graph.grid(self.op.bias)
        checked = grid is not None and self.rule.bias == "int32" and self.rule.bias_checked
        if checked and bias_scale_is_off(self.graph, self.op, grids):
            return Problem(self.op.bias, "the bias's scale is not scale x times scale w", "requantize the bias")
        if self.rule.bias_axes == "zero point" and self._has_wide_bias() and grids[0] and grids[0].symmetric:
            return Problem(self.op.bias, "the bias has more axes than what it is added to", "shape the bias [N]")
        quantized = self._quantized_output() is not None
        if self.rule.bias_needed == "never" or (self.rule.bias_needed == "float output" and quantized):
            return None
        if self.rule.bias == "int32":
            if grid is None or grid.type != "int32":
                fix = "write the bias in int32 with scale x times scale w" + (
                    "" if quantized else ", or quantize the output"
                )
                if self.op.node.kind == "MatMul":
                    fix = "shape the bias [1, 1, N], so that MatMul and Add stay apart"
                where = " and the output is not quantized" if self.rule.bias_needed == "float output" else ""
                return Problem(self.op.bias, f"the bias is in float{where}", fix)
        elif grid is not None:
            return Problem(self.op.bias, f"the bias is {grid.type}", "write the bias in float")
        return None

    def _has_wide_bias(self) -> bool:
        added, made = (self.graph.rank(name) for name in (self.op.bias or "", self.op.node.outputs[0]))
        return self.op.node.kind == "MatMul" and added is not None and made is not None and added > made

    def _quantized_output(self) -> TensorGrid | None:
        found = [output_grid(self.graph, self.profile, name) for name in self.op.outputs]
        return found[0] if all(found) else None

    def _output(self, left: Sequence[OpTypes], grids: Sequence[TensorGrid | None]) -> Problem | None:
        rule, source = self.rule, grids[0] if grids else None
        for name in self.op.outputs:
            grid = output_grid(self.graph, self.profile, name)
            readers = [node for node in self.graph.readers.get(name, ()) if node.kind != QUANTIZE]
            also = f"{readers[0].name} reads it, too" if readers else "the model gives it, too"
            alone = only_reader(self.graph, name) is not None
            if grid is None:
                if rule.output == "optional" or (rule.output == "same" and (rule.passes or rule.regrids)):
                    continue
                wanted = source.type if rule.output == "same" and source else str(left[0].output)
                return Problem(name, "it is not quantized", f"quantize it to {wanted}, for all that reads it")
            if rule.one_reader and not alone:
                if not readers and name not in self.graph.outputs:
                    return Problem(name, "two QuantizeLinear read it", "let one grid do for all that reads it")
                return Problem(name, f"{also}, not quantized", "let all read what is dequantized again")
            if rule.output == "same" and not rule.regrids:
                if source is not None and effective_type(self.graph, self.profile, grid) != effective_type(
                    self.graph, self.profile, source
                ):
                    reason = f"it is {self._described(grid)}, and {source.tensor} {self._described(source)}"
                    return Problem(name, reason, self._retype(grid, source.type))
                if source is not None and not grid.same(source):
                    return Problem(
                        name, f"its grid is not that of {source.tensor}", "give both the same scale and zero point"
                    )
            elif rule.output == "required" and not any(self._fits(types.output, grid) for types in left):
                allowed = list(dict.fromkeys(str(types.output) for types in left))
                reason = f"it is {self._described(grid)}, not {_any_of(allowed)}"
                return Problem(name, reason, self._retype(grid, allowed[0]))
            found = self._cut_off(grid)
            if found is not None:
                return found
        return None

    def _cut_off(self, grid: TensorGrid) -> Problem | None:
        """What is wrong where a Relu or Clip stays between an op and its QuantizeLinear."""
        clamp = self.op.clamp
        if clamp is None or self.profile.clamps == "always" or grid.scale is None:
            return None
        low, high = code_range(grid.type)
        zero = 0 if grid.zero_point is None else int(grid.zero_point.reshape(-1)[0])
        scale = float(grid.scale.reshape(-1)[0])
        bounds = self._bounds(clamp)
        if bounds is None:
            reason = f"{clamp.kind} stays in front of it: its bounds are computed at run time"
            return Problem(grid.tensor, reason, "fold them to constants")
        least, most = bounds
        reach = ((low - zero) * scale, (high - zero) * scale)
        slack = scale * 1e-3  # of a step: float32's rounding of the scale
        if reach[0] >= least - slack and reach[1] <= most + slack:
            return None
        reason = f"{clamp.kind} stays in front of it: its grid reaches from {reach[0]:.3g} to {reach[1]:.3g}"
        fix = f"zero point {low}" + (", and a range within the Clip's" if clamp.kind == "Clip" else "")
        return Problem(grid.tensor, reason, f"give it {fix}")

    def _bounds(self, clamp: Node) -> tuple[float, float] | None:
        if clamp.kind == "Relu":
            return 0.0, float("inf")
        if any(name is not None and self.graph.array(name) is None for name in map(clamp.input, (1, 2))):
            return None
        arrays = [self.graph.array(clamp.input(i)) for i in (1, 2)]
        given = [clamp.attributes.get(name) if a is None else a for name, a in zip(("min", "max"), arrays, strict=True)]
        least, most = (None if one is None else float(np.asarray(one).reshape(-1)[0]) for one in given)
        return (-float("inf") if least is None else least), (float("inf") if most is None else most)

    def _fits(self, format: Format, grid: TensorGrid) -> bool:
        """Whether codes on a grid are of the format; as the consumer retypes them."""
        return _is_of(effective_type(self.graph, self.profile, grid), grid, format)

    def _retype(self, grid: TensorGrid, wanted: str) -> str:
        """What mends a type; where the consumer retypes some tensors, the type that it makes of them everywhere."""
        made = self.profile.retypes.get(grid.type)
        return f"quantize it to {wanted}" if made is None else f"quantize all activations to {made}"

    def _described(self, grid: TensorGrid) -> str:
        own = effective_type(self.graph, self.profile, grid)
        if own != grid.type:
            return f"{own} (made of {grid.type}, since one op alone reads it)"
        return own + ("" if grid.symmetric or own.startswith("u") else ", with a zero point")


def _element(format: Format) -> str:
    """The type of codes: int8, with a zero point or without."""
    return str(format).partition("/")[0]


def _is_power_of_two(grid: TensorGrid) -> bool:
    return grid.scale is None or bool(np.all(np.frexp(grid.scale)[0] == 0.5))


def _is_of(element: str, grid: TensorGrid, format: Format) -> bool:
    if not isinstance(format, Int) or not element.endswith(f"int{format.bits}"):
        return False
    if element.startswith("u") == format.signed:
        return False
    return not format.signed or not format.symmetric or grid.symmetric


def _weight_fits(weight: Quant, grid: TensorGrid) -> bool:
    if not _is_of(grid.type, grid, weight.format):
        return False
    match weight.granularity:
        case PerTensor():
            return grid.axis is None
        case PerChannel():
            return grid.axis is not None and grid.block is None
        case PerGroup():
            return grid.block is not None
        case _:
            return False


def _granularity(grid: TensorGrid) -> str:
    return "tensor" if grid.axis is None else "channel" if grid.block is None else f"g{grid.block}"


def _any_of(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def bias_scale_is_off(graph: Graph, op: Op, grids: Sequence[TensorGrid | None]) -> bool:
    """Whether an int32 bias has another scale than the products that it is added to."""
    bias = graph.grid(op.bias)
    weight, x = graph.grid(op.weight), grids[0] if grids else None
    if bias is None or weight is None or x is None or bias.scale is None or weight.scale is None or x.scale is None:
        return False
    products: np.ndarray[Any, Any] = (x.scale * weight.scale).reshape(-1)
    own = bias.scale.reshape(-1)
    return own.size not in (1, products.size) or not np.allclose(own, products, rtol=BIAS_TOLERANCE, atol=0.0)


def _weight_alone(graph: Graph, rule: WeightsAlone, op: Op, grids: Sequence[TensorGrid | None]) -> Problem | None:
    """Why a linear's quantized weight is not multiplied with as it is stored; None where it is."""
    name, grid = op.weight, graph.grid(op.weight)
    assert name is not None
    assert grid is not None
    said = "the weight is dequantized to float:"
    if grid.type not in rule.types:
        return Problem(name, f"{said} its codes are {grid.type}", f"store it in {_any_of(rule.types)}")
    if op.node.attributes.get("transB") and not rule.gemm:
        return Problem(name, f"{said} it is Gemm's and transposed", "write a MatMul by a weight [in, out]")
    shape = graph.shapes.get(name, ())
    if shape and shape[output_axis(op, len(shape))] in range(1, rule.columns):
        return Problem(name, f"{said} it has one column", "leave it in float")
    if grid.block is not None:
        least = f"{rule.smallest_block} or more" + (", a power of two" if rule.power_of_two else "")
        if grid.block < rule.smallest_block or (rule.power_of_two and grid.block & (grid.block - 1)):
            return Problem(name, f"{said} {grid.block} codes share a scale", f"use groups of {least}")
        if not rule.gemm and graph.producers[name].kind != DEQUANTIZE:
            return Problem(
                name, f"{said} it is transposed behind its blocks", "store it [in, out], in blocks along axis 0"
            )
    if not rule.dequantized and any(grids):
        return Problem(name, f"{said} the activations are quantized, too", "leave them in float")
    return None
