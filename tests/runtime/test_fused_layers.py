"""Fused layers: that both ways give what the ops of the QDQ form give, that bad input is an error, and copies."""

import copy
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from graphq import numerics
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.runtime import fused_layers
from graphq.runtime.fused_layers import FusedLayer, has_fused_kernel, hold_fused
from graphq.runtime.fusions import ACTIVATIONS, CODES, Fusion
from graphq.runtime.modules import codes_of, format_of, scales_of, settings_of

CONV: dict[str, Any] = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A fused layer with random operands on grids that cut a little off."""

    def __init__(
        self, shape: tuple[int, ...], x: tuple[int, ...], *, bias: bool = True, seed: int = 0, **settings: Any
    ):
        settings = {"per_channel": True, "input": "uint8", "output": "uint8"} | settings
        self.module = FusedLayer(shape, **settings)
        self.form: Fusion = self.module.graphq_form
        per_channel = [1 if self.form.per_channel else -1, *[-1] * (len(shape) - 1)]
        w = random(*shape, seed=seed) / self.form.fan_in**0.5
        scale, _, _ = numerics.choose_scale(w, numerics.parse_format("int8"), per_channel)
        self.codes = numerics.quantize(w, Scales(scale), numerics.parse_format("int8"), per_channel)
        hold_fused(self.module, self.codes, scale)
        self.scale = scale
        self.bias = random(shape[0], seed=seed + 1) / 4 if bias else None
        self.x: Any = self.grid(self.form.input, x, seed + 2)
        given = self.form.output_shape(x)
        assert given is not None
        self.other: Any = (None,) * 3 if self.form.other is None else self.grid(self.form.other, given, seed + 3)
        self.given: Any = (None, None) if self.form.output is None else self.grid(self.form.output, (1,), seed)[1:]

    @staticmethod
    def grid(text: str, shape: Any, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
        format = numerics.parse_format(text)
        dtype = numerics.code_dtype(format)
        zero_point = None if "int8" in text and "asym" not in text and "uint8" not in text else 100 + seed % 20
        scales = Scales(torch.tensor(0.02), None if zero_point is None else torch.tensor(zero_point).to(dtype))
        return numerics.quantize(random(*shape, seed=seed), scales, format, [-1] * len(shape)), *scales[:2]

    def arguments(self) -> list[Any]:
        return [*self.x, self.bias, *self.other, *self.given]

    def run(self) -> Tensor:
        return self.module(*self.arguments())

    def real(self) -> Tensor:
        """The value before it is quantized, in float64."""
        x, w = value(*self.x), self.codes.double() * self.scale.double()
        bias, it = None if self.bias is None else self.bias.double(), self.form
        if it.is_convolution:
            y = F.conv2d(x, w, bias, it.stride, it.padding, it.dilation, it.groups)
        else:
            y = F.linear(x, w, bias)
        if it.other is not None:
            y = y + value(*self.other)
        return ACTIVATIONS[it.activation].function(y, *it.numbers)

    def check(self) -> None:
        """The result is the real one, but for rounding: half a step, and what float32 loses of the terms."""
        got, expected = self.run(), self.real()
        assert got.shape == expected.shape
        # Sums are exact; scales, bias and activation round a few times in float32, relative to their largest term.
        lost = 1e-5 * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
        if self.form.output is None:
            assert got.dtype == torch.float32
            assert (got - expected).abs().le(lost).all()
            return
        scale, zero_point = self.given
        low, high = (0, 255) if got.dtype == torch.uint8 else (-128, 127)
        assert scale is not None
        steps = expected / scale.double() + (0 if zero_point is None else zero_point.double())
        assert (got.double() - steps.clamp(low, high)).abs().le(0.5 + lost / float(scale)).all()


def value(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return (q.double() - (0 if zero_point is None else zero_point.double())) * scale.double()


@pytest.fixture(params=["kernel", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernel" and not has_fused_kernel():
        pytest.skip("oneDNN has no exact int8 kernels on this machine")
    monkeypatch.setattr(fused_layers, "has_fused_kernel", lambda: request.param == "kernel")
    return str(request.param)


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "convolution": ((6, 4, 3, 3), (2, 4, 9, 7), CONV),
    "no bias, by tensor": ((6, 4, 3, 3), (2, 4, 9, 7), CONV | {"bias": False, "per_channel": False}),
    "to floats": ((6, 4, 3, 3), (2, 4, 9, 7), CONV | {"output": None}),
    "signed": ((6, 4, 3, 3), (2, 4, 9, 7), CONV | {"input": "int8", "output": "int8/asym"}),
    "signed to unsigned": ((6, 4, 3, 3), (2, 4, 9, 7), CONV | {"input": "int8/asym", "output": "uint8"}),
    "a sum": ((6, 4, 3, 3), (2, 4, 9, 7), CONV | {"other": "uint8", "activation": "relu"}),
    "a sum of signed": ((6, 4, 3, 3), (2, 4, 9, 7), CONV | {"other": "int8", "output": "int8"}),
    "a sum with one channel": ((1, 4, 3, 3), (2, 4, 9, 7), CONV | {"other": "uint8"}),
    "a sum of one place": ((6, 4, 3, 3), (2, 4, 1, 1), CONV | {"other": "uint8"}),
    "groups": ((6, 2, 3, 3), (2, 4, 9, 7), CONV | {"groups": 2}),
    "depthwise, a sum": ((4, 1, 3, 3), (2, 4, 9, 7), CONV | {"groups": 4, "other": "uint8"}),
    "wide padding": ((6, 4, 2, 2), (1, 4, 3, 3), CONV | {"padding": [5, 4], "stride": [3, 2]}),
    "clamp": ((6, 4, 3, 3), (2, 4, 9, 7), CONV | {"activation": "clamp", "numbers": [-0.5, 0.75]}),
    "an empty batch": ((6, 4, 3, 3), (0, 4, 9, 7), CONV),
    "an empty batch of sums": ((6, 4, 3, 3), (0, 4, 9, 7), CONV | {"other": "uint8"}),
    "linear": ((7, 33), (5, 33), {}),
    "linear to floats": ((7, 33), (2, 3, 33), {"output": None, "activation": "gelu"}),
    "a vector": ((7, 33), (33,), {"activation": "silu"}),
    "no rows": ((7, 33), (2, 0, 33), {}),
    "one by one": ((1, 1), (1, 1), {"input": "int8", "output": "int8"}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_its_codes_stand_for(name: str, path: str) -> None:
    shape, x, settings = CASES[name]
    case = Case(shape, x, **settings)
    case.check()
    assert (case.module._graphq_prepared is not None) == (path == "kernel" and 0 not in x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, path: str) -> None:
    settings: dict[str, Any] = {"activation": activation, "numbers": [-0.5, 0.25][: ACTIVATIONS[activation].numbers]}
    Case((7, 33), (5, 33), **settings).check()
    if ACTIVATIONS[activation].of_convolutions:
        Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV, **settings).check()


small = st.integers(1, 5)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Channels, windows and grids that are multiples of nothing, by both ways."""
    draw = data.draw
    seed = draw(st.integers(0, 99))
    formats = {"input": draw(st.sampled_from(CODES)), "output": draw(st.sampled_from([None, *CODES]))}
    shared: dict[str, Any] = formats | {"bias": draw(st.booleans()), "per_channel": draw(st.booleans()), "seed": seed}
    if draw(st.booleans()):
        n, k = draw(st.integers(1, 70)), draw(st.integers(1, 300))
        case = Case((n, k), (*draw(st.lists(small, max_size=2)), k), **shared)
    else:
        groups, each, own = draw(small), draw(st.integers(1, 20)), draw(small)
        window = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
        pairs = {name: [draw(st.integers(low, 3)), draw(st.integers(low, 3))] for name, low in PAIRS.items()}
        each_axis = zip(pairs["dilation"], window, pairs["padding"], strict=True)
        least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in each_axis]
        size = [low + draw(st.integers(0, 6)) for low in least]
        other = draw(st.sampled_from([None, *CODES])) if formats["output"] else None
        activation = draw(st.sampled_from(["none", "relu"] if other else ["none", "relu", "silu", "hardswish"]))
        shape, x = (groups * each, own, *window), (draw(small), groups * own, *size)
        case = Case(shape, x, groups=groups, other=other, activation=activation, **pairs, **shared)
    case.check()
    case.x = (case.x[0].transpose(0, -1).contiguous().transpose(0, -1), *case.x[1:])  # laid out in another way
    case.check()


