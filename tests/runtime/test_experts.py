"""Experts' linears on packed codes: what they compute, hold, store and copy, whatever kernel they have."""

import copy
import json
import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphq
from graphq import numerics
from graphq.errors import PassError, TargetError
from graphq.numerics import Scales
from graphq.runtime import kernels, ops
from graphq.runtime.experts import PackedExperts
from graphq.runtime.graph_json import graph_from_json, graph_to_json
from graphq.runtime.modules import PackedWeight, codes_of, dequantized, hold_weight, scales_of
from graphq.runtime.program import Program
from graphq.runtime.region_steps import MOST_OF_EXPERTS
from graphq.spec.formats import has_global_scale, parse_format
from tests.models import MoE
from tests.runtime.kernels.test_products import FORMATS
from tests.runtime.test_linear import LIMITS, assert_near, needs_library, random
from tests.runtime.test_region_call import calls, near
from tests.runtime.test_regions import W4, W8A8

aten: Any = torch.ops.aten


def experts(
    format: str = "int4", *, count: int = 3, n: int = 40, k: int = 96, block: tuple[int, ...] = (1, 1, 32),
    dtype: torch.dtype = torch.float32, takes_codes: bool = False, seed: int = 0,
) -> PackedExperts:  # fmt: skip
    parsed, shape = parse_format(format), (count, n, k)
    group = 32 if format.startswith("mx") else 16 if format == "nvfp4" else block[2]
    group = 8 if "/over" in format and group < 0 else group
    block = (1, 1, group) if has_global_scale(parsed) else (*block[:2], group)
    w = random(*shape, seed=seed).to(dtype)
    scales = numerics.choose_scale(w, parsed, block)
    if format == "nvfp4" and scales.global_scale is not None:  # each expert's own
        scales = Scales(scales.scale, None, scales.global_scale * torch.arange(1.0, 1 + count).view(-1, 1, 1))
    codes = numerics.quantize(w, scales, parsed, block)
    return hold_weight(PackedExperts(format, block, shape, (0, 1), dtype, takes_codes), codes, scales)


