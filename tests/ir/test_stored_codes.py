"""Weights that files hold as codes, and which codes may be kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from graphq import numerics
from graphq.deferred import InFile, Joined, Made, Stacked
from graphq.errors import GraphError
from graphq.ir.stored_codes import Dequantized, StoredWeight, kept_codes, same_grid, stored_weights
from graphq.numerics import Scales
from graphq.spec.quant import Quant, parse_quant

W = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


def decode(parts: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    return parts["codes"], Scales(parts["scale"])


def stored(folder: Path, text: str = "int8/channel", w: Tensor = W, **changes: Any) -> StoredWeight:
    quant = parse_quant(text)
    block = numerics.weight_block(quant.granularity, 2, 0, 1)
    scales = numerics.rounded_scales(numerics.choose_scale(w, quant.format, block), quant.format, torch.bfloat16)
    tensors = {"codes": numerics.quantize(w, scales, quant.format, block), "scale": scales.scale} | changes
    file = folder / f"{len(list(folder.iterdir()))}.safetensors"
    save_file(tensors, file)
    parts = {n: InFile(file, n, tuple(t.shape), t.dtype, t.dtype) for n, t in tensors.items()}
    return StoredWeight("a.b", "odd", torch.bfloat16, quant, None, parts, decode, lambda parts: None, 1)


def test_the_numbers_are_those_of_codes_in_the_dtype_of_loaders(tmp_path: Path) -> None:
    one = stored(tmp_path)
    made = one.read()
    wanted = (made.codes.float() * made.scales.scale).to(torch.bfloat16)
    assert torch.equal(one.numbers(), wanted)
    deferred = Dequantized(one, (6, 32), torch.float32)
    assert torch.equal(deferred.read(), wanted.float())
    assert deferred.dtypes() == frozenset({torch.bfloat16})
    assert torch.equal(deferred.plain().read(), wanted)
    assert torch.equal(deferred.turned().read(), wanted.float().T)
    assert stored_weights(deferred) == (one,)
    assert stored_weights(deferred.changed(lambda w: w * 2)) == (None,)
    with pytest.raises(GraphError, match=r"a.b: the files hold a weight \[6, 32\], not \[6, 31\]"):
        Dequantized(one, (6, 31), torch.float32).read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": torch.ones(3, 1)}, "odd: scales [3, 1] of a weight [6, 32], not [6, 1]"),
        ({"scale": torch.full((6, 1), torch.nan)}, "odd: a scale is NaN or Inf"),
        ({"codes": torch.ones(6, dtype=torch.int8)}, "odd: damaged: "),
        ({"codes": torch.full((6, 32), 8, dtype=torch.int8)}, "odd: has codes that are not from -8 to 7"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError) as caught:
        stored(tmp_path, "int4/channel", **changes).read()
    assert str(caught.value).startswith(f"{tmp_path / '0.safetensors'}: a.b: {message}")


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    one = stored(tmp_path)
    lacking = StoredWeight(
        one.layer, "odd", one.dtype, one.quant, None, {"codes": one.parts["codes"]}, decode, lambda parts: None, 1
    )
    with pytest.raises(GraphError, match=r"a.b: odd: has no scale"):
        lacking.read()


@pytest.mark.parametrize(
    ("wanted", "same"),
    [
        ("int8/channel", True),
        ("int8/half/channel/source", True),
        ("int8/by_sign/channel/mse", True),
        ("int8/pow2/channel", False),
        ("int8/asym/channel", False),
        ("int8/g32", False),
        ("int7/channel", False),
    ],
)
def test_grids_of_integers(wanted: str, same: bool) -> None:
    assert same_grid(parse_quant("int8/half/channel"), parse_quant(wanted)) == same


def test_grids_of_floats() -> None:
    assert same_grid(parse_quant("mxfp4/even"), parse_quant("mxfp4/ascend"))
    assert not same_grid(parse_quant("mxfp4"), parse_quant("mxfp6_e2m3"))
    assert same_grid(parse_quant("float8_e4m3fn/4x4"), parse_quant("float8_e4m3fn/4x4/source"))
    assert not same_grid(parse_quant("float8_e4m3fn/4x4"), parse_quant("float8_e4m3fn/pow2/4x4"))
    assert not same_grid(parse_quant("float8_e4m3fn/4x4"), parse_quant("float8_e4m3fn/4x8"))
    assert same_grid(parse_quant("int8/pow2/channel"), parse_quant("int8/pow2/channel"))


def test_codes_that_are_kept(tmp_path: Path) -> None:
    one, two = stored(tmp_path), stored(tmp_path, w=2 * W.flip(0))
    quant = parse_quant("int8/half/channel")
    each = [Dequantized(weight, (6, 32), torch.float32) for weight in (one, two)]
    codes = [weight.read().codes for weight in (one, two)]
    made = kept_codes(Stacked(tuple(each)), quant, [1, 1, -1], torch.bfloat16)
    assert made is not None
    assert torch.equal(made.codes, torch.stack(codes))
    assert made.scales.scale.shape == (2, 6, 1)
    made = kept_codes(Joined(tuple(each)), quant, [1, -1], torch.bfloat16)
    assert made is not None
    assert torch.equal(made.codes, torch.cat(codes))
    assert made.scales.scale.shape == (12, 1)
    changed = each[0].changed(lambda w: w)
    for deferred in (changed, Stacked((each[0], changed)), Joined((each[0], changed)), Made((6, 32), lambda: W)):
        assert kept_codes(deferred, quant, [1, -1], torch.bfloat16) is None
    assert kept_codes(Joined(tuple(each)), parse_quant("int8/tensor"), [-1, -1], torch.bfloat16) is None


def test_scales_that_the_target_does_not_store_are_not_kept(tmp_path: Path) -> None:
    one = stored(tmp_path, scale=torch.full((6, 1), 1 / 3))
    deferred = Dequantized(one, (6, 32), torch.float32)
    assert kept_codes(deferred, one.quant, [1, -1], torch.bfloat16) is None
    assert kept_codes(deferred, one.quant, [1, -1], torch.float32) is not None
