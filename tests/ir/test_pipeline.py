"""The pipeline: what it runs, and what it says of a pass that does not keep its word."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast, final

import pytest
import torch
from torch import Tensor, fx

from graphq.errors import GraphError, PassError, SpecError
from graphq.ir import edit
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.pipeline import Batches, Invariant, Pass, Pipeline, fingerprint
from graphq.ir.views import Linear, ops_of, view
from graphq.spec.plan import PerExpert
from graphq.state import tensor_of
from tests.graphs import annotated, plan, run, targets
from tests.models import MLP, MoE, capture

aten = torch.ops.aten
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def mlp() -> fx.GraphModule:
    return capture(MLP(), torch.ones(2, 8))


@final
@dataclass(frozen=True)
class SwapActivation(Pass):
    """What a user's own pass looks like: every ReLU is a SiLU."""

    name: ClassVar[str] = "swap-activation"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            if op.node.target is aten.relu.default:
                edit.replace(gm, op, aten.silu.default, view(op.node.all_input_nodes[0]), by=self.name)
                count += 1
        return count


@final
@dataclass(frozen=True)
class Do(Pass):
    """Whatever ``change`` does, reported as ``count`` changes."""

    change: Callable[[fx.GraphModule], object]
    count: int = 1
    name: ClassVar[str] = "do"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        self.change(gm)
        return self.count


def nothing(gm: fx.GraphModule) -> None:
    pass


def double_weight(gm: fx.GraphModule) -> None:
    edit.set_param(gm, "up.weight", lambda w: w * 2, by="do")


def _silus(gm: fx.GraphModule) -> str | None:
    return None if "aten.silu" in targets(gm) else "it has none"


has_silu = Invariant("a silu", _silus)


