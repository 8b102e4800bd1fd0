"""graphq's ops in ONNX, as torch's exporter takes them: in opset 18, which ``graphq.lowering.onnx.opset`` lowers.

Weights go through DequantizeLinear: per tensor with a scalar scale, per axis with a 1-D scale, and in all other cases
blocked along one axis, whose scales are expanded along the others (ONNX: "the same rank with one dimension divided").
A second level of scales makes one number with the first before that, as ``numerics.effective_scale`` does.
"""

import math
from collections.abc import Callable, Container, Sequence
from typing import Any, Final

import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import values

from graphq import numerics
from graphq.lowering.experts import expert_linears
from graphq.lowering.onnx.form import onnx_block
from graphq.lowering.onnx.recurrence import onnx_recurrence, recurrence
from graphq.lowering.onnx.trace_ops import integer_matmul, nbits_matmul
from graphq.numerics import mx
from graphq.numerics.scales import BY_SIGN_SMALLEST
from graphq.runtime import ops
from graphq.spec.formats import Float, Format, Int, Mx, Nvfp4, TwoLevel

op18: Any = onnxscript.opset18  # untyped: its annotations are those of eager tensors
op20: Any = onnxscript.opset20
op21: Any = onnxscript.opset21
op23: Any = onnxscript.opset23
MICROSOFT: Final = "com.microsoft"
_LN2: Final = math.log(2.0)
_TINY: Final = torch.finfo(torch.float32).tiny


def _matmul_nbits() -> Any:
    """ONNX Runtime's contributed op, whose schema onnx does not have: the inputs and attributes that are used here.
    Source: ONNX Runtime's contributed operators, com.microsoft.MatMulNBits.
    """
    optional = OpSchema.FormalParameterOption.Optional
    parameter, attribute = OpSchema.FormalParameter, OpSchema.Attribute
    required = [parameter("A", "T"), parameter("B", "U"), parameter("scales", "T")]
    further = [("zero_points", "U"), ("g_idx", "I"), ("bias", "T")]
    schema = OpSchema(
        "MatMulNBits",
        MICROSOFT,
        1,
        inputs=[*required, *(parameter(name, kind, param_option=optional) for name, kind in further)],
        outputs=[parameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("U", ["tensor(uint8)"], ""), ("I", ["tensor(int32)"], "")],
        attributes=[
            attribute(name, OpSchema.AttrType.INT) for name in ("K", "N", "bits", "block_size", "accuracy_level")
        ],
    )
    return values.Op(values.Opset(MICROSOFT, 1), schema.name, schema)


def _dequantize_weight(
    codes: Any, scale: Any, zero_point: Any, global_scale: Any, format: Format, block: Sequence[int]
) -> Any:
    form = onnx_block(block, list(codes.shape))
    match format:
        case Nvfp4():
            scale = op18.Div(op18.Cast(scale, to=_FLOAT), global_scale)
        case TwoLevel():
            scale = op18.Mul(scale, global_scale)
        case _:
            pass
    inputs = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    attributes = {} if form.axis is None else {"axis": form.axis}
    if form.size is not None:
        attributes["block_size"] = form.size
    if isinstance(format, Mx):  # the scale's type is none that a result can have
        y = op23.DequantizeLinear(*inputs, **attributes, output_dtype=_FLOAT)
        return op18.Mul(y, op18.Constant(value_float=mx.INT8_UNIT)) if format.element == "int8" else y
    return (op18 if form.size is None else op21).DequantizeLinear(*inputs, **attributes)


def _cast(x: Any, dtype: int | None) -> Any:
    return x if dtype in (None, _FLOAT) else op18.Cast(x, to=dtype)


_FLOAT: Final = 1
_INT64: Final = 7
_DOUBLE: Final = 11
_DTYPES: Final = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


FLOAT8: Final = {"float8_e4m3fn": 17, "float8_e5m2": 19}
_INTEGERS: Final = {torch.int8: 3, torch.uint8: 2, torch.int16: 5, torch.uint16: 4}


def _onnx_dtype(format: Format) -> int:
    """The ONNX type of codes."""
    return FLOAT8[format.layout] if isinstance(format, Float) else _INTEGERS[numerics.code_dtype(format)]


