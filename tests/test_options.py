"""Every option of every algorithm does something, and a match holds what it names: of whatever the table has."""

import copy
import functools
from typing import Any, Final

import pytest
import torch
from torch import Tensor, fx, nn

from graphq.algorithms import PassContext
from graphq.frontends import load_spec
from graphq.ir.layers import layers
from graphq.ir.pipeline import Pipeline, fingerprint
from graphq.pipelines import canonical_passes, passes_for
from graphq.spec.algorithms import ALGORITHMS, defaults
from tests.decoder import TOKENS, Decoder
from tests.models import MoE, capture

# Another value than the default of each option, of the least work.
OTHERS: Final[dict[str, dict[str, Any]]] = {
    "rotate": {"r1": False, "r2": False, "r3": True, "r4": True, "kind": "hadamard", "block_size": 4},
    "equalize": {"rounds": 1},
    "smooth-quant": {"alpha": 0.9, "statistic": "range", "where": "multiply"},
    "awq": {"n_grid": 3, "duo": True, "power": 4, "clip": False, "where": "multiply"},
    "gptq": {"act_order": "none", "dampening": 0.5, "scales": "plan", "min_samples": 0},
    "auto-round": {"steps": 9, "lr": 0.5, "batch_size": 1},
}
SPEED_ALONE: Final = {("gptq", "block_size")}
FEW_STEPS: Final = {"auto-round": {"steps": 5}}
ENOUGH: Final = {"auto-round": {"steps": 30, "lr": 0.02, "batch_size": 48}}  # to change a small weight
FOLDS: Final = {"equalize", "smooth-quant", "awq"}  # what else reads the channels takes the factors up
OPTIONS: Final = [(name, option) for name, options in OTHERS.items() for option in options]


@functools.cache
def graph(kind: str) -> tuple[fx.GraphModule, list[tuple[Tensor, ...]]]:
    """A decoder of one block, experts or a chain of linears, and what it is calibrated on."""
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(24, 8, generator=generator) for _ in range(2)]
    match kind:
        case "experts":
            gm = capture(MoE(), x[0])
        case "chain":
            gm = capture(nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU()))), x[0])
        case _:
            x = [TOKENS, TOKENS.flip(1)]
            gm = capture(Decoder(), TOKENS)
    Pipeline(canonical_passes()).run(gm)
    return gm, [(one,) for one in x]


def quantized(kind: str, name: str, options: dict[str, Any], notes: list[str] | None = None) -> fx.GraphModule:
    """The QDQ form with 4-bit weights, by this algorithm."""
    source, batches = graph(kind)
    spec = load_spec({"graphq": 1, "weight": "int4/channel", "algorithms": [{name: options}]})
    gm = copy.deepcopy(source)
    blocks = ALGORITHMS[name].needs_data
    passes = passes_for(spec, layers(gm), PassContext(note=None if notes is None else notes.append), blocks)[
        len(canonical_passes()) :
    ]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        Pipeline(passes).run(gm, batches)
    return gm


@functools.cache
def by_default(kind: str, name: str) -> str:
    return fingerprint(quantized(kind, name, FEW_STEPS.get(name, {})))


def test_every_option_is_here() -> None:
    there = {(name, option) for name, entry in ALGORITHMS.items() for option in entry.options}
    assert {*OPTIONS} | SPEED_ALONE == there
    assert all(OTHERS[name][option] != defaults(name)[option] for name, option in OPTIONS)


@pytest.mark.parametrize("name", OTHERS)
def test_the_same_options_give_the_same(name: str) -> None:
    assert fingerprint(quantized("decoder", name, FEW_STEPS.get(name, {}))) == by_default("decoder", name)


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_changes_what_comes_out(name: str, option: str) -> None:
    kind = {"min_samples": "experts", "rounds": "chain"}.get(option, "decoder")
    made = quantized(kind, name, FEW_STEPS.get(name, {}) | {option: OTHERS[name][option]})
    assert fingerprint(made) != by_default(kind, name)


@pytest.mark.parametrize("name", [name for name, entry in ALGORITHMS.items() if entry.scope == "layers"])
def test_one_expert_alone(name: str) -> None:
    """An algorithm that moves no factors changes nothing but the expert of its match, or says what else."""
    notes: list[str] = []
    options = ENOUGH.get(name, {})
    plain = quantized("experts", "rtn", {}).state_dict()
    made = quantized("experts", name, options | {"match": "experts.1.down_proj"}, notes).state_dict()
    changed = {
        f"{key}[{i}]" for key in plain for i in range(len(made[key])) if not torch.equal(plain[key][i], made[key][i])
    }
    assert changed
    told = f"experts.down_proj: {name} rounds all experts of the stack, of which its match has 1 of 4"
    alone = {"experts.down_proj.weight[1]", "experts.down_proj.weight_scale[1]"}
    assert changed <= alone or name in FOLDS or told in notes
