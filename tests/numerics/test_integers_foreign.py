"""ONNX and torch as judges of the codes and values."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from graphq import numerics
from graphq.numerics import Scales
from graphq.spec.formats import Int

ONNX_TYPES = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}
ONNX_CASES = [
    ((6, 10), [-1, -1]),
    ((6, 10), [1, -1]),
    ((6, 10), [-1, 1]),
    ((6, 12), [1, 4]),
    ((12, 6), [4, 1]),
    ((3, 4, 8), [1, 1, 4]),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("shape", "block"), ONNX_CASES, ids=str)
def test_onnx_gives_the_same_codes_and_values(shape, block: list[int], bits: int, symmetric: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    x.view(-1)[::5] *= 3
    format = Int(bits, symmetric)
    scale, zero_point, _ = numerics.choose_scale(x, format, block)
    scale = scale * 0.9  # so that some codes saturate
    codes = numerics.quantize(x, Scales(scale, zero_point), format, block)
    onnx_codes, onnx_values = onnx_reference(x, scale, zero_point, block, bits)
    assert torch.equal(codes.long(), torch.from_numpy(onnx_codes.astype(np.int64)))
    assert torch.equal(
        numerics.dequantize(codes, Scales(scale, zero_point), format, block), torch.from_numpy(onnx_values)
    )
    lowest, highest = numerics.code_range(format)
    assert ((codes == lowest) | (codes == highest)).any()


def onnx_reference(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, block: list[int], bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """What ONNX's reference evaluator gives for QuantizeLinear, and for DequantizeLinear of that."""
    own_axes = [axis for axis, b in enumerate(block) if b > 0]
    axis = next((a for a in own_axes if block[a] > 1), own_axes[-1] if own_axes else 0)
    size = block[axis] if block[axis] > 1 else 0
    if size == 0:  # per tensor and per axis take scalars and vectors
        scale = scale.flatten() if own_axes else scale.reshape(())
        zero_point = None if zero_point is None else zero_point.reshape(scale.shape)
    code_type = ONNX_TYPES[bits]
    names = ["scale", "zero_point"] if zero_point is not None else ["scale"]
    quantized = helper.make_node("QuantizeLinear", ["x", *names], ["q"], axis=axis, block_size=size)
    dequantized = helper.make_node("DequantizeLinear", ["q", *names], ["y"], axis=axis, block_size=size)
    tensors = [helper.make_tensor("scale", TensorProto.FLOAT, scale.shape, scale.flatten().tolist())]
    if zero_point is None:
        quantized.attribute.append(helper.make_attribute("output_dtype", code_type))
    else:
        tensors.append(helper.make_tensor("zero_point", code_type, scale.shape, zero_point.flatten().tolist()))
    graph = helper.make_graph(
        [quantized, dequantized],
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("q", code_type, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    codes, values = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    return np.asarray(codes), np.asarray(values)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_torch_fake_quantize_gives_the_same_values(bits: int, symmetric: bool) -> None:
    x = torch.randn(16, 33, generator=torch.Generator().manual_seed(bits))
    format = Int(bits, symmetric)
    scale, zero_point, _ = numerics.choose_scale(x, format, [1, -1])
    scale = torch.exp2(torch.round(torch.log2(scale)))  # torch multiplies by 1 / scale, which is exact for powers of 2
    codes = numerics.quantize(x, Scales(scale, zero_point), format, [1, -1])
    zero = torch.zeros(16, dtype=torch.int32) if zero_point is None else zero_point.flatten().int()
    expected = torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero, 0, *numerics.code_range(format))
    assert torch.equal(numerics.dequantize(codes, Scales(scale, zero_point), format, [1, -1]), expected)
