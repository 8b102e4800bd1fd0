"""Calibration: observers have seen the data, all of it, or somebody is told."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.errors import PassError, SpecError
from graphq.ir.pipeline import Pipeline
from graphq.observers.ranges import MinMaxObserver, RangeObserver
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe, observers
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.runtime import ops
from graphq.state import tensor_of
from tests.graphs import annotated, plan
from tests.models import MLP, capture, captured, random_inputs

STATIC = plan("int8/channel", "int8/tensor")


def observed() -> fx.GraphModule:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks=STATIC)
    Observe().run(gm)
    return gm


def batches(*seeds: int) -> list[tuple[Tensor]]:
    return [(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)),) for seed in seeds]


def extremes(gm: fx.GraphModule) -> list[tuple[float, float]]:
    return [(seen.low.item(), seen.high.item()) for _, seen in observers(gm) if isinstance(seen, RangeObserver)]


def test_every_observer_sees_every_batch() -> None:
    gm = observed()
    data = batches(1, 2, 3)
    assert Pipeline([Calibrate()], strict=True).run(gm, data) == {"calibrate": 2}
    x = torch.cat([x for (x,) in data])
    w, b = tensor_of(gm, "up.weight").detach(), tensor_of(gm, "up.bias").detach()
    h = torch.stack([F.relu(F.linear(x, w, b)) for (x,) in data])
    assert extremes(gm) == [(x.min().item(), x.max().item()), (h.min().item(), h.max().item())]
    assert [int(seen.batches) for _, seen in observers(gm)] == [3, 3]


def test_it_can_go_on() -> None:
    first, second = observed(), observed()
    Calibrate().run(first, batches(1, 2))
    Calibrate().run(second, batches(1))
    Calibrate().run(second, batches(2))
    assert extremes(first) == extremes(second)


def test_a_generator_of_batches_and_a_graph_that_was_not_recompiled() -> None:
    gm = observed()
    assert Calibrate().run(gm, (batch for batch in batches(1))) == 2
    assert all(seen.has_observed for _, seen in observers(gm))


def test_copies_keep_what_was_seen() -> None:
    gm = observed()
    Calibrate().run(gm, batches(1))
    twin = copy.deepcopy(gm)
    assert extremes(twin) == extremes(gm)
    Calibrate().run(twin, [(torch.full((3, 8), 99.0),)])
    assert extremes(twin) != extremes(gm)


def test_without_observers_nothing_is_run() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks="int8/channel")

    def refuse() -> object:
        raise AssertionError("the batches were read")
        yield

    assert Pipeline([Calibrate()], strict=True).run(gm, refuse()) == {"calibrate": 0}  # pyright: ignore[reportArgumentType]
    assert Calibrate().run(gm) == 0


@pytest.mark.parametrize("given", [None, [], iter([])])
def test_no_batches(given: object) -> None:
    with pytest.raises(SpecError) as error:
        Calibrate().run(observed(), given)  # pyright: ignore[reportArgumentType]
    assert str(error.value) == "calibration: no batches; static scales need at least one"


def test_nan_in_a_batch_names_the_layer_and_the_batch() -> None:
    data = batches(1, 2, 3)
    data[2][0][1, 1] = torch.nan
    with pytest.raises(SpecError) as error:
        Calibrate().run(observed(), data)
    assert str(error.value) == "calibration: batch 2: the input of up holds NaN or Inf"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.later = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.early(x), self.late(y) + self.later(y)


def test_layers_that_no_data_reached() -> None:
    gm = annotated(capture(Two(), torch.ones(2, 8), torch.ones(2, 3, 8)), blocks=STATIC)
    Observe().run(gm)
    with pytest.raises(SpecError) as error:
        Calibrate().run(gm, [(torch.ones(2, 8), torch.ones(2, 0, 8))])
    assert error.value.problems == (
        "calibration: no data reached late; calibrate with data that uses it",
        "calibration: no data reached later; calibrate with data that uses it",
    )
    Calibrate().run(gm, [(torch.ones(2, 8), torch.ones(2, 1, 8))])


def test_llama() -> None:
    gm = annotated(captured("llama"), blocks=STATIC)
    Observe().run(gm)
    assert Pipeline([Calibrate()], strict=True).run(gm, [random_inputs(gm, seed=s) for s in (0, 1)]) == {"calibrate": 8}
    assert len(observers(gm)) == 8  # two blocks: the inputs of q/k/v, of o, of gate/up and of down


# -- whose fault it is


class Looked(nn.Module):
    """A linear on rows of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embedding(ids))


def looked() -> fx.GraphModule:
    gm = annotated(capture(Looked(), torch.ones(2, 3, dtype=torch.int64)), linear=STATIC)
    Observe().run(gm)
    return gm


IDS = torch.arange(6).view(2, 3)


def test_a_batch_on_which_the_model_fails() -> None:
    gm = looked()
    with pytest.raises(SpecError) as error:
        Calibrate().run(gm, [(IDS,), (IDS + 16,)])
    assert str(error.value) == "calibration: batch 1: the model fails on it: index out of range in self"
    assert isinstance(error.value.__cause__, IndexError)
    (seen,) = (seen for _, seen in observers(gm))
    assert int(seen.batches) == 1  # the search for what failed showed it nothing


def test_an_observer_that_fails_is_no_fault_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: MinMaxObserver, x: Tensor, low: Tensor, high: Tensor) -> None:
        raise RuntimeError("of no shape")

    monkeypatch.setattr(MinMaxObserver, "see_within", broken)
    with pytest.raises(PassError) as error:
        Calibrate().run(looked(), [(IDS,)])
    assert str(error.value) == "calibrate: MinMaxObserver of the input of linear: RuntimeError: of no shape"
    assert isinstance(error.value.__cause__, RuntimeError)


def test_a_graph_that_passes_left_wrong_is_no_fault_of_the_batch() -> None:
    """The weight is not of the shape that its node promises."""
    gm = looked()
    tensor_of(gm, "linear.weight").data = torch.ones(8, 7)
    with pytest.raises(PassError) as error:
        Calibrate().run(gm, [(IDS,)])
    assert str(error.value).startswith("calibrate: batch 0: linear: aten.linear.default: RuntimeError: ")
    assert isinstance(error.value.__cause__, RuntimeError)


def test_an_op_of_ours_that_fails_is_no_fault_of_the_batch() -> None:
    gm = looked()
    QuantizeWeights().run(gm)
    (dequantize,) = (node for node in gm.graph.nodes if node.target is ops.dequantize)
    dequantize.args = (*dequantize.args[:5], [3, -1, 1], *dequantize.args[6:])
    with pytest.raises(PassError) as error:
        Calibrate().run(gm, [(IDS,)])
    assert str(error.value).startswith("calibrate: batch 0: linear: graphq.dequantize.default: ")
    assert error.value.__cause__ is not None


def test_memory_that_runs_out_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: MinMaxObserver, x: Tensor, low: Tensor, high: Tensor) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(MinMaxObserver, "see_within", full)
    with pytest.raises(torch.OutOfMemoryError):
        Calibrate().run(looked(), [(IDS,)])
