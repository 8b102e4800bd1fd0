"""Every use of a layer knows its decision, and plans that a layer cannot have are refused."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.errors import PassError, SpecError
from graphq.frontends import load_spec
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import ops_of
from graphq.passes.annotate import Annotate, annotated, decide
from graphq.spec.match import Exact
from graphq.spec.plan import KeepFloat, PerExpert, Plan
from graphq.spec.rules import Rule, Spec
from tests.graphs import plan, spec, targets
from tests.models import MLP, Blocks, ConvBnRelu, MoE, Tied, Twice, capture

W8 = plan("int8/channel")
W4 = plan("int4/g4")


def annotate(gm: fx.GraphModule, wanted: Spec) -> int:
    """The number of changes; a second run finds nothing."""
    counts = Pipeline([Annotate(wanted)], strict=True).run(gm)
    assert Pipeline([Annotate(wanted)], strict=True).run(gm) == {"annotate": 0}
    return counts["annotate"]


def decisions(gm: fx.GraphModule) -> list[tuple[str, object]]:
    return [(op.node.meta[LAYER], op.node.meta[PLAN]) for op in ops_of(gm) if PLAN in op.node.meta]


def test_golden() -> None:
    gm = capture(Blocks(), torch.ones(2, 8))
    assert annotate(gm, spec(blocks=plan("int4/g4", "int8/token/dynamic"), up="int8/channel")) == 5
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 8] = input
%1: f32[batch, 12] = aten.linear(%x, @blocks.0.up.weight, @blocks.0.up.bias)  # blocks.0.up: weight int8/channel
%2: f32[batch, 12] = aten.relu(%1)
%3: f32[batch, 8] = aten.linear(%2, @blocks.0.down.weight, @blocks.0.down.bias)  # blocks.0.down: weight int4/g4, input int8/token/dynamic
%4: f32[batch, 8] = aten.add.Tensor(%x, %3)
%5: f32[batch, 12] = aten.linear(%4, @blocks.1.up.weight, @blocks.1.up.bias)  # blocks.1.up: weight int8/channel
%6: f32[batch, 12] = aten.relu(%5)
%7: f32[batch, 8] = aten.linear(%6, @blocks.1.down.weight, @blocks.1.down.bias)  # blocks.1.down: weight int4/g4, input int8/token/dynamic
%8: f32[batch, 8] = aten.add.Tensor(%4, %7)
%9: f32[batch, 4] = aten.linear(%8, @head.weight, @head.bias)  # head: float (outside of the repeated blocks: quantized only when a rule names it)
return [%9]
""",
    )


def test_another_spec_changes_the_layers_that_differ() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    assert annotate(gm, spec(blocks=W8)) == 2
    assert annotate(gm, spec(blocks=W8, down=W4)) == 1
    assert decisions(gm) == [("up", W8), ("down", W4)]


def test_nothing_but_layers_is_annotated() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    annotate(gm, spec(blocks=W8))
    assert [PLAN in n.meta for n in gm.graph.nodes if n.op == "call_function"] == [True, False, True]
    assert targets(gm) == ["aten.linear", "aten.relu", "aten.linear"]


def test_each_use_of_a_layer_is_annotated() -> None:
    gm = capture(Twice(), torch.ones(2, 8))
    assert annotate(gm, spec(shared=W8)) == 2
    assert decisions(gm) == [("shared", W8), ("shared", W8)]


def test_a_stack_has_a_decision_for_each_expert() -> None:
    gm = capture(MoE(), torch.ones(5, 8))
    wanted = spec(blocks=W8, experts__1=W4, experts__3__down_proj="float")
    assert annotate(gm, wanted) == 3
    kept = KeepFloat("asked for")
    assert decisions(gm) == [
        ("router", KeepFloat("router: quantized only when a rule names it")),
        ("experts.gate_up_proj", PerExpert((W8, W4, W8, W8))),
        ("experts.down_proj", PerExpert((W8, W4, W8, kept))),
    ]
    assert annotate(gm, spec(blocks=W8, experts__2=W4, experts__3__down_proj="float")) == 2


def test_an_unannotated_layer_breaks_the_invariant() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    assert annotated.broken(gm) == "up has no decision"
    annotate(gm, spec(up=W8))
    assert annotated.broken(gm) is None
    del next(op for op in ops_of(gm) if op.node.meta.get(LAYER) == "down").node.meta[PLAN]
    assert annotated.broken(gm) == "down has no decision"


def test_decide_gives_the_reports_lines() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    resolved, _ = decide(gm, spec(up=W8))
    assert {fqn: str(r.decision) for fqn, r in resolved.items()} == {
        "up": "weight int8/channel",
        "down": "float (no rule matches it)",
    }