def cut(sizes: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(dtype)


def expected(module: PackedExperts, x: Tensor, offsets: Tensor) -> Tensor:
    form = module.graphq_form
    w = numerics.dequantize(codes_of(module), scales_of(module), form.format, form.block).double()
    return ops.REFERENCES[ops.grouped_linear](x.double(), w, offsets)


SIZES = [[2, 0, 3], [1, 0, 0], [0, 0, 0], [0, 1, 1], [17, 40, 2]]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("format", FORMATS)
def test_computes_what_its_weights_stand_for(limit: kernels.Limit, format: str) -> None:
    for n, sizes in ((40, SIZES[0]), (32, SIZES[3]), (1, SIZES[4])):  # of whole tiles, and of others
        module, x, offsets = experts(format, n=n), random(sum(sizes) + 1, 96, seed=5), cut(sizes)  # a row of no expert
        with kernels.using(limit):
            y = module(x, offsets)
        assert_near(y, expected(module, x, offsets), 2e-6)
        assert not y[sum(sizes) :].any()


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("weight", ["int8", "int8/asym", "int4", "int4/asym", "int2", "mxint8", "uint8"])
@pytest.mark.parametrize("input", ["int8", "int8/asym"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_computes_with_codes_what_they_stand_for(limit: kernels.Limit, weight: str, input: str, is_whole: bool) -> None:
    block = [-1, -1] if is_whole else [1, -1]
    module, offsets = experts(weight, n=37, takes_codes=True), cut([2, 0, 3])
    x, read = random(6, 96, seed=5) + 0.4, parse_format(input)
    scales = numerics.choose_scale(x, read, block)
    q = numerics.quantize(x, scales, read, block)
    with kernels.using(limit):
        y = module(q, offsets, scales.scale, scales.zero_point)
    assert_near(y, expected(module, numerics.dequantize(q, scales, read, block), offsets), 2e-6)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(0, 3), st.integers(1, 40), st.integers(8, 80),
    st.sampled_from([(1, 1, 32), (1, 1, -1), (1, -1, 16), (-1, 4, -1), (2, 1, 9)]), st.sampled_from([1, 2]),
    st.sampled_from([torch.int32, torch.int64]), st.integers(0, 9),
)  # fmt: skip
@settings(deadline=None)
def test_any_cut_of_any_block(
    sizes: list[int], rest: int, n: int, k: int, block: tuple[int, ...], threads: int, kind: torch.dtype, seed: int
) -> None:
    module = experts("int4/asym", count=len(sizes), n=n, k=k, block=block, seed=seed)
    x, offsets = random(sum(sizes) + rest, 2 * k, seed=seed)[:, ::2], cut(sizes, kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_near(module(x, offsets), expected(module, x, offsets), 2e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
def test_computes_in_its_dtype(dtype: torch.dtype, bound: float) -> None:
    module, x, offsets = experts(dtype=dtype), random(5, 96).to(dtype), cut([2, 0, 3])
    y = module(x, offsets)
    assert y.dtype == dtype
    assert_near(y, expected(module, x, offsets), bound)


@needs_library
@pytest.mark.parametrize("limit", LIMITS[1:])
def test_threads_change_no_bytes(limit: kernels.Limit) -> None:
    """Of many experts each is one thread's, of few all threads'."""
    module, before = experts(count=8, n=272, k=256, takes_codes=False), torch.get_num_threads()
    for sizes in ([3, 1, 0, 5, 2, 2, 7, 1], [0, 0, 0, 30, 0, 0, 0, 0]):
        x, offsets = random(sum(sizes), 256), cut(sizes)
        try:
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with kernels.using(limit):
                    found.append(module(x, offsets))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*found)


@needs_library
@pytest.mark.parametrize("n", [32, 40])
def test_tiles_take_the_place_of_the_packed_codes(n: int) -> None:
    module, x, offsets = experts(n=n), random(5, 96), cut([2, 0, 3])
    packed = module.weight.clone()
    y = module(x, offsets)
    assert module.weight.dim() == 1
    assert torch.equal(module.packed(), packed)
    assert torch.equal(module.state_dict()["weight"], packed)
    made = copy.deepcopy(module)
    assert torch.equal(made.weight, packed)
    assert torch.equal(made(x, offsets), y)
    module.weight_scale.mul_(2)
    assert_near(module(x, offsets), 2 * y.double())
    module.release()
    assert torch.equal(module.weight, packed)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    "offsets",
    [cut([2, 0]), cut([2, 0, 3, 0]), cut([2, 0, 9]), torch.tensor([2, 1, 5]), torch.tensor([-1, 2, 5]), cut([5])[0],
     torch.tensor([1 << 40, 1, 5]), torch.tensor([[2, 2, 5]])],
)  # fmt: skip
def test_refuses_offsets_that_do_not_cut_the_rows(limit: kernels.Limit, offsets: Tensor) -> None:
    with kernels.using(limit), pytest.raises(PassError, match="offsets"):
        experts()(random(5, 96), offsets)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("x", [random(5, 95), random(96), random(1, 5, 96)], ids=["features", "vector", "batch"])
def test_refuses_inputs_that_do_not_fit(limit: kernels.Limit, x: Tensor) -> None:
    with kernels.using(limit), pytest.raises(PassError, match=r"features|rows"):
        experts()(x, cut([2, 0, 3]))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("takes_codes", [False, True])
def test_is_exported_as_one_op(ran: bool, takes_codes: bool) -> None:
    module, offsets = experts(n=37, takes_codes=takes_codes), cut([2, 0, 3])
    x = random(5, 96)
    scales = numerics.choose_scale(x, parse_format("int8/asym"), [1, -1])
    q = numerics.quantize(x, scales, parse_format("int8/asym"), [1, -1])
    given = (q, offsets, scales.scale, scales.zero_point) if takes_codes else (x, offsets)
    if ran:
        module(*given)
    exported = torch.export.export(module, given)
    assert "packed_linear" in exported.graph_module.code
    assert_near(exported.module()(*given), module(*given).double())


def test_gradients_go_through_the_reference() -> None:
    module, x, offsets = experts(), random(5, 96).requires_grad_(), cut([2, 0, 3])
    module(x, offsets).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[4], dequantized(module)[2].sum(0), atol=1e-5)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("format", ["int4", "int8", "mxfp4", "float8_e4m3fn"])
def test_what_is_no_number_stays_in_its_row(limit: kernels.Limit, format: str) -> None:
    module, x, offsets = experts(format, k=93, n=37), random(6, 93), cut([2, 0, 3])  # the last row is no expert's
    x[0], x[3, 2], x[4, 5], x[5, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    with kernels.using(limit):
        y, other = module(x, offsets), module(x.nan_to_num(0, 0, 0), offsets)
    assert torch.equal(y[1:3], other[1:3])
    assert torch.equal(y.isnan(), expected(module, x, offsets).isnan())
    assert torch.equal(y.isfinite(), expected(module, x, offsets).isfinite())
    assert not y[5].any()


@pytest.mark.parametrize("limit", LIMITS)
def test_a_scale_that_is_no_number_stays_in_its_row(limit: kernels.Limit) -> None:
    module, offsets = experts(takes_codes=True), cut([2, 0, 3])
    q, scale = (random(5, 96) * 30).to(torch.int8), torch.ones(5, 1)
    scale[3] = torch.nan
    with kernels.using(limit):
        y = module(q, offsets, scale)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("limit", LIMITS)
def test_views_are_read_as_they_lie(limit: kernels.Limit) -> None:
    module = experts(k=93, n=37, block=(1, 1, 13))
    room, offsets = random(93, 12), torch.tensor([2, 9, 2, 9, 5, 9])[::2]
    for x in (room.t()[:5], room.t()[:10:2], room.t()[:1].expand(5, 93), room.t().flip(0)[2:7]):
        with kernels.using(limit):
            assert_near(module(x, offsets), expected(module, x, offsets), 2e-6)


def test_no_experts_are_refused() -> None:
    gm = mixture("int4", None)
    given = graph_to_json(gm)
    given["modules"]["gate"]["settings"]["shape"] = [0, 48, 32]
    with pytest.raises(TargetError, match=r"gate: shape: \[0, 48, 32\] is not that of experts"):
        graph_from_json(given, gm.state_dict())


def test_an_artifact_of_before_is_read() -> None:
    """Experts were weights, dequantized for ``graphq::grouped_linear``."""
    module = experts("int4/asym", n=37)
    form, root, graph = module.graphq_form, nn.Module(), fx.Graph()
    old = PackedWeight("int4/asym", form.block, form.shape, (0, 1), torch.float32)
    root.add_module("gate", hold_weight(old, codes_of(module), scales_of(module)))
    x, offsets = graph.placeholder("x"), graph.placeholder("offsets")
    graph.output([graph.call_function(ops.grouped_linear, (x, graph.call_module("gate"), offsets))])
    gm = fx.GraphModule(root, graph)
    read = graph_from_json(json.loads(json.dumps(graph_to_json(gm))), gm.state_dict())
    given = random(5, 96), cut([2, 0, 3])
    assert_near(read(*given)[0], expected(module, *given), 2e-6)
    assert_near(Program(read)(*given)[0], expected(module, *given), 2e-6)


# -- in a graph --------------------------------------------------------------------------------------------------------


def mixture(weight: str, input: str | None) -> fx.GraphModule:
    """The products of a gated layer of four experts, of rows in the order of these."""
    root, graph = nn.Module(), fx.Graph()
    x, offsets = graph.placeholder("x"), graph.placeholder("offsets")

    def product(name: str, n: int, k: int, read: tuple[fx.Node, ...]) -> fx.Node:
        root.add_module(name, experts(weight, count=4, n=n, k=k, block=(1, 1, 16), takes_codes=input is not None))
        return graph.call_module(name, (read[0], offsets, *read[1:]))

    def quantized(x: fx.Node) -> tuple[fx.Node, ...]:
        if input is None:
            return (x,)
        made = graph.call_function(ops.quantize_dynamic, (x, input, [1, -1]))
        return tuple(graph.call_function(operator.getitem, (made, i)) for i in range(3 if "asym" in input else 2))

    read = quantized(x)
    gate, up = (product(name, 48, 32, read) for name in ("gate", "up"))
    y = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.silu.default, (gate,)), up))
    graph.output([product("down", 32, 48, quantized(y))])
    return fx.GraphModule(root, graph)


