"""What a written file must satisfy for each profile, read off the file alone.

Sources: the ONNX operator specification (QuantizeLinear, DequantizeLinear, opsets), the documents that each profile names.
``CHECKS``: name -> a function of a file that gives a line for each place where it does not hold.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

Q, DQ = "QuantizeLinear", "DequantizeLinear"
WIDE: Final = (TensorProto.UINT16, TensorProto.INT16)
WEIGHTED: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVES: Final = (
    "Reshape",
    "Transpose",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Expand",
    "Tile",
    "MaxPool",
    "Split",
)
OPSETS: Final[dict[int, int]] = {  # from which on a quantizer holds codes of a type
    TensorProto.INT16: 21, TensorProto.UINT16: 21, TensorProto.INT4: 21, TensorProto.UINT4: 21,
    TensorProto.FLOAT8E4M3FN: 19, TensorProto.FLOAT8E5M2: 19, TensorProto.FLOAT4E2M1: 23, TensorProto.INT2: 25,
}  # fmt: skip
WHOLE: Final = ("qnn-htp", "vitis-ai", "rknn", "generic-int8")


@final
class File:
    """A written file, with what makes and what reads each tensor."""

    def __init__(self, path: Path, profile: str) -> None:
        self.path, self.profile = path, profile
        self.model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
        self.graph = self.model.graph
        self.nodes = list(self.graph.node)
        self.stored = {i.name: i for i in self.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.opset = next(i.version for i in self.model.opset_import if i.domain == "")
        self.outputs = [o.name for o in self.graph.output]
        values = [*self.graph.input, *self.graph.output, *self.graph.value_info]
        self.shapes = {
            v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
            for v in values
            if v.type.tensor_type.HasField("shape")
        } | {name: list(i.dims) for name, i in self.stored.items()}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in filter(None, node.input):
                found.setdefault(name, []).append(node)
        return found

    @property
    def quantizers(self) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in (Q, DQ)]

    def array(self, name: str) -> Any:
        return numpy_helper.to_array(self.stored[name])

    def codes(self, node: onnx.NodeProto) -> int:
        """The type of a quantizer's codes, which its zero point has."""
        return self.stored[node.input[2]].data_type

    def grid(self, node: onnx.NodeProto) -> tuple[int, bytes, bytes]:
        return self.codes(node), self.array(node.input[1]).tobytes(), self.array(node.input[2]).tobytes()

    def dequantizer(self, name: str) -> onnx.NodeProto | None:
        """What dequantizes a tensor; also behind what only moves a constant."""
        node = self.makers.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Squeeze", "Unsqueeze"):
            node = self.makers.get(node.input[0])
        return node if node is not None and node.op_type == DQ else None

    def quantizer(self, name: str) -> onnx.NodeProto | None:
        """The first quantizer that reads a tensor."""
        return next((node for node in self.readers.get(name, []) if node.op_type == Q), None)

    def weights(self) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
        """Each node with a weight in codes, with what dequantizes that."""
        for node in self.nodes:
            if (
                node.op_type in WEIGHTED
                and (found := self.dequantizer(node.input[1]))
                and found.input[0] in self.stored
            ):
                yield node, found

    def activations(self) -> Iterator[onnx.NodeProto]:
        """What dequantizes activations."""
        return (node for node in self.quantizers if node.op_type == DQ and node.input[0] not in self.stored)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


CHECKS: dict[str, Callable[[File], Iterator[object]]] = {}


def check(function: Callable[[File], Iterator[object]]) -> Callable[[File], Iterator[object]]:
    CHECKS[function.__name__] = function
    return function


@check
def the_checker_takes_it(file: File) -> Iterator[object]:
    try:
        onnx.checker.check_model(str(file.path), full_check=True)
    except onnx.checker.ValidationError as error:
        yield error


@check
def quantizers_have_three_inputs(file: File) -> Iterator[object]:
    yield from (node.name for node in file.quantizers if len(node.input) != 3 or not all(node.input))


