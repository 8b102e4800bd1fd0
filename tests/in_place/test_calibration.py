"""Calibration in place: which batches count, what a failure leaves behind, and what factors outlive."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphq
from graphq.errors import PassError, SpecError
from graphq.observers.ranges import MinMaxObserver
from graphq.runtime.layers import QuantizedLayer
from tests.in_place.test_quantizer import data, held, linears, seeded
from tests.models import MLP, Tied, Twice

STATIC = ("int8/channel", "int8/tensor")
# Statistics that are taken as data comes by, and data that is kept for a second look.
ALGORITHMS: list[list[Any]] = [[], ["gptq"], ["smooth-quant"], [{"awq": {"power": 4}}]]


class Routed(nn.Module):
    """Batches whose first element is negative go to ``other``, others to ``first``; it fails where ``fails`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.fails:
            raise ValueError("on the way")
        return (self.first if x.flatten()[0] >= 0 else self.other)(h)


def watched(model: nn.Module, weight: str = STATIC[0], input: str | None = STATIC[1], algorithms: Any = (), batches: int = 1) -> Any:  # fmt: skip
    """``model`` with random weights that are the same each time, quantized so."""
    graphq.quantize(seeded(model), linears(weight, input, list(algorithms), batches))
    return model


def factors(model: nn.Module) -> dict[str, Tensor]:
    names = ("quantized_weight", "scale_w", "scale_d", "scale_factor")
    return {k: v.clone() for k, v in model.state_dict().items() if k.rpartition(".")[2] in names}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert len(a) >= 2
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def calibrated(batches: list[Tensor], algorithms: Any, model: type[nn.Module] = Routed) -> dict[str, Tensor]:
    """The factors after these batches."""
    made = watched(model(), algorithms=algorithms, batches=len(batches))
    for batch in batches:
        made(batch)
    return factors(made)


def positive(*shape: int, count: int = 3) -> list[Tensor]:
    batches = data(*shape, count=count)
    for batch in batches:
        batch.view(-1)[0] = batch.view(-1)[0].abs()
    return batches


@pytest.mark.parametrize("algorithms", ALGORITHMS, ids=str)
@torch.no_grad()
def test_a_batch_that_fails_on_the_way_counts_for_nothing(algorithms: Any) -> None:
    batches = positive(4, 8)
    model = watched(Routed(), algorithms=algorithms, batches=2)
    model(batches[0])
    model.fails = True
    with pytest.raises(ValueError, match="on the way"):
        model(batches[2] * 100)
    with pytest.raises(SpecError, match="calibration: 1 of 2 batches"):
        graphq.convert(model)
    model.fails = False
    model(batches[1])
    assert_same(factors(model), calibrated(batches[:2], algorithms))


@pytest.mark.parametrize("algorithms", ALGORITHMS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_batch_that_is_not_finite_is_refused_and_counts_for_nothing(algorithms: Any, bad: float) -> None:
    batches = positive(4, 8)
    model = watched(Routed(), algorithms=algorithms, batches=2)
    model(batches[0])
    wrong = batches[2].clone()
    wrong[1, 2] = bad
    with pytest.raises(SpecError) as error:
        model(wrong)
    assert str(error.value) == "calibration: batch 1: the input of up holds NaN or Inf"
    model(batches[1])
    assert_same(factors(model), calibrated(batches[:2], algorithms))


@torch.no_grad()
def test_the_layer_is_named_whose_input_is_not_finite() -> None:
    model = watched(Routed())
    model.up.bias.data[3] = torch.nan
    with pytest.raises(SpecError) as error:
        model(positive(4, 8)[0])
    assert str(error.value) == "calibration: batch 0: the input of first holds NaN or Inf"


@torch.no_grad()
def test_what_needs_no_data_takes_any() -> None:
    model = watched(MLP(), "int8/channel", None)
    wanted = data(4, 8)[0]
    model(wanted * torch.nan)
    graphq.convert(model)
    assert model(wanted).isfinite().all()


@torch.no_grad()
def test_statistics_that_overflow_end_the_calibration() -> None:
    model = watched(MLP(), "int4/channel", None, ["gptq"], batches=2)
    (x,) = data(4, 8, count=1)
    model(x)
    problem = "calibration: batch 1: the input of up holds NaN or Inf"
    with pytest.raises(SpecError) as error:
        model(x * 1e30)
    assert str(error.value) == problem
    for use in (lambda: model(x), lambda: graphq.convert(model)):
        with pytest.raises(SpecError) as error:
            use()
        assert str(error.value) == f"{problem}; calibration ended there: quantize a fresh model"


@pytest.mark.parametrize("algorithms", ALGORITHMS, ids=str)
@torch.no_grad()
def test_a_layer_that_no_batch_reached_is_named_and_calibrates_on_the_first_that_does(algorithms: Any) -> None:
    batches = positive(4, 8)
    model = watched(Routed(), algorithms=algorithms, batches=2)
    model(batches[0])
    model(batches[1])
    assert held(model.other) == {}
    assert held(model.first) != {}
    before = list(model.modules())
    with pytest.raises(SpecError) as error:
        graphq.convert(model)
    assert str(error.value) == ("calibration: no data reached other in 2 batches; calibrate with data that uses it")
    assert list(model.modules()) == before
    kept = factors(model)
    model(-batches[0])
    assert held(model.other) != {}
    assert_same({k: v for k, v in factors(model).items() if not k.startswith("other")}, kept)
    graphq.convert(model)
    assert isinstance(model.other, QuantizedLayer)


@torch.no_grad()
def test_conversion_before_the_last_batch_is_an_error() -> None:
    model = watched(MLP(), "int8/channel", None, batches=3)
    (x,) = data(4, 8, count=1)
    for done in range(3):
        with pytest.raises(SpecError) as error:
            graphq.convert(model)
        assert str(error.value) == (
            f"calibration: {done} of 3 batches; call the model on {3 - done} more before graphq.convert"
            " (calls of MLP itself count, not those of its parts)"
        )
        model(x)
    graphq.convert(model)


@torch.no_grad()
def test_parts_that_are_called_alone_do_not_calibrate() -> None:
    model = watched(MLP(), batches=2)
    large, x = data(4, 8)
    model.up(large * 100)
    model(x)
    model.up(large * torch.nan)  # neither counted nor looked at
    model(x)
    assert model.up.scale_d.item() == pytest.approx(float(x.abs().max()) / 127, rel=1e-6)
    assert not torch.equal(model.up(large), F.linear(large, model.up.weight, model.up.bias))  # settled for all uses


@torch.no_grad()
def test_a_layer_that_is_called_twice_has_one_scale_for_both_and_the_batch_counts_once() -> None:
    model = watched(Twice(), batches=2)
    first, second = data(4, 8)
    model(first)
    assert held(model.shared) == {}
    model(second)
    both = [x for batch in (first, second) for x in (batch, F.relu(F.linear(batch, model.shared.weight)))]
    assert model.shared.scale_d.item() == pytest.approx(max(float(x.abs().max()) for x in both) / 127, rel=1e-6)


class Residual(nn.Module):
    """Adds to its input where that stands, after a layer has read it; calls the layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        y = self.fc(input=h)
        h += 100.0
        return h + y


@pytest.mark.parametrize("algorithms", [[], ["smooth-quant"]], ids=str)
@torch.no_grad()
def test_inputs_count_as_they_were_when_the_layer_read_them(algorithms: Any) -> None:
    model = watched(Residual(), algorithms=algorithms)
    (x,) = data(4, 8, count=1)
    model(x)
    scaled = x if model.fc.scale_factor is None else x * model.fc.scale_factor
    assert model.fc.scale_d.item() == pytest.approx(float(scaled.abs().max()) / 127, rel=1e-6)
    fake = model(x)
    graphq.convert(model)
    torch.testing.assert_close(model(x), fake, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_batches_without_elements_settle_nothing() -> None:
    model = watched(MLP())
    (x,) = data(4, 8, count=1)
    model(x[:0])
    with pytest.raises(SpecError, match=r"no data reached up in 1 batches; .*\n.*no data reached down"):
        graphq.convert(model)
    model(x)
    graphq.convert(model)


@torch.no_grad()
def test_batches_without_elements_change_nothing() -> None:
    model = watched(MLP(), batches=2)
    (x,) = data(4, 8, count=1)
    assert model(x[:0]).shape == (0, 8)
    assert model(x).shape == (4, 8)
    assert model.up.scale_d.item() == pytest.approx(float(x.abs().max()) / 127, rel=1e-6)
    assert model(x[:0]).shape == (0, 8)
    graphq.convert(model)
    assert model(x[:0]).shape == (0, 8)


@pytest.mark.parametrize("algorithms", ALGORITHMS, ids=str)
@torch.no_grad()
def test_a_copy_made_on_the_way_goes_on_by_itself(algorithms: Any) -> None:
    batches = positive(4, 8)
    model = watched(MLP(), algorithms=algorithms, batches=2)
    model(batches[0])
    copied = copy.deepcopy(model)
    model(batches[1])
    assert held(copied.up) == {}
    assert all(layer.sqnr_db is None for layer in graphq.in_place_report(copied).layers)
    copied(batches[2])
    assert all(layer.sqnr_db is not None for layer in graphq.in_place_report(copied).layers)
    assert_same(factors(model), calibrated(batches[:2], algorithms, MLP))
    assert_same(factors(copied), calibrated([batches[0], batches[2]], algorithms, MLP))
    settled = copy.deepcopy(model)
    graphq.convert(model)
    assert isinstance(settled.up, nn.Linear)
    graphq.convert(settled)
    assert torch.equal(settled(batches[0]), model(batches[0]))


@pytest.mark.parametrize("algorithms", [*ALGORITHMS, [{"gptq": {"scales": "plan"}}, "awq"]], ids=str)
@torch.no_grad()
def test_a_state_dict_takes_the_place_of_calibration(algorithms: Any) -> None:
    batches = positive(4, 8)
    model = watched(MLP(), "int8/asym/channel", "int8/asym/tensor", algorithms=algorithms, batches=2)
    floats = model(batches[2])
    model(batches[1])
    state = copy.deepcopy(model.state_dict())
    fresh: Any = MLP()
    graphq.quantize(seeded(fresh), linears("int8/asym/channel", "int8/asym/tensor", algorithms, 5))
    assert fresh.load_state_dict(state) == ([], [])
    fake = model(batches[2])
    assert torch.equal(fresh(batches[2]), fake)
    assert not torch.equal(fake, floats)
    assert_same(factors(fresh), factors(model))
    for one in (fresh, model):
        graphq.convert(one)
    assert torch.equal(fresh(batches[2]), model(batches[2]))


@torch.no_grad()
def test_a_state_dict_may_hold_the_factors_of_some_layers() -> None:
    batches = positive(4, 8)
    model = watched(Routed())
    model(batches[0])
    fresh = watched(Routed(), batches=2)
    assert fresh.load_state_dict(model.state_dict()) == ([], [])
    assert held(fresh.other) == {}
    with pytest.raises(SpecError, match="0 of 2 batches"):
        graphq.convert(fresh)
    for batch in batches[:2]:
        fresh(-batch)
    assert_same({k: v for k, v in factors(fresh).items() if not k.startswith("other")}, factors(model))
    graphq.convert(fresh)


@torch.no_grad()
def test_factors_of_another_plan_are_refused() -> None:
    (x,) = data(4, 8, count=1)
    model = watched(MLP(), "int8/channel", "int8/tensor")
    model(x)
    state = model.state_dict()
    plan = "(weight int4/asym/g4)"
    for weight, input, problems in (
        ("int4/asym/g4", None, [
            f"up: factors quantized_weight, scale_w, scale_d; its plan {plan} has quantized_weight, scale_w, offset_w"
        ]),
        ("int8/tensor", "int8/tensor", ["up: scale_w: torch.float32[12, 1], not torch.float32[1]"]),
        ("hifloat8/channel", "hifloat8/tensor", [
            "up: quantized_weight: torch.int8[12, 8], not torch.uint8[12, 8]",
        ]),
    ):  # fmt: skip
        fresh = watched(MLP(), weight, input)
        with pytest.raises(RuntimeError) as error:
            fresh.load_state_dict(state)
        for problem in problems:
            assert problem in str(error.value)
        assert held(fresh.up) == {}
        fresh(x)
        graphq.convert(fresh)


def test_training_mode_calibrates_alike_and_keeps_gradients_of_floats() -> None:
    batches = positive(4, 8)
    model = watched(MLP(), batches=2).train()
    (model(batches[0]) ** 2).sum().backward()
    assert model.up.weight.grad is not None
    model(batches[1])
    assert_same(factors(model), calibrated(batches[:2], [], MLP))
    assert not model(batches[2]).requires_grad
    graphq.convert(model)
    assert model.up.training
    assert not any(tensor.requires_grad for tensor in model.state_dict(keep_vars=True).values())
    assert not model(batches[2]).requires_grad


@pytest.mark.parametrize("algorithms", ALGORITHMS, ids=str)
def test_inference_mode_leaves_ordinary_tensors(algorithms: Any) -> None:
    batches = positive(4, 8)
    model = watched(MLP(), algorithms=algorithms, batches=2)
    with torch.inference_mode():
        for batch in batches[:2]:
            model(batch.clone())
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    with torch.no_grad():
        assert_same(factors(model), calibrated(batches[:2], algorithms, MLP))
    model.load_state_dict(model.state_dict())
    graphq.convert(model)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


@torch.no_grad()
def test_autocast_leaves_the_factors_alone() -> None:
    batches = positive(4, 8)
    model = watched(Twice(), "int4/channel", None, ["gptq"])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batches[0]).dtype == torch.bfloat16
        fake = model(batches[0])
        assert fake.dtype == torch.bfloat16
        assert model.shared.scale_w.dtype == torch.float32
        graphq.convert(model)
        assert torch.equal(model(batches[0]), fake)


@torch.no_grad()
def test_a_model_may_change_its_dtype_when_it_is_calibrated_but_not_before() -> None:
    (x,) = data(4, 8, count=1)
    model = watched(MLP(), batches=2)
    model(x)
    model.double()
    with pytest.raises(SpecError) as error:
        model(x.double())
    assert str(error.value) == (
        "calibration: the weight of up was torch.float32 on cpu and is torch.float64 on cpu; calibrate anew"
    )
    model = watched(MLP(), "mxfp8_e4m3", "int8/tensor")
    model(x)
    model.bfloat16()
    fake = model(x.bfloat16())
    assert fake.dtype == torch.bfloat16
    graphq.convert(model)
    assert torch.equal(model(x.bfloat16()), fake)
    assert model.up.product.weight_scale.dtype == torch.float8_e8m0fnu


@torch.no_grad()
def test_weights_that_are_loaded_before_the_last_batch_count() -> None:
    (x,) = data(4, 8, count=1)
    model, other = watched(MLP(), batches=2), MLP()
    model(x)
    model.load_state_dict({k: v * 2 for k, v in seeded(other).state_dict().items()})
    model(x)
    assert torch.equal(model.up.scale_w, 2 * calibrated([x], [], MLP)["up.scale_w"])


@torch.no_grad()
def test_weights_that_are_loaded_into_a_copy_count_there() -> None:
    (x,) = data(4, 8, count=1)
    model = watched(MLP(), batches=2)
    model(x)
    copied = copy.deepcopy(model)
    copied.load_state_dict({name: w * 2 for name, w in model.state_dict().items()})
    for one in (model, copied):
        one(x)
    assert torch.equal(copied.up.scale_w, 2 * model.up.scale_w)


class Pair(nn.Module):
    """One linear under two names, and one of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.rest = nn.ModuleList([nn.Sequential(self.a, nn.ReLU()), nn.Bilinear(8, 8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.rest[0](self.a(x))
        return self.rest[1](h, h)


@torch.no_grad()
def test_a_layer_with_two_names_is_replaced_at_both() -> None:
    model = watched(Pair())
    batches = data(4, 8)
    model(batches[0])
    fake = model(batches[1])
    assert graphq.in_place_report(model).notes == (
        "rest.0.0: is a under another name",
        "rest.1: stays float: a Bilinear; in place, nn.Linear and nn.Conv2d are quantized",
    )
    assert [layer.layer.fqn for layer in graphq.in_place_report(model).layers] == ["a"]
    graphq.convert(model)
    assert isinstance(model.a, QuantizedLayer)
    assert model.rest[0][0] is model.a
    torch.testing.assert_close(model(batches[1]), fake, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_tied_weight_stays_what_it_is_elsewhere() -> None:
    model = watched(Tied(), "int4/channel", None)
    tokens = torch.arange(6)
    embedded = model.embedding(tokens)
    model(tokens)
    fake = model(tokens)
    assert "head: its weight is embedding.weight, too, which is left as it is" in graphq.in_place_report(model).notes
    graphq.convert(model)
    assert torch.equal(model.embedding(tokens), embedded)
    assert torch.equal(model(tokens), fake)
    assert "head.weight" not in model.state_dict()


@torch.no_grad()
def test_hooks_of_the_user_stay() -> None:
    model = MLP()
    seen: list[str] = []
    removed = model.up.register_forward_hook(lambda *_: seen.append("removed"))
    model.up.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    watched(model)
    model.up.register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    (x,) = data(4, 8, count=1)
    model(x)
    graphq.convert(model)
    removed.remove()
    seen.clear()
    model(x)
    assert seen == ["before", "QuantizedLayer"]
    assert (len(model.up._forward_pre_hooks), len(model.up._forward_hooks)) == (1, 1)  # none of ours
    assert not model.down._forward_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_hooks_that_change_inputs_and_outputs_have_their_say() -> None:
    model: Any = MLP()
    model.up.register_forward_hook(lambda _m, _x, y: y * 2)
    watched(model)
    model.up.register_forward_pre_hook(lambda _m, x: (x[0] * 10,))
    (x,) = data(4, 8, count=1)
    model(x)
    assert model.up.scale_d.item() == pytest.approx(float(x.abs().max()) / 12.7, rel=1e-6)
    fake, up = model(x), model.up(x)
    assert float((up - 2 * F.linear(x * 10, model.up.weight, model.up.bias)).abs().max()) < 0.02 * float(up.abs().max())
    graphq.convert(model)
    torch.testing.assert_close(model(x), fake, rtol=1e-5, atol=1e-5 * float(fake.abs().max()))


@torch.no_grad()
def test_an_input_that_was_zero_is_noted() -> None:
    for batch, notes in ((torch.zeros(4, 8), ["up"]), (torch.eye(4, 8), [])):
        model = watched(MLP())
        model(batch)
        seen = [note.partition(": calibration saw only zeros in its input")[0] for note in report_notes(model)]
        assert seen == notes


def report_notes(model: nn.Module) -> list[str]:
    return [note for note in graphq.in_place_report(model).notes if "calibration saw" in note]


@torch.no_grad()
def test_what_fails_in_graphq_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: MinMaxObserver, x: Tensor, low: Tensor, high: Tensor) -> None:
        raise RuntimeError("of no shape")

    monkeypatch.setattr(MinMaxObserver, "see_within", broken)
    model = watched(MLP())
    with pytest.raises(PassError) as error:
        model(torch.ones(4, 8))
    assert str(error.value) == "calibrate: MinMaxObserver of the input of up: RuntimeError: of no shape"
    with pytest.raises(SpecError, match="of no shape; calibration ended there: quantize a fresh model"):
        model(torch.ones(4, 8))
