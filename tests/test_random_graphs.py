"""Random models through random orders of the passes that leave a function alone: they do, in float64."""

import random
import traceback
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

import graphq
from graphq.errors import GraphqError
from tests.random_graphs import Trial, random_model

TOLERANCE = 1e-9
# On how many of a hundred graphs each pass changes something, at least: a generator of nothing foldable is no test.
SHARES = {
    "remove-no-ops": 1,
    "fold-pads": 6,
    "fold-weights": 20,
    "raise-linear": 20,
    "raise-grouped-linear": 2,
    "split-gate-up": 1,
    "fold-batch-norm": 10,
    "untie": 4,
    "fold-norms": 30,
    "rotate": 5,
    "r1": 2,
    "r2": 2,
    "r3": 2,
    "r4": 4,
    "equalize": 10,
    "smooth-quant": 12,
    "awq": 10,
    "blockwise": 8,
}
RARE = 2  # passes of which a hundred graphs may have no work: the fifty of a quick run have some for each
ALGORITHMS: dict[str, list[dict[str, Any]]] = {  # and options to draw from
    "fold-batch-norm": [{}],
    "rotate": [{}, {"r3": True, "r4": True, "kind": "orthogonal"}],
    "equalize": [{}],
    "smooth-quant": [{}, {"where": "multiply"}, {"where": "fold-or-multiply", "alpha": "search"}],
    "awq": [{}, {"where": "fold-or-multiply"}],
    "gptq": [{}],
    "auto-round": [{"steps": 3}],
    "correct-bias": [{}],
}


def check(seeds: Iterable[int]) -> Counter[str]:
    """In how many of the graphs of these seeds each pass changes something; that none changes a function is held."""
    changed: Counter[str] = Counter()
    failed: list[str] = []
    for seed in seeds:
        how = f"python -m tests.random_graphs {seed}"
        try:
            trial = Trial(seed)
            trial.run()
            error = trial.error()
        except Exception:  # noqa: BLE001 - of a pass; the seeds after it are tried, too
            failed.append(f"{how}\n{traceback.format_exc(limit=-4)}")
            continue
        changed.update(name for name, count in trial.counts.items() if count)
        if not error <= TOLERANCE:
            failed.append(f"{how}: {error:.1e}: {list(trial.counts)}\n{trial.model}")
    assert not failed, "\n\n".join(failed)
    return changed


def test_passes_leave_the_function_of_random_graphs_alone() -> None:
    changed = check(range(50))
    shares = {name: changed[name] * 2 for name in SHARES}
    assert not {name: share for name, share in shares.items() if share < SHARES[name]}


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_passes_leave_the_function_of_a_thousand_random_graphs_alone(hundred: int) -> None:
    changed = check(range(100 * hundred, 100 * hundred + 100))
    assert not {name: changed[name] for name, share in SHARES.items() if share > RARE and changed[name] < share}


def compile_graphs(seeds: Iterable[int]) -> int:
    """How many models are compiled; the rest are refused for a reason."""
    count = 0
    for seed in seeds:
        dice = random.Random(f"compile {seed}")
        model = random_model(seed).float()
        inputs = {n: x.float() if x.is_floating_point() else x for n, x in model.examples(seed, 3, 4).items()}
        chosen = [name for name in ALGORITHMS if dice.random() < 0.35]
        algorithms = [{name: options} if (options := dice.choice(ALGORITHMS[name])) else name for name in chosen]
        spec: dict[str, Any] = {"graphq": 1, "weight": "int8/channel", "algorithms": algorithms}
        if kind := dice.choice([None, "int8/token/dynamic", "int8/tensor"]):
            spec["input"] = kind
        try:
            made = graphq.compile(model, spec, inputs=inputs, calibration=[inputs, inputs])
        except GraphqError:
            continue  # what it says is tested elsewhere
        outputs = made(**inputs)
        assert isinstance(outputs, dict)
        assert all(y.isfinite().all() for y in outputs.values()), (seed, spec)
        count += 1
    return count


def test_random_graphs_compile_or_are_refused() -> None:
    assert compile_graphs(range(10)) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(3))
def test_hundreds_of_random_graphs_compile_or_are_refused(hundred: int) -> None:
    assert compile_graphs(range(100 * hundred, 100 * hundred + 100)) >= 80