@check
def scales_and_zero_points_are_initializers(file: File) -> Iterator[object]:
    yield from (node.name for node in file.quantizers if not {*node.input[1:]} <= file.stored.keys())


@check
def zero_points_are_of_the_codes_type(file: File) -> Iterator[object]:
    for node in file.quantizers:
        if (
            node.op_type == DQ
            and node.input[0] in file.stored
            and file.stored[node.input[0]].data_type != file.codes(node)
        ):
            yield node.name
        maker = file.makers.get(node.input[0]) if node.op_type == DQ else None
        if maker is not None and maker.op_type == Q and file.codes(maker) != file.codes(node):
            yield node.name


@check
def zero_points_are_of_the_scales_shape(file: File) -> Iterator[object]:
    for node in file.quantizers:
        if file.stored[node.input[1]].dims != file.stored[node.input[2]].dims:
            yield node.name


@check
def scales_are_positive_numbers_of_float32(file: File) -> Iterator[object]:
    for node in file.quantizers:
        scale = file.array(node.input[1])
        if scale.dtype != np.float32 or not np.isfinite(scale).all() or not (scale > 0).all():
            yield node.name


@check
def scales_are_as_many_as_their_axis_has(file: File) -> Iterator[object]:
    for node in file.quantizers:
        sizes, of = list(file.stored[node.input[1]].dims), file.shapes.get(node.input[0])
        axis, block = attribute(node, "axis"), attribute(node, "block_size")
        if sizes and (axis is None or of is None or not 0 <= axis < len(of)):
            yield node.name, axis
        elif sizes and of is not None:
            wanted = [-(-(n or 0) // block) if i == axis else n for i, n in enumerate(of)] if block else [of[axis]]
            if sizes != wanted:
                yield node.name, sizes, wanted


@check
def activations_have_one_scale(file: File) -> Iterator[object]:
    yield from (node.name for node in file.activations() if file.stored[node.input[1]].dims)


@check
def int32_codes_have_zero_points_of_zero(file: File) -> Iterator[object]:
    for node in file.quantizers:
        if file.codes(node) == TensorProto.INT32 and file.array(node.input[2]).any():
            yield node.name


@check
def nodes_have_names_of_their_own(file: File) -> Iterator[object]:
    names = [node.name for node in file.nodes]
    yield from {name for name in names if not name or names.count(name) > 1}


@check
def every_tensor_has_a_rank(file: File) -> Iterator[object]:
    yield from (name for node in file.nodes for name in node.output if name and name not in file.shapes)


@check
def constants_are_initializers(file: File) -> Iterator[object]:
    yield from (node.name for node in file.nodes if node.op_type == "Constant")


@check
def weights_are_codes(file: File) -> Iterator[object]:
    yield from (node.name for node in file.quantizers if node.op_type == Q and node.input[0] in file.stored)


@check
def signed_weights_are_symmetric_and_narrow(file: File) -> Iterator[object]:
    for node, dequantizer in file.weights():
        codes = file.array(dequantizer.input[0])
        least: dict[int, int] = {TensorProto.INT8: -127, TensorProto.INT4: -8}
        lowest = least.get(file.codes(dequantizer))
        if lowest is not None and (file.array(dequantizer.input[2]).any() or int(codes.min()) < lowest):
            yield node.name


@check
def a_bias_in_int32_is_on_the_products_scale(file: File) -> Iterator[object]:
    for node, weight in file.weights():
        x, bias = (file.dequantizer(node.input[i]) if len(node.input) > i else None for i in (0, 2))
        if bias is None or x is None or file.codes(bias) != TensorProto.INT32:
            continue
        products = file.array(x.input[1]) * file.array(weight.input[1])
        found = file.array(bias.input[1])
        if found.size != products.size or not np.allclose(found.reshape(-1), products.reshape(-1), rtol=1e-6, atol=0):
            yield node.name
        if np.abs(file.array(bias.input[0]).astype(np.int64)).max() >= 2**31 - 1:
            yield node.name, "cut off"


@check
def types_are_in_the_opset(file: File) -> Iterator[object]:
    for node in file.quantizers:
        least = max(OPSETS.get(file.codes(node), 13), 21 if attribute(node, "block_size") else 13)
        if file.opset < least:
            yield node.name, file.opset, least


@check
def nothing_is_unread(file: File) -> Iterator[object]:
    read = {*file.readers, *file.outputs}
    yield from (name for name in file.stored if name not in read)
    yield from (node.name for node in file.nodes if not read & {*node.output})


@check
def what_moves_elements_keeps_the_grid(file: File) -> Iterator[object]:
    for node in file.nodes:
        x = file.makers.get(node.input[0]) if node.op_type in MOVES else None
        for name in node.output if x is not None and x.op_type == DQ else ():
            y = file.quantizer(name)
            if x is not None and y is not None and file.grid(x) != file.grid(y):
                yield node.name


@check
def operands_of_a_concat_share_a_grid(file: File) -> Iterator[object]:
    """TensorRT, Vitis AI (AlignConcat), RKNN: one scale for all; QNN and ONNX Runtime take several."""
    if file.profile not in ("tensorrt", "vitis-ai", "rknn", "openvino"):
        return
    for node in file.nodes:
        if node.op_type == "Concat":
            grids = {
                file.grid(x) for name in node.input if (x := file.makers.get(name)) is not None and x.op_type == DQ
            }
            if len(grids) > 1:
                yield node.name


@check
def no_tensor_is_quantized_twice_alike(file: File) -> Iterator[object]:
    for name, readers in file.readers.items():
        quantizers = [node for node in readers if node.op_type == Q and node.input[0] == name]
        if len({file.grid(node) for node in quantizers}) < len(quantizers):
            yield [node.name for node in quantizers]


@check
def nothing_stands_between_what_is_fused(file: File) -> Iterator[object]:
    """No quantizer between a convolution, a linear or a sum and the Relu behind it."""
    for node in file.nodes:
        x = file.makers.get(node.input[0]) if node.op_type == "Relu" else None
        source = file.makers.get(file.makers[x.input[0]].input[0]) if x is not None and x.op_type == DQ else None
        if source is not None and source.op_type in (*WEIGHTED, "Add"):
            yield node.name


@check
def zero_points_behind_a_relu_are_the_lowest_code(file: File) -> Iterator[object]:
    """ONNX Runtime leaves the Relu, and the layer in front of it, in float otherwise."""
    for node in file.nodes if file.profile == "ort-cpu" else ():
        quantizer = file.quantizer(node.output[0]) if node.op_type == "Relu" else None
        if quantizer is not None and len(file.readers[node.output[0]]) == 1 and file.array(quantizer.input[2]).any():
            yield node.name


@check
def activations_are_of_the_profiles_types(file: File) -> Iterator[object]:
    allowed = {
        "ort-cpu": ["UINT8"], "openvino": ["UINT8"], "tensorrt": ["INT8"], "qnn-htp": ["UINT8", "UINT16"],
        "vitis-ai": ["INT8"], "rknn": ["INT8"], "generic-int8": ["UINT8", "UINT16"],
    }[file.profile]  # fmt: skip
    for node in file.activations():
        if TensorProto.DataType.Name(file.codes(node)) not in allowed:
            yield node.name


@check
def tensorrt_has_zero_points_of_zero_and_biases_in_float(file: File) -> Iterator[object]:
    for node in file.quantizers if file.profile == "tensorrt" else ():
        if file.array(node.input[2]).any() or file.codes(node) == TensorProto.INT32:
            yield node.name


@check
def tensorrt_has_no_operators_in_integers(file: File) -> Iterator[object]:
    for node in file.nodes if file.profile == "tensorrt" else ():
        if node.op_type.startswith(("QLinear", "DynamicQuantize")) or node.op_type.endswith("Integer") or node.domain:
            yield node.name


@check
def scales_by_channel_are_along_the_outputs(file: File) -> Iterator[object]:
    for node, weight in file.weights():
        if not file.stored[weight.input[1]].dims or attribute(weight, "block_size"):
            continue
        moved = file.makers[node.input[1]] is not weight
        rows = node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB"))
        last = len(file.shapes[weight.input[0]]) - 1
        wanted = 0 if rows else last if node.op_type in ("MatMul", "Gemm") else 1
        if not moved and attribute(weight, "axis") != wanted:
            yield node.name


@check
def vitis_ai_has_scales_of_powers_of_two_per_tensor(file: File) -> Iterator[object]:
    for node in file.quantizers if file.profile == "vitis-ai" else ():
        scale = file.array(node.input[1])
        if scale.ndim or (file.codes(node) != TensorProto.INT32 and np.frexp(scale)[0] != 0.5):
            yield node.name
        if file.codes(node) == TensorProto.INT8 and file.array(node.input[2]).any():
            yield node.name


@check
def static_profiles_have_numbers_for_sizes(file: File) -> Iterator[object]:
    if file.profile not in ("qnn-htp", "vitis-ai", "rknn"):
        return
    yield from (name for name, shape in file.shapes.items() if None in shape)
    yield from (node.name for node in file.nodes if node.op_type in ("Shape", "If", "Loop", "Scan", "Range"))


@check
def qnn_reads_unsigned_gains_and_indices_from_the_front(file: File) -> Iterator[object]:
    for node in file.nodes if file.profile == "qnn-htp" else ():
        if node.op_type == "LayerNormalization":
            gain = file.dequantizer(node.input[1])
            if gain is None or file.codes(gain) != TensorProto.UINT8:
                yield node.name
        if node.op_type == "Gather" and node.input[1] in file.stored and (file.array(node.input[1]) < 0).any():
            yield node.name


@check
def qnn_and_generic_have_fixed_grids_of_bounded_outputs(file: File) -> Iterator[object]:
    steps = {"Softmax": (256, 0), "Sigmoid": (256, 0), "Tanh": (128, 128)}
    for node in file.nodes if file.profile in ("qnn-htp", "generic-int8") else ():
        quantizer = file.quantizer(node.output[0]) if node.op_type in steps else None
        if quantizer is not None and file.codes(quantizer) == TensorProto.UINT8:
            count, zero = steps[node.op_type]
            scale, zero_point = (file.array(name) for name in quantizer.input[1:])
            if not np.isclose(scale, 1 / count, rtol=1e-6) or int(zero_point) != zero:
                yield node.name


@check
def quantized_layers_have_all_operands_quantized(file: File) -> Iterator[object]:
    for node, _ in file.weights():
        if file.dequantizer(node.input[0]) is None and file.profile in WHOLE:
            yield node.name


@check
def what_comes_out_in_16_bits_goes_in_in_16_bits(file: File) -> Iterator[object]:
    for node in file.nodes if file.profile in ("qnn-htp", "generic-int8") else ():
        y = file.quantizer(node.output[0]) if node.op_type in ("Conv", "Gemm", "Add", "Mul") and node.output else None
        x = file.dequantizer(node.input[0]) if y is not None and file.codes(y) in WIDE else None
        if x is not None and file.codes(x) not in WIDE:
            yield node.name


@check
def initializers_are_no_inputs(file: File) -> Iterator[object]:
    yield from (i.name for i in file.graph.input if i.name in file.stored)


@check
def onnx_runtime_multiplies_by_matmul(file: File) -> Iterator[object]:
    """A linear is a MatMul of [in, out], whose bias keeps it from becoming a Gemm."""
    if file.profile != "ort-cpu":
        return
    yield from (node.name for node, _ in file.weights() if node.op_type == "Gemm")


@check
def quantized_outputs_leave_through_both(file: File) -> Iterator[object]:
    """Where outputs are quantized, the last layer's codes are dequantized once more: no graph output is its own."""
    for node, _ in file.weights() if file.profile in WHOLE else ():
        if {*node.output} & {*file.outputs}:
            yield node.name
