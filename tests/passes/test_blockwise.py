"""Blocks one after the other: the same numbers as the whole at once, and what each block sees."""

import pytest
import torch
from torch import Tensor, fx, nn

from graphq.capture.source import SHARED, source_of
from graphq.data.masks import MaskedBatch
from graphq.errors import SpecError
from graphq.ir.index import GraphIndex
from graphq.ir.parts import Parts, cut
from graphq.ir.pipeline import Batches, Pass, Pipeline, fingerprint
from graphq.ir.text import dump
from graphq.passes.blockwise import Blockwise
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe, observers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights, planned_weights
from graphq.passes.stop_observing import StopObserving
from graphq.pipelines import canonical_passes
from graphq.state import tensor_of
from tests.graphs import annotated, plan, run
from tests.models import FAMILIES, MLP, Blocks, capture, captured, random_inputs

STATIC = plan("int8/channel", "int8/tensor")
INNER: tuple[Pass, ...] = (Observe(), Calibrate(), QuantizeWeights(), QuantizeActivations())


def data(count: int = 2) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(5, 8, generator=generator),) for _ in range(count)]


def shared_of(gm: fx.GraphModule) -> list[frozenset[str]]:
    parts = Parts(gm)
    return [parts.extract(index).gm.meta[SHARED] for index in range(len(parts.stages))]


# -- cutting


def test_cuts() -> None:
    gm = capture(Blocks(), torch.ones(2, 8))
    assert [[n.name for n in stage] for stage in cut(gm)] == [
        ["linear", "relu", "linear_1", "add"],  # what stands between two blocks goes with the first
        ["linear_2", "relu_1", "linear_3"],
        ["add_1", "linear_4"],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_are_not_changed_make_the_same_graph(family: str) -> None:
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    before = dump(gm)
    stages = cut(gm)
    blocks = len(stages)
    assert blocks >= 4
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert [n for stage in stages for n in stage] == nodes
    inputs = random_inputs(gm)
    wanted = run(gm, *inputs)
    state = gm.state_dict()
    parts = Parts(gm)
    for index in range(blocks):
        parts.merge(index, parts.extract(index))
    assert dump(gm) == before
    assert gm.state_dict().keys() == state.keys()
    assert torch.equal(run(gm, *inputs), wanted)


def test_parts_that_take_numbers_have_a_text() -> None:
    gm = captured("gemma3")
    Pipeline(canonical_passes()).run(gm)
    parts = Parts(gm)
    texts = [dump(parts.extract(index).gm) for index in range(len(parts.stages))]
    assert any(": int = input" in text for text in texts)


def test_parts_know_the_caches_that_they_read_and_give() -> None:
    gm = captured("llama")
    Pipeline(canonical_passes()).run(gm)
    parts = Parts(gm)
    indices = [GraphIndex(parts.extract(index).gm) for index in range(len(parts.stages))]
    assert [sorted(index.input_names[past] for past in index.pasts) for index in indices] == [
        [],
        ["past_key_values.0.key", "past_key_values.0.value"],
        ["past_key_values.1.key", "past_key_values.1.value"],
        [],
    ]


# -- the same as at once


@pytest.mark.parametrize("family", FAMILIES)
def test_on_float_inputs_it_is_what_the_whole_at_once_is(family: str) -> None:
    whole, parts = (captured(family) for _ in range(2))
    for gm in (whole, parts):
        Pipeline(canonical_passes()).run(gm)
        annotated(gm, blocks=STATIC)
    batches = [random_inputs(whole, seed=seed) for seed in (1, 2)]
    count = sum(Pipeline(INNER).run(whole, batches).values())
    assert Pipeline([Blockwise(INNER, "float")], strict=True).run(parts, batches) == {"blockwise": count}
    assert observers(parts) == []
    a, b = whole.state_dict(), parts.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key].float(), b[key].float()), key
    inputs = random_inputs(whole, seed=3)
    assert torch.equal(run(parts, *inputs), run(whole, *inputs))
    assert sorted(line.partition(" = ")[2].partition("(")[0] for line in dump(parts).splitlines()) == sorted(
        line.partition(" = ")[2].partition("(")[0] for line in dump(whole).splitlines()
    )


def test_on_quantized_inputs_a_block_sees_what_the_changed_ones_give() -> None:
    batches = data()
    whole, parts = (annotated(capture(Blocks(), torch.ones(2, 8)), blocks=STATIC) for _ in range(2))
    Pipeline([Blockwise(INNER)], strict=True).run(parts, batches)
    first = annotated(capture(Blocks(), torch.ones(2, 8)), blocks__0=STATIC)
    Pipeline(INNER).run(first, batches)
    added = next(n for n in first.graph.nodes if n.name == "add")
    output = next(n for n in first.graph.nodes if n.op == "output")
    output.args = ((added,),)
    wanted = max(float(run(first, *batch).abs().max()) for batch in batches) / 127
    assert float(tensor_of(parts, "blocks.1.up.input_scale")) == pytest.approx(wanted, rel=1e-6)
    Pipeline(INNER).run(whole, batches)
    assert float(tensor_of(whole, "blocks.1.up.input_scale")) != pytest.approx(wanted, rel=1e-6)
    assert torch.equal(tensor_of(whole, "blocks.0.up.input_scale"), tensor_of(parts, "blocks.0.up.input_scale"))


