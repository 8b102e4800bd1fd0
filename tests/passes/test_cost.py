"""Analyses of a whole graph cost time linear in its blocks. Calls and lines are counted, so that the machine does not matter."""

import copy
import dataclasses
import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq import passes
from graphq.capture.source import KEY, source_of
from graphq.ir.biases import channels_of, set_bias
from graphq.ir.channel_groups import apply_factors, groups
from graphq.ir.grids import place
from graphq.ir.index import GraphIndex
from graphq.ir.pipeline import Batches, Pass, Pipeline
from graphq.ir.views import Linear, ops_of
from graphq.lowering.profiles import GENERIC_INT8
from graphq.lowering.profiles.ort_cpu import ORT_CPU
from graphq.lowering.torch.fuse_attention import fuse_attention
from graphq.lowering.torch.fuse_rotary import fuse_rotary
from graphq.lowering.torch.merge_equal import merge_equal
from graphq.passes.annotate import Annotate
from graphq.passes.awq import AWQ
from graphq.passes.blockwise import Blockwise
from graphq.passes.decompose import Decompose
from graphq.passes.equalize import Equalize
from graphq.passes.fix_sizes import FixSizes
from graphq.passes.fold_norms import FoldNorms
from graphq.passes.fold_pads import FoldPads
from graphq.passes.fold_weights import FoldWeights
from graphq.passes.observe import Observe
from graphq.passes.observe_means import ObserveMeans
from graphq.passes.place_quantizers import PlaceQuantizers
from graphq.passes.quantize_biases import QuantizeBiases
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.raise_linear import RaiseLinear
from graphq.passes.raise_recurrent import RaiseRecurrent
from graphq.passes.raise_rms_norm import RaiseRmsNorm
from graphq.passes.remove_no_ops import RemoveNoOps
from graphq.passes.rotate import Rotate
from graphq.passes.rotate_online import RotateOnline
from graphq.passes.round_to_stored import RoundToStored
from graphq.passes.smooth_quant import SmoothQuant
from graphq.passes.split_gate_up import SplitGateUp
from graphq.passes.untie import Untie
from graphq.runtime.program import Program
from tests.decoder import RMS
from tests.graphs import plan, spec
from tests.models import capture

