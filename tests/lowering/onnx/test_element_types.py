"""The ONNX type that every format's codes and scales have, the opset and file version that go with it, and its values."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import graphq
from graphq.lowering.onnx.tensors import initializers
from graphq.numerics import parse_format
from graphq.numerics.elements import encode
from graphq.state import tensor_of

K, N = 64, 24
# weight: codes, scale, zero point, opset, version of the file format, whether ONNX Runtime has kernels
TYPES: dict[str, tuple[str, str, str, int, int, bool]] = {
    "int8/channel": ("INT8", "FLOAT", "INT8", 13, 10, True),
    "int7/asym/channel": ("INT8", "FLOAT", "INT8", 13, 10, True),
    "int5/tensor": ("INT8", "FLOAT", "INT8", 13, 10, True),
    "uint8/channel": ("UINT8", "FLOAT", "UINT8", 13, 10, True),
    "int4/g8": ("INT4", "FLOAT", "INT4", 21, 10, True),
    "int4/asym/channel": ("UINT4", "FLOAT", "UINT4", 21, 10, True),
    "int3/tensor": ("INT4", "FLOAT", "INT4", 21, 10, True),
    "int2/g8": ("INT2", "FLOAT", "INT2", 25, 13, True),
    "int2/asym/channel": ("UINT2", "FLOAT", "UINT2", 25, 13, True),
    "float8_e4m3fn/channel": ("FLOAT8E4M3FN", "FLOAT", "FLOAT8E4M3FN", 19, 10, True),
    "float8_e5m2/g8": ("FLOAT8E5M2", "FLOAT", "FLOAT8E5M2", 21, 10, True),
    "float6_e2m3/g8": ("FLOAT6E2M3", "FLOAT", "FLOAT6E2M3", 28, 14, False),
    "float6_e3m2/channel": ("FLOAT6E3M2", "FLOAT", "FLOAT6E3M2", 28, 14, False),
    "float4_e2m1/g8": ("FLOAT4E2M1", "FLOAT", "FLOAT4E2M1", 23, 11, False),
    "mxfp8_e4m3": ("FLOAT8E4M3FN", "FLOAT8E8M0", "FLOAT8E4M3FN", 24, 12, False),
    "mxfp6_e3m2": ("FLOAT6E3M2", "FLOAT8E8M0", "FLOAT6E3M2", 28, 14, False),
    "mxfp4": ("FLOAT4E2M1", "FLOAT8E8M0", "FLOAT4E2M1", 24, 12, False),
    "mxint8": ("INT8", "FLOAT8E8M0", "INT8", 24, 12, False),
    "nvfp4": ("FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT4E2M1", 23, 11, False),
    "int4/over_int8/g8": ("INT4", "FLOAT", "INT4", 21, 10, True),
    "float4_e2m1/over_float8/g8": ("FLOAT4E2M1", "FLOAT", "FLOAT4E2M1", 23, 11, False),
}


@pytest.mark.parametrize("weight", TYPES)
def test_a_weight(weight: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, K)
    made = graphq.compile(nn.Sequential(nn.Linear(K, N)), {"graphq": 1, "weight": weight, "rules": []}, inputs=x)
    made.emit("onnx", tmp_path / "a")
    model: Any = onnx.load(tmp_path / "a" / "model.onnx")
    codes, scale, zero_point, opset, version, kernels = TYPES[weight]
    kinds = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer}
    (read,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    assert (kinds["0.weight"], kinds["0.weight_scale"], kinds[read.input[2]]) == (codes, scale, zero_point)
    assert (model.opset_import[0].version, model.ir_version) == (opset, version)
    held = initializers(tmp_path / "a")
    for name in ("weight", "weight_scale", "weight_zero_point", "weight_global_scale"):
        if f"0.{name}" in held:
            wanted = tensor_of(made.graph, f"0.{name}")
            assert held[f"0.{name}"].dtype == wanted.dtype
            assert torch.equal(held[f"0.{name}"].flatten().view(torch.uint8), wanted.flatten().view(torch.uint8))
    assert graphq.verify(tmp_path / "a").ok
    expected = made.graph(x)[0]
    if opset >= 19:  # which the reference reads
        (found,) = ReferenceEvaluator(model).run(None, {"input": x.numpy()})  # type: ignore[misc]
        # sums of float32 in another order
        assert np.abs(found - expected.numpy()).max() <= 1e-6 * np.abs(expected.numpy()).max()
    import onnxruntime

    if kernels:
        found = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx").run(None, {"input": x.numpy()})[0]
        assert np.abs(found - expected.numpy()).max() <= 1e-6 * np.abs(expected.numpy()).max()
    else:
        with pytest.raises(
            Exception, match=r"implementation|IR version|Type"
        ):  # the day it has, docs/targets.md says so
            onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx")


@pytest.mark.parametrize("layout", ["float4_e2m1", "float6_e2m3", "float6_e3m2", "float8_e4m3fn", "float8_e5m2"])
def test_every_code_means_the_same_in_onnx(layout: str) -> None:
    """ml_dtypes' numbers, on which onnx's tensors stand, against graphq's codes of them."""
    from graphq.lowering.onnx.element_types import FLOATS

    bits = int(layout[5])
    numbers = np.arange(1 << bits, dtype=np.uint8).view(FLOATS[layout].numpy()).astype(np.float32)  # type: ignore[arg-type]
    finite = np.isfinite(numbers)
    codes = encode(torch.from_numpy(numbers[finite]), layout)  # type: ignore[arg-type]
    assert np.array_equal(codes.numpy(), np.arange(1 << bits, dtype=np.uint8)[finite])
    assert parse_format(layout)