def translations(given: Container[str] = ()) -> dict[Any, Callable[..., Any]]:
    """The functions that torch's exporter calls for graphq's ops. ``given``: the names of what the model is given."""
    matmul_nbits = _matmul_nbits()

    def constant(value: float) -> Any:
        return op18.Constant(value_float=float(value))

    def integers(*values: int) -> Any:
        return op18.Constant(value_ints=values)

    def groups_of(x: Any, block: Sequence[int], last: int) -> Any:
        """The last axis as groups and their elements; a short last group repeats its last element."""
        rank, size = len(block), block[-1]
        short = -last % size
        if short:
            x = op18.Pad(x, integers(*[0] * (2 * rank - 1), short), mode="edge")
        return op18.Reshape(x, integers(*[0] * (rank - 1), -(-last // size), size))

    def spread(part: Any, block: Sequence[int], last: int) -> Any:
        """A scale or zero point with each group's repeated over its elements."""
        if not _is_grouped(block, last):
            return part
        rank, size = len(block), block[-1]
        wide = op18.Expand(op18.Unsqueeze(part, integers(rank)), integers(*[1] * rank, size))
        whole = op18.Reshape(wide, integers(*[0] * (rank - 1), -(-last // size) * size))
        return op18.Slice(whole, integers(0), integers(last), integers(rank - 1)) if last % size else whole

    def dequantize(
        codes: Any,
        scale: Any,
        zero_point: Any,
        global_scale: Any,
        format: str,
        block: Sequence[int],
        dtype: int | None = None,
    ) -> Any:
        if codes.producer() is None and codes.name not in given:  # held by the model: a weight
            parsed = numerics.parse_format(format)
            return _cast(_dequantize_weight(codes, scale, zero_point, global_scale, parsed, block), dtype)
        if _is_static(scale) and isinstance(numerics.parse_format(format), Int):
            inputs = (codes, scale) if zero_point is None else (codes, scale, zero_point)
            return _cast(op18.DequantizeLinear(*inputs), dtype)
        x, last = op18.Cast(codes, to=_FLOAT), codes.shape[-1]
        if zero_point is not None:
            x = op18.Sub(x, spread(op18.Cast(zero_point, to=_FLOAT), block, last))
        return _cast(op18.Mul(x, spread(scale, block, last)), dtype)

    def quantize(x: Any, scale: Any, zero_point: Any, global_scale: Any, format: str, block: Sequence[int]) -> Any:
        parsed, last = numerics.parse_format(format), x.shape[-1]
        x = op18.Cast(x, to=_FLOAT)
        if isinstance(parsed, Float):  # not QuantizeLinear: ONNX Runtime 1.31 fuses two of float8 into what it lacks
            end = numerics.full_scale(parsed)
            y = op18.Div(x, spread(scale, block, last))
            return op18.Cast(op18.Clip(y, constant(-end), constant(end)), to=_onnx_dtype(parsed))
        assert isinstance(parsed, Int), "legalized"
        lowest, highest = numerics.code_range(parsed)
        if _is_static(scale) and parsed.bits in (8, 16) and not parsed.joint:
            zero = (
                zero_point if zero_point is not None else op18.Cast(op18.Constant(value_int=0), to=_onnx_dtype(parsed))
            )
            return op18.QuantizeLinear(x, scale, zero)
        rounded = op18.Div(x, spread(scale, block, last))
        if zero_point is None or not parsed.joint:
            rounded = op18.Round(rounded)
        if zero_point is not None:
            rounded = op18.Add(rounded, spread(op18.Cast(zero_point, to=_FLOAT), block, last))
        if parsed.joint:
            rounded = op18.Round(rounded)
        return op18.Cast(op18.Clip(rounded, constant(lowest), constant(highest)), to=_onnx_dtype(parsed))

    def float_scale(extreme: Any, format: Float) -> Any:
        scale = op18.Div(extreme, constant(numerics.full_scale(format)))
        if format.scale != "pow2":
            return scale
        # 2^floor(log2) and up to twice as much: the logarithm's last bits may be wrong near a power of two.
        power = op18.Pow(constant(2.0), op18.Floor(op18.Div(op18.Log(scale), constant(_LN2))))
        power = op18.Where(op18.Greater(power, scale), op18.Mul(power, constant(0.5)), power)
        doubled = op18.Where(op18.Less(power, scale), op18.Mul(power, constant(2.0)), power)
        return op18.Where(op18.Less(doubled, scale), op18.Mul(doubled, constant(2.0)), doubled)

    def choose_scale(x: Any, format: str, block: Sequence[int], global_scale: Any = None) -> Any:
        parsed = numerics.parse_format(format)
        if _is_grouped(block, x.shape[-1]):
            x, axes, kept = groups_of(op18.Cast(x, to=_FLOAT), block, x.shape[-1]), integers(len(block)), 0
        else:
            x, axes, kept = op18.Cast(x, to=_FLOAT), integers(*(a for a, b in enumerate(block) if b < 0)), 1
        zero = constant(0.0)

        def low_and_high() -> tuple[Any, Any]:
            return op18.ReduceMin(x, axes, keepdims=kept), op18.ReduceMax(x, axes, keepdims=kept)

        def extreme() -> Any:
            return op18.ReduceMax(op18.Abs(x), axes, keepdims=kept)

        if isinstance(parsed, Float):
            scale = float_scale(extreme(), parsed)
            scale = op18.Where(op18.Greater(scale, zero), op18.Max(scale, constant(_TINY)), constant(1.0))
            return scale, op18.Cast(op18.Mul(scale, zero), to=_INTEGERS[torch.uint8])
        assert isinstance(parsed, Int), "legalized"
        lowest, highest = numerics.code_range(parsed)
        low = zero
        if parsed.divisor == "by_sign":
            low, high = low_and_high()
            negative = op18.Less(op18.Abs(high), op18.Abs(low))
            divisor = op18.Where(negative, constant(-lowest), constant(highest))
            scale = op18.Div(op18.Max(op18.Abs(low), op18.Abs(high)), divisor)
        elif parsed.symmetric:
            scale = op18.Div(extreme(), constant(highest if parsed.divisor == "max" else (highest - lowest) / 2))
        else:
            low, high = low_and_high()
            low, high = op18.Min(low, zero), op18.Max(high, zero)
            scale = op18.Div(op18.Sub(high, low), constant(highest - lowest))
        if parsed.divisor == "by_sign":
            scale = op18.Where(op18.Less(scale, constant(BY_SIGN_SMALLEST)), constant(1.0), scale)
        scale = op18.Where(op18.Greater(scale, zero), op18.Max(scale, constant(_TINY)), constant(1.0))
        if parsed.symmetric:
            zero_point = op18.Mul(scale, zero)
        else:
            moved = op18.Round(op18.Sub(constant(lowest), op18.Div(low, scale)))
            zero_point = op18.Clip(moved, constant(lowest), constant(highest))
        return scale, op18.Cast(zero_point, to=_onnx_dtype(parsed))

    def rows_of(x: Any, offsets: Any, count: int) -> list[Any]:
        """The rows of each expert, and those after the last offset. One Split: behind a DequantizeLinear, ONNX Runtime
        1.31 moves Slices in front of a QuantizeLinear of its own making, of the wrong type.
        """
        ends = op18.Cast(offsets, to=_INT64)
        total = op18.Slice(op18.Shape(x), integers(0), integers(1))
        starts = op18.Concat(integers(0), ends, axis=0)
        sizes = op18.Sub(op18.Concat(ends, total, axis=0), starts)
        return list(op18.Split(x, sizes, axis=0, num_outputs=count + 1))

    def expert_products(x: Any, weights: Sequence[Any], offsets: Any) -> Any:
        *rows, rest = rows_of(x, offsets, len(weights))
        products = [op18.Gemm(row, w, transB=1) for row, w in zip(rows, weights, strict=True)]
        count = op18.Slice(op18.Shape(rest), integers(0), integers(1))
        shape = op18.Concat(count, integers(int(weights[0].shape[0])), axis=0)
        return op18.Concat(*products, op18.CastLike(op18.Expand(constant(0.0), shape), x), axis=0)

    def select_rows(candidates: Sequence[Any], offsets: Any, choice: Sequence[int]) -> Any:
        rows = [rows_of(candidate, offsets, len(choice)) for candidate in candidates]
        rest = rows[0][-1]
        return op18.Concat(*(rows[c][expert] for expert, c in enumerate(choice)), op18.Sub(rest, rest), axis=0)

    def integer_product(codes: Any, weight: Any, weight_zero_point: Any, zero_point: int, format: str) -> Any:
        parsed = numerics.parse_format(format)
        assert isinstance(parsed, Int), "so spelled"
        if parsed.bits <= 4:  # the op takes bytes alone; runtimes widen a constant as they load
            weight = op18.Cast(weight, to=_onnx_dtype(parsed))
            if weight_zero_point is not None:
                weight_zero_point = op18.Cast(weight_zero_point, to=_onnx_dtype(parsed))
        zero = op18.Cast(op18.Constant(value_int=zero_point), to=_INTEGERS[torch.uint8])
        return op18.MatMulInteger(codes, weight, zero, *([] if weight_zero_point is None else [weight_zero_point]))

    def nbits_product(
        x: Any,
        weight: Any,
        scale: Any,
        zero_point: Any,
        bias: Any,
        k: int,
        n: int,
        bits: int,
        block_size: int,
        accuracy_level: int,
    ) -> Any:
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size, "accuracy_level": accuracy_level}
        return matmul_nbits(x, weight, scale, zero_point, None, bias, **attributes)

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        """``MatMul(x, Transpose(weight))``; or Gemm where ONNX Runtime 1.31 would move the Transpose before the
        DequantizeLinear and then fuse what is left into MatMulNBits, which rounds ``x`` to 8 bits by default: without
        blocks, with a zero point in every opset, and without one from opset 21 on.
        """
        read = weight.producer()
        if read is None or read.op_type != "DequantizeLinear" or "block_size" in read.attributes:
            y = op18.MatMul(x, op18.Transpose(weight, perm=[1, 0]))
            return y if bias is None else op18.Add(y, bias)
        last = len(x.shape) - 1
        wide, narrow = (int(size) for size in weight.shape)
        rows, source = x, x.producer()
        if last != 1 and source is not None and source.op_type == "DequantizeLinear" and source.inputs[0].producer():
            # Codes are reshaped: ONNX Runtime 1.31 copies a DequantizeLinear behind a Reshape that follows it, with a
            # QuantizeLinear to uint8 before that, which cuts off negative codes, or from opset 21 on cannot be loaded.
            x = source.inputs[0]
            rows = op18.DequantizeLinear(op18.Reshape(x, integers(-1, narrow)), *source.inputs[1:])
        elif last != 1:
            rows = op18.Reshape(x, integers(-1, narrow))
        y = op18.Gemm(rows, weight, *(() if bias is None else (bias,)), transB=1)
        if last == 1:
            return y
        outer = op18.Slice(op18.Shape(x), integers(0), integers(last))
        return op18.Reshape(y, op18.Concat(outer, integers(wide), axis=0))

    def conv3d(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> Any:
        """A convolution without bias has none: onnxscript 0.7 gives it one of ``[C, 2]`` zeros, which nothing loads."""
        stride, padding, dilation = (list(v) * (3 if len(v) == 1 else 1) for v in (stride, padding, dilation))
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return op18.Conv(*inputs, strides=stride, pads=padding * 2, group=groups, dilations=dilation)

    def gelu(x: Any, approximate: str = "none") -> Any:
        return op20.Gelu(x, approximate=approximate)

    def rms_norm(x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
        """One op; of other types than float32, which the op computes in, its definition."""
        epsilon = torch.finfo(_DTYPES[x.dtype]).eps if eps is None else eps
        if x.dtype == _FLOAT and weight is not None and weight.dtype == _FLOAT:
            return op23.RMSNormalization(x, weight, axis=-len(normalized_shape), epsilon=epsilon)
        wide = x if x.dtype == _DOUBLE else op18.Cast(x, to=_FLOAT)
        mean = op18.ReduceMean(op18.Mul(wide, wide), integers(*range(-len(normalized_shape), 0)), keepdims=1)
        y = op18.Div(wide, op18.Sqrt(op18.Add(mean, op18.CastLike(constant(epsilon), wide))))
        return op18.CastLike(y if weight is None else op18.Mul(y, op18.CastLike(weight, y)), x)

    return {
        torch.ops.aten.linear.default: linear,
        torch.ops.aten.conv3d.default: conv3d,
        torch.ops.aten.gelu.default: gelu,
        torch.ops.aten.rms_norm.default: rms_norm,
        ops.dequantize: dequantize,
        ops.quantize: quantize,
        ops.choose_scale: choose_scale,
        expert_linears: expert_products,
        integer_matmul: integer_product,
        nbits_matmul: nbits_product,
        ops.select_rows: select_rows,
        onnx_recurrence: recurrence,
    }


def _is_grouped(block: Sequence[int], last: object) -> bool:
    """Whether the last axis, of ``last`` elements, is cut into groups."""
    return isinstance(last, int) and 1 < block[-1] < last


def _is_static(scale: Any) -> bool:
    """Whether a scale is the one of a whole tensor, and an initializer, which it is where it was calibrated."""
    return scale.producer() is None and not len(scale.shape)