PLANS = spec(blocks=plan("int8/channel"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = RMS(8), RMS(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (p(h).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Deep(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(count)])
        self.norm, self.head = RMS(8), nn.Linear(8, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture(scope="module")
def graphs() -> tuple[fx.GraphModule, ...]:
    made = tuple(capture(Deep(count), torch.ones(2, 3, dtype=torch.int64)) for count in (3, 6, 9))
    gc.collect()
    gc.freeze()  # `steps` collects a hundred times, and looks through what is made after this alone
    return made


def steps(f: Callable[[], Any]) -> int:
    """How many functions ``f`` calls and lines it runs in all; those of a comprehension once for each element."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    def trace(frame: object, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.getprofile(), sys.gettrace()
    gc.collect()
    gc.disable()  # what others left behind is not freed, with its callbacks, in the middle of this
    sys.setprofile(see)
    sys.settrace(trace)
    try:
        f()
    finally:
        sys.setprofile(before[0])
        sys.settrace(before[1])
        gc.enable()
    return count


def fold(gm: fx.GraphModule) -> None:
    found = list(groups(gm, None, "fold", None))
    assert len(found) > 6
    index = GraphIndex(gm)
    for group in found:
        apply_factors(index, group, torch.ones(group.count), "test")


def add_other_biases(gm: fx.GraphModule) -> None:
    index, found = GraphIndex(gm), [op for op in ops_of(gm) if isinstance(op, Linear) and op.bias is not None]
    assert len(found) > 6
    for op in found:
        set_bias(index, [op], "", torch.ones(channels_of(op)), "test")


def round_to_stored(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="get_attr"):
        node.meta["graphq.by"] = ("test",)
    gm.meta[KEY] = dataclasses.replace(source_of(gm), stored=torch.bfloat16)
    assert RoundToStored().run(gm) > 6


class Same(Pass):
    """Notes itself in the part, so that it is merged, and costs nothing itself."""

    name = "same"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        next(iter(gm.graph.nodes)).meta["graphq.by"] = (self.name,)
        return 1


WORK: dict[str, Callable[[fx.GraphModule], Any]] = {
    "groups": fold,
    "other biases": add_other_biases,
    "round-to-stored": round_to_stored,
    "groups that multiply": lambda gm: list(groups(gm, None, "multiply", None)),
    "what smooth-quant observes": lambda gm: list(SmoothQuant(alpha="search").observer_requests(gm)),
    "what awq observes": lambda gm: list(AWQ(power=4).observer_requests(gm)),
    "equalize": Equalize(rounds=1).run,
    "untie": Untie().run,
    "split-gate-up": SplitGateUp().run,
    "fold-norms": FoldNorms().run,
    "remove-no-ops": RemoveNoOps().run,
    "rotate": Rotate(kind="hadamard").run,
    "rotate-online": RotateOnline(r3=True, r4=True).run,
    "annotate": Annotate(PLANS).run,
    "raise-recurrent": RaiseRecurrent().run,
    "fix-sizes": FixSizes({"batch": 1, "sequence": 4, "past_sequence": 0}).run,
    "fold-weights": FoldWeights().run,
    "raise-linear": RaiseLinear().run,
    "raise-rms-norm": RaiseRmsNorm().run,
    "fold-pads": FoldPads().run,
    "observe": Observe().run,
    "decompose": Decompose(GENERIC_INT8).run,
    "place-quantizers": PlaceQuantizers(GENERIC_INT8).run,
    "quantize-biases": QuantizeBiases(GENERIC_INT8).run,
    "observe-means": ObserveMeans().run,
    "blockwise": Blockwise((Same(),)).run,
    "pipeline": Pipeline([Untie()]).run,
    "quantize-weights": QuantizeWeights().run,
    "what torch modules are packed by": lambda gm: (merge_equal(gm), fuse_attention(gm), fuse_rotary(gm)),
    "a program": lambda gm: Program(gm),
    "place": lambda gm: place(gm, GENERIC_INT8),
    "place, dropping ops one after the other": lambda gm: place(gm, ORT_CPU),
}


# They run the graph, or work on one layer after the other, and every whole compile does.
NOT_COUNTED = {
    *("auto-round", "calibrate", "correct-bias", "fold-batch-norm", "gptq", "quantize-activations"),
    *("raise-grouped-linear", "stop-observing", "fall-back", "unroll-recurrent"),
    *("cache-codes", "quantize-attention", "quantize-cache"),  # one attention after the other
    *("hold-weights", "repeat-biases", "repeat-factors"),  # as the passes do that they stand for
    "carry-input-scales",  # one activation after the other
}


def test_every_pass_is_counted_or_listed() -> None:
    found: set[str] = set()
    for file in Path(passes.__file__).parent.glob("[!_]*.py"):
        module = importlib.import_module(f"graphq.passes.{file.stem}")
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Pass)]
        found |= {kind.name for kind in kinds if kind.__module__ == module.__name__ and kind is not Pass}
    assert {name for name in found if not any(name in work.split() for work in WORK)} == NOT_COUNTED


@pytest.mark.parametrize("name", WORK)
def test_further_blocks_cost_what_those_before_did(name: str, graphs: tuple[fx.GraphModule, ...]) -> None:
    counts: list[int] = []
    first = copy.deepcopy(graphs[0])
    Annotate(PLANS).run(first)
    WORK[name](first)  # fills the caches of what does not depend on the graph
    for whole in graphs:
        gm = copy.deepcopy(whole)
        Annotate(PLANS).run(gm)
        counts.append(steps(lambda gm=gm: WORK[name](gm)))
    # All but a few are linear to the last step, and caches of sizes that earlier tests fill move those by a fiftieth; one
    # step for each pair of blocks beside 200 for each block is found.
    assert counts[2] - counts[1] <= 1.03 * (counts[1] - counts[0]), f"{name}: {counts}"