@final
@dataclass(frozen=True)
class Needs(Pass):
    name: ClassVar[str] = "needs"
    requires: ClassVar[tuple[Invariant, ...]] = (has_silu,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        return 0


@final
@dataclass(frozen=True)
class Promises(Pass):
    name: ClassVar[str] = "promises"
    ensures: ClassVar[tuple[Invariant, ...]] = (has_silu,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        return 0


def test_passes_run_in_order_and_the_graph_can_be_called_after_each() -> None:
    gm = mlp()
    seen: list[tuple[str, Tensor]] = []

    def after(step: Pass, gm: fx.GraphModule) -> None:
        with torch.no_grad():
            seen.append((step.name, gm(X)[0]))

    before = run(gm, X)
    steps = [Do(nothing, 0), SwapActivation(), SwapActivation(), Do(double_weight, 1)]
    counts = Pipeline(steps, strict=True, after=after).run(gm)
    assert counts == {"do": 1, "swap-activation": 1}  # of each name
    assert [name for name, _ in seen] == ["do", "swap-activation", "swap-activation", "do"]
    assert torch.equal(seen[0][1], before)
    assert not torch.equal(seen[1][1], before)
    assert torch.equal(seen[1][1], seen[2][1])
    assert not torch.equal(seen[2][1], seen[3][1])


def test_passes_are_given_the_batches() -> None:
    @final
    @dataclass(frozen=True)
    class Takes(Pass):
        name: ClassVar[str] = "takes"

        def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
            assert [x.item() for (x,) in cast(Batches, batches)] == [1, 2]
            return 0

    Pipeline([Takes(), Takes()]).run(mlp(), [(torch.tensor(1),), (torch.tensor(2),)])


def test_counts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "graphq"):
        Pipeline([SwapActivation(), SwapActivation()]).run(mlp())
    assert [record.getMessage() for record in caplog.records] == ["swap-activation: 1", "swap-activation: 0"]


def test_requires_is_checked_before_the_pass_runs() -> None:
    with pytest.raises(PassError) as error:
        Pipeline([Needs()]).run(mlp())
    assert str(error.value) == "needs needs a silu: it has none"
    assert Pipeline([SwapActivation(), Needs()]).run(mlp()) == {"swap-activation": 1, "needs": 0}


def test_ensures_is_checked_after_the_pass_ran() -> None:
    with pytest.raises(PassError) as error:
        Pipeline([Promises()]).run(mlp())
    assert str(error.value) == "promises promises a silu: it has none"
    assert Pipeline([SwapActivation(), Promises()]).run(mlp()) == {"swap-activation": 1, "promises": 0}


def shift_buffer(gm: fx.GraphModule) -> None:
    tensor_of(gm, "up.bias").data[0] += 1


def drop_read(gm: fx.GraphModule) -> None:
    out = next(n for n in gm.graph.nodes if n.op == "output")
    out.replace_input_with(out.all_input_nodes[0], next(n for n in gm.graph.nodes if n.op == "placeholder"))


@pytest.mark.parametrize("change", [double_weight, shift_buffer, drop_read, SwapActivation().run])
def test_strict_finds_a_change_that_was_not_reported(change: Callable[[fx.GraphModule], object]) -> None:
    with pytest.raises(PassError) as error:
        Pipeline([Do(change, 0)], strict=True).run(mlp())
    assert str(error.value) == "do reports 0 changes, but the graph is another"
    assert Pipeline([Do(change, 0)]).run(mlp()) == {"do": 0}  # not strict: nobody looks
    assert Pipeline([Do(change, 1)], strict=True).run(mlp()) == {"do": 1}


def test_strict_finds_a_report_of_nothing() -> None:
    with pytest.raises(PassError) as error:
        Pipeline([Do(nothing, 3)], strict=True).run(mlp())
    assert str(error.value) == "do reports 3 changes, but the graph is the same"


def test_strict_sees_which_expert_has_which_plan() -> None:
    """Decisions are summed up in the text of a graph, but not in its fingerprint."""
    a, b = plan("int8/channel"), plan("int4/channel")
    gm = annotated(capture(MoE(), torch.ones(5, 8)), router=a)
    stack = next(op for op in ops_of(gm) if op.node.target is torch.ops.graphq.grouped_linear.default)

    def decide(*decisions: object) -> Callable[[fx.GraphModule], None]:
        def change(gm: fx.GraphModule) -> None:
            stack.node.meta[PLAN] = PerExpert(cast(tuple, decisions))

        return change

    steps = [Do(decide(a, b, a, a)), Do(decide(a, a, b, a)), Do(decide(a, a, b, a), 0)]
    assert Pipeline(steps, strict=True).run(gm) == {"do": 2}


def test_fingerprints() -> None:
    gm, twin, other = mlp(), mlp(), mlp()
    assert fingerprint(gm) == fingerprint(twin)
    double_weight(other)
    assert fingerprint(other) != fingerprint(gm)
    half = capture(MLP().bfloat16(), torch.ones(2, 8, dtype=torch.bfloat16))
    assert fingerprint(half) == fingerprint(half)


# -- what no pass may do -----------------------------------------------------------------------------------------------


def swap_order(gm: fx.GraphModule) -> None:
    relu = next(n for n in gm.graph.nodes if n.target is aten.relu.default)
    relu.append(relu.all_input_nodes[0])


def lose_tensor(gm: fx.GraphModule) -> None:
    del gm.get_submodule("up").weight


def compute_first(gm: fx.GraphModule) -> None:
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_before(x):
        gm.graph.call_function(aten.scalar_tensor.default, (1,))


def forget_val(gm: fx.GraphModule) -> None:
    del next(n for n in gm.graph.nodes if n.target is aten.relu.default).meta["val"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_order, "Argument 'linear' of Node 'relu' was used before it has been defined!"),
        (lose_tensor, "Node up_weight target up.weight references nonexistent attribute weight of up"),
        (compute_first, "input x stands behind nodes that compute"),
        (forget_val, "relu does not know its val"),
    ],
)
def test_a_broken_graph_is_the_fault_of_the_pass_that_left_it(
    change: Callable[[fx.GraphModule], object], reason: str
) -> None:
    with pytest.raises(PassError) as error:
        Pipeline([Do(change)]).run(mlp())
    assert str(error.value).startswith(f"do promises a well-formed graph: {reason}")
    assert "\n" not in str(error.value)


def test_a_pass_may_find_the_layers_by_views() -> None:
    gm = mlp()
    Pipeline([SwapActivation()], strict=True).run(gm)
    linears = [op for op in ops_of(gm) if isinstance(op, Linear)]
    assert [op.weight_op.node.target for op in linears] == ["up.weight", "down.weight"]
    assert targets(gm) == ["aten.linear", "aten.silu", "aten.linear"]


# -- passes that fail


class Fails(Pass):
    """Fails at the second linear."""

    name = "fails"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        for op in [op for op in ops_of(gm) if isinstance(op, Linear)]:
            if str(op.node.meta[LAYER]) == "down":
                raise self.error
        return 0


@pytest.mark.parametrize("error", [RuntimeError("a shape\nof two lines"), AssertionError("believed"), KeyError("k")])
def test_what_a_pass_raises_names_the_pass_and_the_layer(error: Exception) -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up="int8/channel", down="int8/channel")
    with pytest.raises(PassError) as caught:
        Pipeline([Fails(error)]).run(gm)
    first = str(error).splitlines()[0]
    assert str(caught.value) == f"fails: down: {type(error).__name__}: {first}"
    assert caught.value.__cause__ is error


def test_errors_that_passes_raise_on_purpose_stay_what_they_are() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up="int8/channel", down="int8/channel")
    for error in (SpecError("the user's"), GraphError("the model's"), PassError("ours"), MemoryError()):
        with pytest.raises(type(error)) as caught:
            Pipeline([Fails(error)]).run(gm)
        assert caught.value is error