# -- what belongs to several parts


class SharedBlocks(nn.Module):
    """Two blocks with one up projection between them; the head's weight is the first one's down, in another name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MLP(8, 8), MLP(8, 8)])
        self.blocks[1].up = self.blocks[0].up  # pyright: ignore[reportArgumentType]
        self.head = nn.Linear(8, 8)
        self.head.weight = self.blocks[0].down.weight  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_parameters_of_several_parts_are_left_to_the_whole() -> None:
    gm = annotated(capture(SharedBlocks(), torch.ones(2, 8)), blocks="int8/channel", head="int8/channel")
    names = set(gm.state_dict())
    shared = {
        name
        for name in names
        if name.endswith(("up.weight", "up.bias")) or name in ("blocks.0.down.weight", "head.weight")
    }
    assert set(shared_of(gm)[0]) == shared
    assert Pipeline([Blockwise((QuantizeWeights(),))], strict=True).run(gm) == {"blockwise": 1}
    assert tensor_of(gm, "blocks.1.down.weight").dtype == torch.int8
    assert {layer.site.param.fqn for layer in planned_weights(gm)} == {n for n in shared if n.endswith("weight")}
    assert QuantizeWeights().run(gm) == len([n for n in shared if n.endswith("weight")])
    run(gm, *data()[0])


# -- graphs without parts


class Woven(nn.Module):
    """Blocks that run twice, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MLP(), MLP()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for block in self.blocks:
                x = x + block(x)
        return x


@pytest.mark.parametrize("model", [Woven, MLP])
def test_one_part(model: type[nn.Module]) -> None:
    whole, parts = (annotated(capture(model(), torch.ones(2, 8)), blocks=STATIC) for _ in range(2))
    assert len(cut(parts)) == 1
    Pipeline([Blockwise(INNER)], strict=True).run(parts, data())
    Pipeline(INNER).run(whole, data())
    assert fingerprint(parts) == fingerprint(whole)


def test_without_batches() -> None:
    whole, parts = (annotated(capture(Blocks(), torch.ones(2, 8)), blocks="int4/channel") for _ in range(2))
    assert Pipeline([Blockwise((QuantizeWeights(),))], strict=True).run(parts) == {"blockwise": 4}
    QuantizeWeights().run(whole)
    assert dump(parts) == dump(whole)
    gm = annotated(capture(Blocks(), torch.ones(2, 8)), blocks=STATIC)
    with pytest.raises(SpecError, match="no batches"):
        Blockwise(INNER).run(gm)
    with pytest.raises(SpecError, match="no batches"):
        Blockwise(INNER).run(gm, [])


def test_nothing_planned() -> None:
    gm = annotated(capture(Blocks(), torch.ones(2, 8)), blocks="float")
    assert Pipeline([Blockwise(INNER)], strict=True).run(gm, data()) == {"blockwise": 0}


# -- what runs


class Counted(Pass):
    """Notes the batches that it is given."""

    name = "counted"

    def __init__(self) -> None:
        self.seen: list[list[tuple[Tensor, ...]]] = []

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        self.seen.append(list(batches or ()))
        return 0


@pytest.mark.parametrize("prefix", ["float", "quantized"])
def test_what_stands_behind_the_last_planned_layer_is_not_run(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphq.passes import blockwise

    ran: list[str] = []
    plain = blockwise.run_batch

    def update(gm: fx.GraphModule, batch: MaskedBatch, number: int, by: str) -> MaskedBatch:
        ran.extend(n.name for n in gm.graph.nodes if n.op == "call_function")
        return plain(gm, batch, number, by)

    monkeypatch.setattr(blockwise, "run_batch", update)
    counted = Counted()
    gm = annotated(capture(Blocks(), torch.ones(2, 8)), blocks__0="int8/channel")
    before = dump(gm)
    assert Blockwise((counted,), prefix).run(gm, data()) == 0  # pyright: ignore[reportArgumentType]
    assert [len(seen) for seen in counted.seen] == [2]
    assert ran == []
    assert dump(gm) == before
    gm = annotated(capture(Blocks(), torch.ones(2, 8)), blocks__1="int8/channel")
    assert Blockwise((counted,), prefix).run(gm, data(3)) == 0  # pyright: ignore[reportArgumentType]
    assert [len(seen) for seen in counted.seen] == [2, 3]
    assert ran == ["linear", "relu", "linear_1", "add"] * 3
    assert source_of(gm).blocks == ("blocks",)


def test_observers_that_came_and_went_are_no_change() -> None:
    gm = annotated(capture(Blocks(), torch.ones(2, 8)), blocks=STATIC)
    steps = (Observe(), Calibrate(), StopObserving())
    assert sum(Pipeline(steps).run(gm, data()).values()) > 0
    assert Pipeline([Blockwise(steps)], strict=True).run(gm, data()) == {"blockwise": 0}