PAIRS = {"stride": 1, "padding": 0, "dilation": 1}


def test_extreme_codes_do_not_saturate(path: str) -> None:
    """Two products of 255 by 127 or -128 are more than 16 bits hold."""
    for shape, x, settings in (((16, 64, 3, 3), (1, 64, 4, 4), CONV), ((16, 64), (2, 64), {})):
        case = Case(shape, x, output=None, bias=False, **settings)
        case.codes.fill_(127)[1::2] = -128
        case.x[0].fill_(255)
        case.check()


def test_what_is_added_is_not_written_over(path: str) -> None:
    for other in ("uint8", "int8"):
        case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV, other=other)
        last = case.other[0].contiguous(memory_format=torch.channels_last)
        for held in (case.other[0], last):
            before = held.clone()
            case.module(*case.x, case.bias, held, *case.other[1:], *case.given)
            assert torch.equal(held, before)


# -- what does not fit -------------------------------------------------------------------------------------------------


def wrong(**changes: Any) -> list[Any]:
    case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV, other="uint8")
    names = ["q", "scale", "zero_point", "bias", "other", "other_scale", "other_zero_point", "o_scale", "o_zero_point"]
    return [changes.get(name, given) for name, given in zip(names, case.arguments(), strict=True)]


Q = torch.zeros(2, 4, 9, 7, dtype=torch.uint8)
WRONG: dict[str, dict[str, Any]] = {
    "numbers in the place of tensors": {"scale": 1.0},
    "a number in the place of a bias": {"bias": 1.0},
    "a number that is added": {"other": 1},
    "a number in the place of codes": {"q": 1},
    "floats": {"q": Q.float()},
    "signed codes": {"q": Q.view(torch.int8)},
    "other channels": {"q": Q[:, :3]},
    "no batch": {"q": Q[0]},
    "a picture smaller than the window": {"q": Q[:, :, :0]},
    "two scales": {"scale": torch.ones(2)},
    "no scale": {"scale": None},
    "no zero point": {"zero_point": None},
    "a zero point of another type": {"zero_point": torch.tensor(1 << 40)},
    "a bias of another length": {"bias": torch.zeros(5)},
    "a bias in float64": {"bias": torch.zeros(6, dtype=torch.float64)},
    "nothing to add": {"other": None},
    "a sum that would broadcast": {"other": torch.zeros(1, 6, 9, 7, dtype=torch.uint8)},
    "a sum of other channels": {"other": Q},
    "a sum of floats": {"other": torch.zeros(2, 6, 9, 7)},
    "no scale of the sum": {"other_scale": None},
    "no scale of the output": {"o_scale": None},
    "no zero point of the output": {"o_zero_point": None},
    "a zero point of the output of another type": {"o_zero_point": torch.tensor(3)},
}


