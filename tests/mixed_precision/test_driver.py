"""A search finds the best mix there is where all can be tried, holds its budget, and says what it cannot do."""

import inspect
import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphq
from graphq.errors import SpecError
from graphq.frontends import print_spec
from graphq.mixed_precision import costs as costs_module
from graphq.mixed_precision import driver
from graphq.mixed_precision.divergence import Divergence
from graphq.mixed_precision.driver import find
from graphq.mixed_precision.quantized import QuantizedLayers, quantized

OPTIONS = "int2/channel,int4/channel,int8/channel"


class Stack(nn.Module):
    """Linears and a convolution of unlike sensitivity."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.first = nn.Linear(8 * 36, 16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 10)

    def forward(self, image):
        x = torch.relu(self.conv(image)).flatten(1)
        x = torch.relu(self.first(x))
        return self.last(x + torch.relu(self.second(x)))


MODEL = Stack().eval()
IMAGES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def search(budget=None, **how):
    return find(MODEL, how.pop("options", OPTIONS), budget, inputs=IMAGES[0], calibration=IMAGES, **how)


def measured(gm, spec_of: dict[str, str]) -> float:
    plans = {fqn: graphq.load_spec({"graphq": 1, "weight": text}).rules[0].decision for fqn, text in spec_of.items()}
    held = QuantizedLayers(gm, quantized(gm, plans, None))
    from graphq.ir.layers import sites

    return Divergence(gm, [(x,) for x in IMAGES]).of({site.op.node.name: held for site in sites(gm)})


def test_equals_trying_all_mixes():
    """Three options for four layers are 81 mixes; with enough exchanges the best that fits is found."""
    gm = graphq.compiler.capture(MODEL, IMAGES[0])
    found = search("4.3bits", exchanges=40)
    sizes = found.sizes
    losses = {
        mix: measured(gm, {g.layers[0].fqn: g.options[c] for g, c in zip(found.groups, mix, strict=True)})
        for mix in itertools.product(range(3), repeat=4)
        if sum(own[c] for own, c in zip(sizes, mix, strict=True)) * 8 <= 4.3 * sum(g.numel for g in found.groups)
    }
    assert found.chosen == min(losses, key=losses.__getitem__)
    for trial in found.trials:
        assert any(loss == pytest.approx(trial.loss, rel=1e-6) for loss in losses.values())  # sums in the same order
        assert trial.size * 8 <= 4.3 * sum(g.numel for g in found.groups)


def test_what_is_measured_is_what_compile_makes():
    found = search("5bits", exchanges=0)
    made = graphq.compile(MODEL, found.spec, inputs=IMAGES[0])
    plans = {row.layer.fqn: str(row.weight) for row in made.report.layers}
    assert plans == {g.layers[0].fqn: g.options[c] for g, c in zip(found.groups, found.chosen, strict=True)}
    assert sum(row.nbytes for row in made.report.layers) == found.size <= 5 * sum(g.numel for g in found.groups) / 8


@pytest.mark.parametrize("sensitivity", ["gradient", "output-error", "divergence"])
def test_each_sensitivity_ranks_the_formats(sensitivity):
    found = search("4bits", sensitivity=sensitivity, exchanges=0)
    for own in found.costs:
        assert own[0] > own[1] > own[2] > 0


def test_a_budget_in_bytes_and_one_of_the_largest_mix():
    whole = sum(own[2] for own in search("8.5bits", exchanges=0).sizes)
    assert search(f"{whole}B", exchanges=0).chosen == (2, 2, 2, 2)
    assert search(f"{whole - 1}B", exchanges=0).chosen != (2, 2, 2, 2)


def test_float_is_an_option():
    found = search("20bits", options="int4/channel,float", exchanges=4)
    assert "float" in {g.options[c] for g, c in zip(found.groups, found.chosen, strict=True)}
    made = graphq.compile(MODEL, found.spec, inputs=IMAGES[0])
    assert {row.layer.fqn for row in made.report.layers if row.weight is None} == {
        g.layers[0].fqn for g, c in zip(found.groups, found.chosen, strict=True) if g.options[c] == "float"
    }


def test_is_deterministic():
    assert print_spec(search("4bits").spec) == print_spec(search("4bits").spec)


# -- how much may be lost


def agreement(compiled) -> float:
    with torch.no_grad():
        return sum((compiled(x) - MODEL(x)).square().sum().item() for x in IMAGES)


def test_max_drop_gives_the_smallest_that_holds():
    calls: list[float] = []

    def top(compiled) -> float:
        with torch.no_grad():
            error = sum((compiled(x) - MODEL(x)).square().sum().item() for x in IMAGES)
            size = sum(MODEL(x).square().sum().item() for x in IMAGES)
        calls.append(1 - error / size)
        return calls[-1]

    found = search(max_drop="1%", evaluate=top, higher_is_better=True)
    floor = 0.99 * calls[0]
    assert found.trials[-1].loss >= floor or found.trials[-2].loss >= floor
    chosen = next(t for t in found.trials if t.size == found.size)
    assert chosen.loss >= floor
    smaller = [t for t in found.trials[1:] if t.size < found.size]
    assert smaller
    assert all(t.loss < floor for t in smaller)
    assert len(calls) <= 2 + len(found.front).bit_length() + 1


def test_max_drop_that_no_mix_holds():
    with pytest.raises(
        SpecError, match=r"^max_drop: the largest mix has .*, the float model .*: more than 0\.000% lost"
    ):
        search(max_drop=0.0, evaluate=lambda made: 1 + agreement(made), options="int2/channel,int3/channel")


# -- scores


def test_scores_are_kept_and_only_what_is_new_is_measured(tmp_path, monkeypatch):
    file = tmp_path / "scores.json"
    first = search("4bits", exchanges=0, scores=file)
    asked: list[list[str]] = []
    measure = costs_module.layer_costs

    def counted(gm, options, *rest):
        asked.append(list(options))
        return measure(gm, options, *rest)

    monkeypatch.setattr(costs_module, "layer_costs", counted)
    with monkeypatch.context() as patched:
        patched.setattr(costs_module, "quantized", None)  # nothing is quantized for what is known
        again = search("4bits", exchanges=0, scores=file)
    assert again.costs == first.costs
    assert asked == []
    search("4bits", exchanges=0, scores=file, options=f"{OPTIONS},int3/channel")
    assert asked == [["int3/channel"]]
    assert len(json.loads(file.read_text())["options"]) == 4


def test_an_option_that_decides_as_another_has_its_scores(tmp_path):
    """Where two options decide alike on a group, the file has the same costs of it for both."""
    file = tmp_path / "scores.json"
    rules = [{"match": "blocks", "weight": "int8/channel"}, {"match": "conv", "weight": "int3/channel"}]
    search("5bits", exchanges=0, scores=file, options=["int2/channel", "int8/channel", {"graphq": 1, "rules": rules}])
    narrow, wide, mixed = json.loads(file.read_text())["options"].values()
    assert {path: mixed[path] for path in ("first", "second", "last")} == {
        p: wide[p] for p in ("first", "second", "last")
    }
    assert mixed["conv"] not in (narrow["conv"], wide["conv"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a file of scores: "),
        ("[]", "not a file of scores of this graphq"),
        ('{"graphq_scores": 1, "of": "else", "options": {}}', "its scores are of another model, other data or another"),
    ],
)
def test_other_files_of_scores(tmp_path, text, message):
    file = tmp_path / "scores.json"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        search("4bits", exchanges=0, scores=file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert file.read_text() == text


def test_a_score_that_is_no_number(tmp_path):
    file = tmp_path / "scores.json"
    search("4bits", exchanges=0, scores=file)
    held = json.loads(file.read_text())
    next(iter(held["options"].values()))["conv"] = -1.0
    file.write_text(json.dumps(held))
    with pytest.raises(SpecError, match=r"options: a score is not a number from 0; remove the file$"):
        search("4bits", exchanges=0, scores=file)


# -- latency


def test_latency_is_that_of_the_kernels(monkeypatch):
    times = {"int4/channel": 3e-6, "int8/channel": 5e-6}
    monkeypatch.setattr(costs_module, "layer_latency", lambda layer, decision, rows: times[str(decision.weight)] * rows)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    data = [torch.randn(4, 16)]
    found = find(model, "int4/channel,int8/channel", "1.4x-latency", inputs=data[0], calibration=data, rows=2)
    assert found.sizes == ((6000, 10000), (6000, 10000))
    assert found.size == 16000
    assert found.spec.notes == ("search: 1.4x-latency: 0.016 ms; 3 mixes measured",)


def test_latency_is_measured():
    model = nn.Sequential(nn.Linear(256, 256))
    data = [torch.randn(4, 256)]
    found = find(model, "int4/g128,float", "100x-latency", inputs=data[0], calibration=data)
    assert all(size > 0 for own in found.sizes for size in own)


# -- bad input


@pytest.mark.parametrize(
    ("budget", "how", "message"),
    [
        (None, {}, "search: neither a budget nor max_drop is given"),
        (None, {"max_drop": "1%"}, "evaluate: max_drop needs a function of a compiled model, or windows of tokens"),
        ("1bits", {}, "budget: 1bits: the smallest mix takes 1,"),
        ("1.1x-latency", {}, "budget: latency: conv is a conv2d; only linears are timed"),
        ("4bits", {"sensitivity": "gradients"}, "sensitivity: 'gradients' is not one of gradient, output-error, diver"),
        (None, {"max_drop": "x", "evaluate": agreement}, "max_drop: 'x' is no share: write 0.005 or 0.5%"),
        (None, {"max_drop": -0.1, "evaluate": agreement}, "max_drop: -0.1 is not from 0 to 1000%"),
        ("4bits", {"exchanges": -1}, "exchanges: -1 is not a whole number from 0"),
    ],
)
def test_refused(budget, how, message):
    with pytest.raises(SpecError) as caught:
        search(budget, **how)
    assert str(caught.value).startswith(message)


def test_no_batches():
    with pytest.raises(SpecError, match=r"^calibration: no batches; a search needs at least one$"):
        find(MODEL, OPTIONS, "4bits", inputs=IMAGES[0], calibration=[])


def test_search_takes_and_passes_on_what_find_takes(monkeypatch):
    """One signature, which editors show; what is given arrives."""
    ours, theirs = (inspect.signature(one) for one in (driver.search, driver.find))
    assert ours.parameters == theirs.parameters
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in ours.parameters.values())
    seen = {}

    def find(*args, **named):
        seen.update(theirs.bind(*args, **named).arguments)
        return SimpleNamespace(spec="the spec")

    monkeypatch.setattr(driver, "find", find)
    given: Any = {name: object() for name in ours.parameters}
    positional = [given.pop(name) for name in ("model", "options", "budget")]
    assert driver.search(*positional, **given) == "the spec"
    assert seen == given | dict(zip(("model", "options", "budget"), positional, strict=True))