# -- plans that a layer cannot have ------------------------------------------------------------------------------------


def refused(gm: fx.GraphModule, name: str, decision: Plan) -> str:
    rule = Rule(Exact(name), decision, source="rules.7")
    with pytest.raises(SpecError) as error:
        Annotate(Spec((rule,))).run(gm)
    assert all(PLAN not in node.meta for node in gm.graph.nodes)
    return str(error.value)


def test_an_embeddings_input() -> None:
    gm = capture(Tied(), torch.ones(2, 3, dtype=torch.int64))
    assert refused(gm, "embedding", plan("int8/channel", "int8/tensor")) == (
        "rules.7: embedding: input int8/tensor: an embedding reads token ids, which are not quantized;"
        " leave out its input"
    )
    assert annotate(gm, spec(embedding=W4)) == 2


def test_a_convolutions_token_vectors() -> None:
    gm = capture(ConvBnRelu(), torch.ones(2, 4, 5, 5))
    assert refused(gm, "conv", plan("int8/channel", "int8/token/dynamic")) == (
        "rules.7: conv: input int8/token/dynamic: a convolution's input has no token vectors; use one scale per tensor"
    )
    assert annotate(gm, spec(conv=plan("int8/channel", "int8/tensor"))) == 2


class ShortConvolution(nn.Module):
    """A block of a recurrent model: a depthwise convolution along tokens between two linears."""

    def __init__(self, groups: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, groups=groups, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.conv(self.up(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


@pytest.mark.parametrize(
    ("preset", "line"),
    [
        ("w8a8", "conv: input int8/token/dynamic: a convolution's input has no token vectors; it stays float"),
        ("w4a16", "conv: weight int4/g128: a depthwise convolution has one input per channel; it stays float"),
    ],
)
def test_short_convolutions_beside_linears_stay_float_where_no_rule_names_them(preset: str, line: str) -> None:
    gm = capture(ShortConvolution(), torch.ones(2, 5, 8))
    resolved, notes = decide(gm, load_spec(preset))
    assert notes == (line,)
    assert [isinstance(one.decision, Plan) for one in resolved.values()] == [True, False, True]
    assert resolved["conv"].decision == KeepFloat(line.removeprefix("conv: ").removesuffix("; it stays float"))


@pytest.mark.parametrize("model", [ShortConvolution(groups=1), nn.Sequential(nn.Conv1d(8, 8, 3, groups=8))])
def test_other_convolutions_do_not(model: nn.Module) -> None:
    """One that is not depthwise, and one without linears beside it."""
    gm = capture(model, torch.ones(2, 5, 8) if isinstance(model, ShortConvolution) else torch.ones(2, 8, 5))
    with pytest.raises(SpecError, match="has no token vectors; use one scale per tensor"):
        decide(gm, load_spec("w8a8"))


def test_groups_of_a_depthwise_convolution() -> None:
    gm = capture(ConvBnRelu(), torch.ones(2, 4, 5, 5))
    assert refused(gm, "depthwise", plan("int8/g2")) == (
        "rules.7: depthwise: weight int8/g2: a depthwise convolution has one input per channel; use channel"
    )
    assert annotate(gm, spec(conv="int8/g2", depthwise=W8)) == 2


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("wide", "narrow"), [(4, 0), (0, 8)])
def test_a_weight_without_elements(wide: int, narrow: int) -> None:
    model = nn.Sequential(nn.Linear(8, narrow), nn.Linear(narrow, wide), nn.Linear(wide, 8))
    gm = capture(model, torch.ones(3, 8))
    with pytest.raises(SpecError) as caught:
        decide(gm, spec(**{"1": "int8/channel"}))
    assert str(caught.value) == (
        f"1: weight int8/channel: a weight of shape [{wide}, {narrow}] has no elements to quantize; keep it float"
    )


def test_all_problems_at_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    gm = capture(Both(), torch.ones(2, 2, 4))
    with pytest.raises(SpecError) as error:
        Annotate(spec(blocks=plan(None, "int8/token/dynamic"))).run(gm)
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["a", "b"]


def test_a_name_that_matches_nothing() -> None:
    with pytest.raises(SpecError, match="did you mean down"):
        Annotate(spec(dwon=W8)).run(capture(MLP(), torch.ones(2, 8)))


def test_passes_behind_it_need_it() -> None:
    from graphq.passes.quantize_weights import QuantizeWeights

    with pytest.raises(PassError) as error:
        Pipeline([QuantizeWeights()]).run(capture(MLP(), torch.ones(2, 8)))
    assert str(error.value) == "quantize-weights needs a decision for every layer: up has no decision"