@pytest.mark.parametrize("name", WRONG)
def test_operands_that_do_not_fit_are_errors(name: str, path: str) -> None:
    case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV, other="uint8")
    with pytest.raises(PassError):
        case.module(*wrong(**WRONG[name]))


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "a format that is none of codes": {"input": "int4"},
    "an output of 16 bits": {"output": "uint16"},
    "an unknown activation": {"activation": "softmax"},
    "numbers that it does not take": {"activation": "relu", "numbers": [1.0]},
    "numbers that are none": {"activation": "clamp", "numbers": ["0", "1"]},
    "an activation of linears": {"activation": "gelu"},
    "a sum that stays float": {"other": "uint8", "output": None},
    "a sum, silu": {"other": "uint8", "activation": "silu"},
    "no stride": {"stride": [0, 1]},
    "negative padding": {"padding": [-1, 0]},
    "no dilation": {"dilation": [1, 0]},
    "padding out of all bounds": {"padding": [1 << 20, 0]},
    "one number for two axes": {"stride": [1]},
    "groups that do not divide": {"groups": 4},
    "no groups": {"groups": 0},
    "three axes": {"shape": (6, 4, 3)},
    "no channels": {"shape": (0, 4, 3, 3)},
    "sums that 32 bits do not hold": {"shape": (1, 4, 128, 130)},
    "a linear with a stride": {"shape": (6, 4)},
    "a linear with groups": {"shape": (6, 4), "groups": 2, "stride": [], "padding": [], "dilation": []},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_layers_that_no_kernel_computes(name: str) -> None:
    settings: dict[str, Any] = {"shape": (6, 4, 3, 3), "per_channel": True, "input": "uint8", "output": "uint8", **CONV}
    with pytest.raises(PassError, match="no layer can be"):
        FusedLayer(**(settings | IMPOSSIBLE[name]))


