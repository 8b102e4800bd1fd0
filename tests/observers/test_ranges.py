"""Observers: what they keep, that halves merge into the whole, and the scales that follow."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphq.errors import PassError, SpecError
from graphq.numerics import histogram
from graphq.numerics.taps import Window, window
from graphq.observers.ranges import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    OfmrObserver,
    OfmrWeightObserver,
    OutputMap,
    RangeObserver,
    observer_for,
)
from graphq.observers.statistics import MeanObserver
from graphq.spec.quant import parse_quant

QUANT = parse_quant("int8/tensor")


def make() -> MinMaxObserver:
    return MinMaxObserver(QUANT, ("a.b", "a.c"))


def test_extremes_are_exact_and_the_input_is_handed_on() -> None:
    seen = make()
    assert not seen.has_observed
    x = torch.tensor([[0.1, -0.3], [7.7, 0.2]])
    assert seen(x) is x
    seen(torch.tensor([1.0]))
    seen(torch.tensor([-0.30000004, 7.6]))
    assert (seen.low.item(), seen.high.item()) == (torch.tensor(-0.30000004).item(), torch.tensor(7.7).item())
    assert (int(seen.batches), seen.has_observed) == (3, True)


def test_an_empty_activation_says_nothing() -> None:
    seen = make()
    seen(torch.empty(0, 4))
    assert (int(seen.batches), seen.has_observed) == (1, False)


def test_a_constant_was_seen() -> None:
    seen = make()
    seen(torch.zeros(3))
    assert (seen.low.item(), seen.high.item(), seen.has_observed) == (0, 0, True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_name_the_layer_and_the_batch(bad: float) -> None:
    seen = make()
    seen(torch.ones(2, 2))
    with pytest.raises(SpecError) as error:
        seen(torch.tensor([[1.0, bad], [2.0, 3.0]]))
    assert str(error.value) == "calibration: batch 1: the input of a.b holds NaN or Inf"
    assert (seen.low.item(), seen.high.item()) == (1, 1)


def test_memory_does_not_grow() -> None:
    seen = make()
    with torch.inference_mode():
        seen(torch.ones(1000))
    gc.collect()
    before = sum(t.numel() for t in gc.get_objects() if type(t) is Tensor)
    for _ in range(20):
        seen(torch.randn(1000))
    gc.collect()
    assert sum(t.numel() for t in gc.get_objects() if type(t) is Tensor) <= before
    assert {name: t.numel() for name, t in seen.state_dict().items()} == {"low": 1, "high": 1, "batches": 1}
    assert seen.low.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_stay_float32_whatever_the_model_becomes(dtype: torch.dtype) -> None:
    seen = make()
    seen(torch.tensor([-1 / 3, 2 / 3]))
    low = seen.low.item()
    seen = nn.Sequential(seen).to(dtype)[0]
    assert isinstance(seen, MinMaxObserver)
    assert (seen.low.dtype, seen.high.dtype, seen.batches.dtype) == (torch.float32, torch.float32, torch.int64)
    assert seen.low.item() == low
    seen(torch.tensor([-2.0], dtype=dtype))
    assert (seen.low.item(), seen.low.dtype) == (-2, torch.float32)


def test_they_move_between_devices() -> None:
    seen = make().to("meta")
    assert {t.device.type for t in seen.state_dict().values()} == {"meta"}


def test_copies_are_apart_and_states_can_be_loaded() -> None:
    seen = make()
    with torch.inference_mode():  # as calibration does
        seen(torch.tensor([-1.0, 2.0]))
    twin = copy.deepcopy(seen)
    twin(torch.tensor([5.0]))
    assert (seen.high.item(), twin.high.item(), twin.low.item()) == (2, 5, -1)
    assert (twin.quant, twin.layers) == (seen.quant, seen.layers)
    other = make()
    other.load_state_dict(twin.state_dict())
    assert (other.low.item(), other.high.item(), int(other.batches)) == (-1, 5, 2)
    seen.load_state_dict(twin.state_dict())
    assert seen.high.item() == 5


# -- every kind --------------------------------------------------------------------------------------------------------

WEIGHT = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
LINEAR = OutputMap(F.linear, WEIGHT, channel_axis=-1, block=(1, -1))
KINDS = [
    "int8/tensor",
    "int8/tensor/ema0.3",
    "int8/asym/tensor/ema",
    "int8/tensor/percentile90",
    "int8/asym/tensor/percentile80",
    "int4/asym/tensor/histogram",
    "int4/tensor/histogram",
    "float8_e4m3fn/tensor/histogram",
    "int8/asym/tensor/entropy",
    "int4/tensor/entropy",
    "int4/tensor/mse",
    "hifloat8/tensor/ofmr",
    "float8_e4m3fn/tensor/ofmr_absolute",
    "int8/tensor/ofmr",
    "nvfp4",
]


def observer(text: str) -> RangeObserver:
    return observer_for(parse_quant(text), ("a.b",), lambda: [LINEAR])


def weight_observer(text: str) -> OfmrWeightObserver:
    return OfmrWeightObserver(parse_quant(text), ("a.b",), LINEAR)


def look_at(seen: RangeObserver, batches: list[Tensor]) -> RangeObserver:
    """As ``Calibrate`` does."""
    for look in range(seen.sweeps):
        seen.sweep = look
        for x in batches:
            seen(x)
    return seen


def assert_equal_states(first: RangeObserver, second: RangeObserver, exactly: bool) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if exactly or not value.is_floating_point():
            assert torch.equal(value, theirs[name]), name
        else:  # sums of float64 or float32 products in another order
            tolerance = 1e-12 if value.dtype == torch.float64 else 1e-5
            assert torch.allclose(value, theirs[name], rtol=tolerance, atol=0), name


BATCHES = st.lists(
    st.tuples(st.integers(0, 2**31), st.integers(0, 6), st.sampled_from([1e-30, 1e-3, 1.0, 7.0, 1e6])),
    min_size=1,
    max_size=5,
)


def made(drawn: list[tuple[int, int, float]]) -> list[Tensor]:
    return [torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)) * size for seed, rows, size in drawn]


@pytest.mark.parametrize("text", KINDS)
@settings(max_examples=settings().max_examples // 5)
@given(BATCHES, BATCHES)
def test_two_halves_merge_into_the_whole(text: str, first, second) -> None:
    halves, whole = (observer(text), observer(text)), observer(text)
    batches = (made(first), made(second))
    for look in range(whole.sweeps):
        for half, own in zip(halves, batches, strict=True):
            half.sweep = look
            for x in own:
                half(x)
        whole.sweep = look
        for x in (*batches[0], *batches[1]):
            whole(x)
        if look + 1 < whole.sweeps:  # what the halves found on the first look is shared before the second
            copies = copy.deepcopy(halves)
            halves[0].merge(copies[1])
            halves[1].merge(copies[0])
            assert torch.equal(halves[0].low, whole.low)
    halves[0].merge(halves[1]) if whole.sweeps == 1 else halves[0].absorb(halves[1])
    if whole.sweeps == 1:
        assert_equal_states(halves[0], whole, exactly="ema" not in text)
    if not whole.has_observed:
        return
    ours, theirs = halves[0].scales(), whole.scales()
    exact = "ema" not in text and "ofmr" not in text
    assert torch.allclose(ours.scale, theirs.scale, rtol=0 if exact else 1e-5, atol=0) or "ofmr" in text
    assert (ours.zero_point is None) == (theirs.zero_point is None)


@given(BATCHES, BATCHES)
def test_weight_losses_merge_into_the_whole(first, second) -> None:
    halves = [look_at(weight_observer("hifloat8/channel/ofmr"), made(drawn)) for drawn in (first, second)]
    whole = look_at(weight_observer("hifloat8/channel/ofmr"), [*made(first), *made(second)])
    halves[0].merge(halves[1])
    assert_equal_states(halves[0], whole, exactly=False)


@pytest.mark.parametrize("text", KINDS)
def test_state_does_not_grow_and_survives_copies(text: str) -> None:
    seen = look_at(observer(text), made([(1, 6, 1.0)]))
    sizes = {name: value.numel() for name, value in seen.state_dict().items()}
    look_at(seen, made([(seed, 6, 10.0**seed) for seed in range(5)]))
    assert {name: value.numel() for name, value in seen.state_dict().items()} == sizes
    assert sum(sizes.values()) <= 2 * histogram.SIDE + 30
    twin = copy.deepcopy(seen)
    fresh = observer(text)
    fresh.load_state_dict(seen.state_dict())
    for other in (twin, fresh):
        assert torch.equal(other.scales().scale, seen.scales().scale)


def test_other_kinds_are_not_merged() -> None:
    with pytest.raises(PassError, match=r"the observers of a\.b and a\.b differ, they cannot be merged"):
        observer("int8/tensor").merge(observer("int4/tensor"))
    with pytest.raises(PassError, match="cannot be merged"):
        observer("int8/tensor").merge(observer("int8/tensor/entropy"))


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_every_kind_refuses_nan_and_inf(text: str, bad: float) -> None:
    with pytest.raises(SpecError, match=r"calibration: batch 0: the input of a\.b holds NaN or Inf"):
        observer(text)(torch.tensor([[1.0, bad, 0, 0, 0]]))


def test_a_moving_average_by_hand() -> None:
    seen = MovingAverageObserver(parse_quant("int8/asym/tensor/ema0.5"), ("a",), 0.5)
    for low, high in ((-1.0, 1.0), (-3.0, 2.0), (0.0, 4.0)):
        seen(torch.tensor([low, high]))
    # low: -1, then (-1 - 3) / 2 = -2, then -1; high: 1, 1.5, 2.75
    assert [end.item() for end in seen.extremes()] == [-1, 2.75]


def test_percentiles_by_hand() -> None:
    x = torch.cat([torch.linspace(-1, 1, 1001), torch.tensor([100.0])])  # one outlier in 1002 elements
    width = 2.0**-4  # 100 / 2048 is below 2^-4 = 0.0625: the bins' width
    seen = observer("int8/asym/tensor/percentile99.8")  # leaves out 2.004 elements, 1.002 at each end
    seen(x)
    low, high = seen.extremes()
    assert -1 <= low <= -1 + width
    assert 1 - width <= high <= 1 + width
    seen = observer("int8/tensor/percentile100")
    seen(x)
    assert [end.item() for end in seen.extremes()] == [-100, 100]
    seen = observer("int8/asym/tensor/percentile100")
    seen(x)
    assert [end.item() for end in seen.extremes()] == [-1, 100]


def test_outliers_are_clipped_where_that_pays() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[0] = 60.0
    for method in ("histogram", "entropy", "mse"):
        seen = observer(f"int4/tensor/{method}")
        seen(x)
        high = seen.extremes()[1].item()
        assert 1.5 < high < 30, method  # min-max: 60, which leaves half a code for one standard deviation

    def error(text: str) -> float:
        seen = observer(text)
        seen(x)
        scale = seen.scales().scale
        return (x - (x / scale).round().clamp(-8, 7) * scale).square().sum().item()

    assert error("int4/tensor/histogram") < 0.2 * error("int4/tensor")


def test_a_histogram_of_what_needs_no_clipping_keeps_the_range() -> None:
    x = torch.linspace(-1, 1, 255).repeat(10)
    for method in ("histogram", "entropy"):
        seen = observer(f"int8/tensor/{method}")
        seen(x)
        assert seen.extremes()[1].item() >= 0.98, method


def test_counts_are_those_of_any_order() -> None:
    values = torch.cat([torch.randn(500) * 10.0**power for power in range(-8, 9)])
    seen = HistogramObserver(parse_quant("int8/tensor/entropy"), ("a",))
    for part in values[torch.randperm(len(values))].split(37):
        seen(part)
    exponent = int(seen.exponent)
    assert 2.0**exponent * histogram.SIDE > values.abs().max() >= 2.0**exponent * histogram.SIDE / 2
    index = torch.floor(values.double() / 2.0**exponent).long() + histogram.SIDE
    assert torch.equal(seen.counts, torch.bincount(index, minlength=2 * histogram.SIDE))


# -- OFMR: a run of AMCT's -------------------------------------------------------------------------------------------

AMCT_W = torch.tensor([
    [0.10, -0.70, 0.35, 1.00, 0.22, -0.41, 0.05, 0.63],
    [-2.00, 0.50, 0.25, 1.50, -0.33, 0.77, -1.10, 0.08],
    [0.31, 0.29, -0.58, 0.44, 0.91, -0.12, 0.67, -0.85],
    [-0.15, 0.93, 0.72, -0.26, 0.38, 0.54, -0.49, 1.20],
    [0.02, 0.11, -0.07, 0.19, -0.23, 0.31, 0.27, -0.05],
    [1.25, -1.5, 0.75, 0.5, -0.25, 0.125, -0.625, 0.875],
    [0.4, 0.3, 0.2, 0.1, -0.1, -0.2, -0.3, -0.4],
    [0.9, -0.8, 0.7, -0.6, 0.5, -0.4, 0.3, -0.2],
])  # fmt: skip
AMCT_X = torch.tensor([
    [(((7 * i + 5 * j) % 11) - 5) / 4 * (4 if j == 2 else 1) for j in range(8)] for i in range(12)
])  # fmt: skip
AMCT_LOSSES = [
    0.0101515, 0.0032567, 0.0024622348, 0.0024622348, 0.0024670, 0.0026548,
    0.0029633, 0.0040307, 0.0112447, 0.0121932, 0.0131528,
]  # fmt: skip


def amct_weight(text: str) -> OfmrWeightObserver:
    quant = parse_quant(text)
    block = (1, -1) if "channel" in text else (-1, -1)
    output = OutputMap(F.linear, AMCT_W, channel_axis=-1, block=block)
    seen = OfmrWeightObserver(quant, ("layer",), output)
    seen(AMCT_X)
    return seen


def test_ofmr_losses_and_scales_are_amcts() -> None:
    seen = amct_weight("hifloat8/tensor/ofmr_absolute")
    # AMCT's losses in the digits it printed
    assert torch.allclose(seen.losses[:, 0], torch.tensor(AMCT_LOSSES), rtol=2e-5, atol=0)
    assert seen.scales().scale.tolist() == [[0.125]]  # equal losses at 2^-3 and 2^-2: the smaller
    found = amct_weight("hifloat8/channel/ofmr_absolute").scales().scale.flatten().tolist()
    # For the last channel AMCT's record says 2^-5, whose loss there is 15 times that of 2^-4, and these losses add up to
    # the record's own for the whole tensor, a third of which at 2^-5 is that channel's.
    assert found == [0.0625, 4, 4, 0.0625, 0.5, 0.03125, 0.03125, 0.0625]
    assert amct_weight("float8_e4m3fn/tensor/ofmr_absolute").scales().scale.tolist() == [[0.03125]]
    found = amct_weight("float8_e4m3fn/channel/ofmr_absolute").scales().scale.flatten().tolist()
    assert found == [0.03125, 0.03125, 32, 0.03125, 4, 0.03125, 0.03125, 0.03125]


def test_ofmr_of_an_activation_that_every_scale_holds_takes_the_smallest() -> None:
    output = OutputMap(F.linear, AMCT_W, channel_axis=-1, block=(1, -1))
    seen = look_at(OfmrObserver(parse_quant("hifloat8/tensor/ofmr_absolute"), ("layer",), [output]), [AMCT_X])
    assert seen.state_dict()["losses"].tolist() == [0.0] * 11
    assert seen.scales().scale.item() == 2.0**-5


def test_ofmr_finds_its_range_whatever_the_magnitude() -> None:
    x = AMCT_X * 2.0**40
    output = OutputMap(F.linear, AMCT_W, channel_axis=-1, block=(1, -1))
    relative = look_at(OfmrObserver(parse_quant("hifloat8/tensor/ofmr"), ("layer",), [output]), [x]).scales()
    absolute = look_at(OfmrObserver(parse_quant("hifloat8/tensor/ofmr_absolute"), ("layer",), [output]), [x]).scales()
    assert absolute.scale.item() == 2.0**5  # the end of its range, at which everything saturates
    assert 2.0**30 < relative.scale.item() < 2.0**42


def test_means_of_halves_merge_into_the_whole() -> None:
    data = [torch.randn(3, 4, 9) * 10**n for n in range(4)]

    def seeing(of: int | Window, shape: list[int], batches: list[Tensor]) -> MeanObserver:
        seen = MeanObserver(("a",), of, shape)
        for x in batches:
            assert seen(x) is x
        return seen

    for of, shape in ((-1, [9]), (-2, [4]), (window([3], [2], [1], [1]), [4, 3])):
        whole, first, second = (seeing(of, shape, part) for part in (data, data[:2], data[2:]))
        first.merge(second)
        assert torch.allclose(first.total, whole.total, rtol=1e-14, atol=0)
        assert (first.count, first.batches) == (whole.count, whole.batches)
        first.half()
        assert first.total.dtype == torch.float64
        assert torch.equal(copy.deepcopy(whole).total, whole.total)
    seen = seeing(-2, [4], data)
    assert torch.allclose(seen.total, torch.stack(data).double().sum((0, 1, 3)), rtol=1e-14, atol=0)
    assert int(seen.count) == 4 * 27


def test_means_name_what_holds_nan() -> None:
    for role in ("input", "output"):
        seen = MeanObserver(("a.b",), -1, [2], role)
        seen(torch.ones(3, 2))
        with pytest.raises(SpecError) as error:
            seen(torch.tensor([[1.0, torch.nan]]))
        assert str(error.value) == f"calibration: batch 1: the {role} of a.b holds NaN or Inf"
        assert int(seen.count) == 3
    empty = MeanObserver(("a.b",), -1, [2])
    empty(torch.ones(0, 2))
    assert not empty.has_observed