@needs_library
@pytest.mark.parametrize(
    ("weight", "input"),
    [("int8", "int8"), ("int4", None), ("int4", "int8/asym"), ("mxfp4", None), ("float8_e4m3fn", None)],
)
def test_the_products_of_a_layer_are_one_call(weight: str, input: str | None) -> None:
    gm = mixture(weight, input)
    program = Program(gm)
    for sizes in ([1, 0, 1, 0], [0, 2, 2, 2], [0, 0, 0, MOST_OF_EXPERTS]):
        x, offsets = random(sum(sizes) + 1, 32, seed=7)[:MOST_OF_EXPERTS], cut(sizes)
        with torch.inference_mode(), calls() as ran:
            found, wanted = program(x, offsets)[0], gm(x, offsets)[0]
        assert len(ran) == 1
        # Sums are in another order: an activation between two codes may get the other one.
        assert near(found, wanted, 1e-6 if input is None else 1e-2)
    x, offsets = random(MOST_OF_EXPERTS + 1, 32), cut([3, 0, 0, MOST_OF_EXPERTS - 2])
    with torch.inference_mode(), calls() as ran:
        assert torch.equal(program(x, offsets)[0], gm(x, offsets)[0])
        with pytest.raises(PassError, match=r"offsets \[1, 0, 2, 3\] do not divide 3 rows"):
            program(x[:3], torch.tensor([1, 0, 2, 3]))
        with pytest.raises(PassError, match="for 4 experts"):
            program(x[:3], torch.tensor([1, 2, 3]))
    assert len(ran) == 1  # that refused them


@pytest.mark.parametrize("spec", [W8A8, W4, {"graphq": 1, "weight": "int4/g16", "input": "int8/asym/token/dynamic"}])
def test_a_compiled_mixture_gives_what_its_qdq_form_gives(spec: dict[str, Any]) -> None:
    model = MoE(4, 32, 48)
    for i, parameter in enumerate(model.parameters()):
        parameter.data = random(*parameter.shape, seed=i)
    compiled = graphq.compile(model, spec, inputs=random(6, 32))
    kinds = {path: type(m).__name__ for path, m in compiled.module.named_modules() if "experts." in path}
    assert kinds == dict.fromkeys(["experts.gate_proj", "experts.up_proj", "experts.down_proj"], "PackedExperts")
    for rows in (1, 3, 40):
        x = random(rows, 32, seed=rows)
        with torch.inference_mode():
            assert near(compiled.module(x), compiled.graph(x)[0], 1e-5 if "input" not in spec else 2e-2)