def test_a_weight_that_was_replaced_by_another_kind() -> None:
    """A kernel that is given what oneDNN has not packed ends the process."""
    if not has_fused_kernel():
        pytest.skip("oneDNN has no exact int8 kernels on this machine")
    case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV)
    case.module.weight = case.module.weight.float()
    with pytest.raises(PassError, match=r"a weight torch.float32\[6, 4, 3, 3\] with 6 scales, not int8"):
        case.run()
    with pytest.raises(PassError, match=r"weight of shape \[6, 4\], not \[6, 4, 3, 3\]"):
        hold_fused(case.module, case.codes[:, :, 0, 0], case.scale)


# -- what modules are asked for ----------------------------------------------------------------------------------------


def test_changed_weights_are_seen(path: str) -> None:
    case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV)
    case.check()
    case.module.load_state_dict({"weight": -case.codes.clamp(min=-127), "weight_scale": case.scale * 2})
    case.codes, case.scale = case.module.weight, case.module.weight_scale
    case.check()


def test_copies_stand_alone(path: str) -> None:
    case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV)
    before = case.run()
    made = copy.deepcopy(case.module)
    case.module.weight.zero_()
    assert torch.equal(made(*case.arguments()), before)


@pytest.mark.parametrize("name", ["a sum", "clamp", "linear to floats", "no bias, by tensor"])
def test_settings_and_state_make_the_module_again(name: str) -> None:
    shape, x, settings = CASES[name]
    case = Case(shape, x, **settings)
    made = FusedLayer(**settings_of(case.module))
    made.load_state_dict(case.module.state_dict())
    assert torch.equal(made(*case.arguments()), case.run())
    assert format_of(made) == "int8"
    assert torch.equal(codes_of(made), case.codes)
    assert torch.equal(scales_of(made).scale, case.scale)


def test_conversions_leave_dtypes_alone() -> None:
    case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV)
    before = case.run()
    holder = nn.Sequential(case.module).half().double()
    assert torch.equal(holder[0](*case.arguments()), before)


def test_a_traced_call_is_the_ops_of_the_qdq_form() -> None:
    case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV, other="uint8")

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = case.module

        def forward(self, q: Tensor) -> Tensor:
            return self.layer(q, *case.arguments()[1:])

    exported = torch.export.export(Call(), (case.x[0],))
    assert "onednn" not in str(exported.graph)
    off = (exported.module()(case.x[0]).int() - case.run().int()).abs()
    assert off.max() <= 1


def test_the_probe_finds_kernels_that_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating:
        """oneDNN without VNNI."""

        def __getattr__(self, name: str) -> Any:
            real = getattr(torch.ops.onednn, name)
            return real if "prepack" in name else lambda *given: real(*given).clamp(max=1e6)

    monkeypatch.setattr(fused_layers, "_PROBED", [])
    monkeypatch.setattr(fused_layers, "_onednn", Saturating())
    assert has_fused_kernel() is False


def test_without_the_kernels_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def __getattr__(self, name: str) -> Any:
            raise NotImplementedError(name)

    monkeypatch.setattr(fused_layers, "_PROBED", [])
    monkeypatch.setattr(fused_layers, "_onednn", Missing())
    assert has_fused_kernel() is False
    Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV).check()


def test_the_same_call_again_with_other_operands(path: str) -> None:
    """What was prepared for one call is not taken for another: of another size, or on another grid."""
    case = Case((6, 4, 3, 3), (2, 4, 9, 7), **CONV, other="uint8")
    case.check()
    for x in ((3, 4, 9, 7), (2, 4, 5, 6)):
        again = Case((6, 4, 3, 3), x, **CONV, other="uint8")
        again.module = case.module
        again.check()
    case.check()
    for position, name in enumerate(["x", "x", "other", "other"]):
        held = list(getattr(case, name))
        held[1 + position % 2] = held[1 + position % 2] + 3
        setattr(case, name, tuple(held))
        case.check()
    case.given = (case.given[0] * 2, case.given[1] + 5)
    case.check()
    assert case.bias is not None
    case.bias.add_(0.5)
    case.check()
    with pytest.raises(PassError):
        case.module(case.x[0].view(torch.int8), *case.arguments()[1:])
    with pytest.raises(PassError):
        case.module(*case.x, case.bias, case.other[0].view(torch.int8), *case.other[1:], *case.given)
