"""No input ends the process: a hundred thousand linears of drawn shapes, formats and kernels, experts and attention among
them, in a process of their own.
"""

import subprocess
import sys

import pytest

from graphq.runtime.kernels import native

SCRIPT = """
import random, sys, torch
from graphq.numerics import Scales, code_dtype, empty_scales, parse_format
from graphq.errors import PassError
from graphq.runtime import kernels
from graphq.spec.formats import code_bits, has_global_scale, is_asymmetric

rounds, seed = int(sys.argv[1]), int(sys.argv[2])
random.seed(seed)
torch.manual_seed(seed)
formats = [f"int{b}{a}" for b in range(2, 9) for a in ("", "/asym")] + ["uint8", "mxint8", "int4/over_int8", "hifloat8"]
formats += ["float8_e4m3fn", "float8_e5m2", "float6_e2m3", "float4_e2m1", "mxfp4", "mxfp6_e3m2", "mxfp8_e5m2", "nvfp4"]
here = [k for k in kernels.KERNELS if k.level in kernels.features()]
whole = [torch.int32, torch.int64]
sizes = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 300]
for i in range(rounds):
    text = random.choice(formats)
    format, n, k, m = parse_format(text), random.choice(sizes[1:]), random.choice(sizes[1:]), random.choice(sizes)
    group = random.choice([-1, 8, 13, 16, 32, 64, 1000])
    shape, block = (n, k), [random.choice([1, 1, 4, -1]) if "/over" not in text else 1, group]
    scales = empty_scales(shape, block, format)
    scale = torch.randint(0, 256, (scales.scale.numel() * scales.scale.itemsize,), dtype=torch.uint8)
    scale = scale.view(scales.scale.dtype).view(scales.scale.shape)  # of any bits
    zero = torch.randint(0, 256, scales.scale.shape).to(code_dtype(format)) if is_asymmetric(format) else None
    upper = torch.rand(scales.global_scale.shape) if has_global_scale(format) else None
    bits = code_bits(format)
    packed = torch.randint(0, 256, (n, -(-k * bits // 8)), dtype=torch.uint8)
    rows = kernels.rows_of(packed, Scales(scale, zero, upper), format, block, shape, 0)
    if rows.group < 8:
        continue
    tiles = kernels.tile(rows)
    kernel = random.choice(here)
    torch.set_num_threads(random.choice([1, 2]))
    if kernel.product == "int8":
        if not rows.is_integer:
            continue
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        sums = kernels.group_sums(rows)
        y = kernels.Product(kernel, tiles, rows, torch.randn(n), sums)(x, torch.float32, torch.randn(m), x.new_ones(m))
    else:
        dtype = getattr(torch, random.choice(kernel.inputs))
        x = torch.randint(0, 256, (m, k * dtype.itemsize), dtype=torch.uint8).view(dtype)
        y = kernels.Product(kernel, tiles, rows, torch.randn(n))(x, dtype)
    assert y.shape == (m, n)
    if i % 4 == 0:
        experts = random.choice([1, 2, 3, 8])
        each = torch.randint(0, 256, (experts * n, packed.shape[1]), dtype=torch.uint8)
        parts = [None if part is None else part.repeat(experts, 1, 1) for part in (scale, zero, upper)]
        parts = Scales(*(None if p is None else p.view(experts, -1, p.shape[-1]) for p in parts))
        stack = kernels.stacked_rows(each, parts, format, [1, *block], (experts, n, k))
        ends = torch.randint(-1 if i % 16 == 0 else 0, m + 1, (experts,)).sort().values.to(random.choice(whole))
        product = kernels.Product(kernel, kernels.tile(stack, experts), stack, experts=experts)
        codes = (torch.randn(m), x.new_ones(m)) if kernel.product == "int8" else ()
        try:
            y = product(x, torch.float32, *codes, offsets=ends)
            assert y.shape == (m, n)
        except PassError:
            assert ends[0] < 0
    if i % 8 == 0:
        dtype = random.choice([torch.float32, torch.bfloat16])
        heads, count, queries = random.choice([1, 2, 3]), random.choice([1, 2, 5]), random.choice([1, 2, 4, 5])
        widths = random.choice([16, 48, 64, 20]), random.choice([16, 48, 64, 20])
        shapes = [(2, heads * count, queries, widths[0]), (2, heads, k, widths[0]), (2, heads, k, widths[1])]
        q, keys, values = (torch.randn(size).view(torch.int32).bitwise_xor(random.getrandbits(30)) for size in shapes)
        q, keys, values = (one.view(torch.float32).to(dtype) for one in (q, keys, values))
        masks = [None, torch.rand(2, 1, queries, k) > 0.5, torch.randn(1, heads * count, 1, k).to(dtype)]
        y = kernels.scaled_dot_product_attention(q, keys, values, random.choice(masks), enable_gqa=True)
        assert y.shape == (2, heads * count, queries, widths[1])
    kernels.quantized_rows(torch.randint(0, 256, (m, 4 * k), dtype=torch.uint8).view(torch.float32), "int8/asym", [1, -1])
"""


def survives(rounds: int, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rounds), str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)
def test_some_linears_do_not_end_the_process() -> None:
    survives(500, 0)


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)
def test_many_linears_do_not_end_the_process() -> None:
    survives(100_000, 1)
