"""Factors of channels: where they can move, and that the function stays when they do."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.hugging_face import capture_pretrained
from graphq.capture.source import SHARED, source_of
from graphq.data.batches import complete
from graphq.ir.channels import Flow, Flows, move_factors, producers_behind, subgraph_of
from graphq.ir.effects import Stopped
from graphq.ir.index import GraphIndex
from graphq.ir.pipeline import Pipeline
from graphq.ir.views import Embedding, Op, Param, Weighted, ops_of, view
from graphq.pipelines import canonical_passes
from graphq.state import tensor_of
from tests.graphs import assert_vals
from tests.lifted import assert_same_function, lifted
from tests.models import FAMILIES, capture, random_inputs, tiny

aten = torch.ops.aten
FUNCTION = 1e-12  # of the largest output, in float64


def factors(count: int, seed: int = 0) -> Tensor:
    """Numbers from 1/4 to 4."""
    return 4 ** (2 * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)


def text_of(found: Flow | Stopped) -> str:
    """``readers <- produced``, with the number of labels that move where it is not all."""
    if isinstance(found, Stopped):
        return found.reason
    count = int(found.moved.sum())
    part = "" if count == found.count else f" {count}/{found.count}"
    readers, produced = ([p.fqn for p in parts] for parts in ([r.weight for r in found.readers], found.produced))
    return f"{' '.join(readers)} <- {' '.join(produced)}{part}"


# -- whole models

EXPECTED = {
    "llama": """
0.self_attn.q_proj 0.self_attn.k_proj 0.self_attn.v_proj <- 0.input_layernorm
0.self_attn.o_proj <- 0.self_attn.v_proj
0.mlp.gate_proj 0.mlp.up_proj <- 0.post_attention_layernorm
0.mlp.down_proj <- 0.mlp.up_proj
1.self_attn.q_proj 1.self_attn.k_proj 1.self_attn.v_proj <- 1.input_layernorm
1.self_attn.o_proj <- 1.self_attn.v_proj
1.mlp.gate_proj 1.mlp.up_proj <- 1.post_attention_layernorm
1.mlp.down_proj <- 1.mlp.up_proj
lm_head <- model.norm
""",
    "qwen3": """
0.self_attn.q_proj 0.self_attn.k_proj 0.self_attn.v_proj <- 0.input_layernorm
0.self_attn.o_proj <- 0.self_attn.v_proj
0.mlp.gate_proj 0.mlp.up_proj <- 0.post_attention_layernorm
0.mlp.down_proj <- 0.mlp.up_proj
1.self_attn.q_proj 1.self_attn.k_proj 1.self_attn.v_proj <- 1.input_layernorm
1.self_attn.o_proj <- 1.self_attn.v_proj
1.mlp.gate_proj 1.mlp.up_proj <- 1.post_attention_layernorm
1.mlp.down_proj <- 1.mlp.up_proj
lm_head <- model.norm
""",
    "gemma3": """
0.self_attn.q_proj 0.self_attn.k_proj 0.self_attn.v_proj <- 0.input_layernorm
0.self_attn.o_proj <- 0.self_attn.v_proj
0.mlp.gate_proj 0.mlp.up_proj <- 0.pre_feedforward_layernorm
0.mlp.down_proj <- 0.mlp.up_proj
1.self_attn.q_proj 1.self_attn.k_proj 1.self_attn.v_proj <- 1.input_layernorm
1.self_attn.o_proj <- 1.self_attn.v_proj
1.mlp.gate_proj 1.mlp.up_proj <- 1.pre_feedforward_layernorm
1.mlp.down_proj <- 1.mlp.up_proj
lm_head: the weight of linear_14 has other readers
""",
    "mixtral": """
0.self_attn.q_proj 0.self_attn.k_proj 0.self_attn.v_proj <- 0.input_layernorm
0.self_attn.o_proj <- 0.self_attn.v_proj
0.mlp.gate 0.mlp.experts.gate_proj 0.mlp.experts.up_proj <- 0.post_attention_layernorm
0.mlp.experts.down_proj <- 0.mlp.experts.up_proj
1.self_attn.q_proj 1.self_attn.k_proj 1.self_attn.v_proj <- 1.input_layernorm
1.self_attn.o_proj <- 1.self_attn.v_proj
1.mlp.gate 1.mlp.experts.gate_proj 1.mlp.experts.up_proj <- 1.post_attention_layernorm
1.mlp.experts.down_proj <- 1.mlp.experts.up_proj
lm_head <- model.norm
""",
    "deepseek": """
0.self_attn.q_a_proj 0.self_attn.kv_a_proj_with_mqa <- 0.input_layernorm
0.self_attn.q_b_proj <- 0.self_attn.q_a_layernorm
0.self_attn.kv_b_proj <- 0.self_attn.kv_a_layernorm
0.self_attn.o_proj <- 0.self_attn.kv_b_proj 64/128
0.mlp.gate_proj 0.mlp.up_proj <- 0.post_attention_layernorm
0.mlp.down_proj <- 0.mlp.up_proj
1.self_attn.q_a_proj 1.self_attn.kv_a_proj_with_mqa <- 1.input_layernorm
1.self_attn.q_b_proj <- 1.self_attn.q_a_layernorm
1.self_attn.kv_b_proj <- 1.self_attn.kv_a_layernorm
1.self_attn.o_proj <- 1.self_attn.kv_b_proj 64/128
1.mlp.gate 1.mlp.experts.gate_proj 1.mlp.experts.up_proj 1.mlp.shared_experts.gate_proj 1.mlp.shared_experts.up_proj <- 1.post_attention_layernorm
1.mlp.experts.down_proj <- 1.mlp.experts.up_proj
1.mlp.shared_experts.down_proj <- 1.mlp.shared_experts.up_proj
lm_head <- model.norm
""",
    "opt": """
0.self_attn.q_proj 0.self_attn.k_proj 0.self_attn.v_proj <- 0.self_attn_layer_norm 0.self_attn_layer_norm.bias
0.self_attn.out_proj <- 0.self_attn.v_proj 0.self_attn.v_proj.bias
0.fc1 <- 0.final_layer_norm 0.final_layer_norm.bias
0.fc2 <- 0.fc1 0.fc1.bias
1.self_attn.q_proj 1.self_attn.k_proj 1.self_attn.v_proj <- 1.self_attn_layer_norm 1.self_attn_layer_norm.bias
1.self_attn.out_proj <- 1.self_attn.v_proj 1.self_attn.v_proj.bias
1.fc1 <- 1.final_layer_norm 1.final_layer_norm.bias
1.fc2 <- 1.fc1 1.fc1.bias
lm_head: the weight of linear_12 has other readers
""",
    "gpt2": """
0.attn.c_attn <- 0.ln_1 0.ln_1.bias
0.attn.c_proj <- 0.attn.c_attn 0.attn.c_attn.bias 64/192
0.mlp.c_fc <- 0.ln_2 0.ln_2.bias
0.mlp.c_proj: aten.pow.Tensor_Scalar reads it
1.attn.c_attn <- 1.ln_1 1.ln_1.bias
1.attn.c_proj <- 1.attn.c_attn 1.attn.c_attn.bias 64/192
1.mlp.c_fc <- 1.ln_2 1.ln_2.bias
1.mlp.c_proj: aten.pow.Tensor_Scalar reads it
lm_head: the weight of linear has other readers
""",
    "bert": """
0.attention.self.query: a sum reads it beside what has no factors
0.attention.output.dense <- 0.attention.self.value 0.attention.self.value.bias
0.intermediate.dense: a sum reads it beside what has no factors
0.output.dense: no producer
1.attention.self.query: a sum reads it beside what has no factors
1.attention.output.dense <- 1.attention.self.value 1.attention.self.value.bias
1.intermediate.dense: a sum reads it beside what has no factors
1.output.dense: no producer
pooler.dense: it is an output of the model
""",
    "vit": """
vit.embeddings.patch_embeddings.projection: no producer
0.attention.q_proj 0.attention.k_proj 0.attention.v_proj <- 0.layernorm_before 0.layernorm_before.bias
0.attention.o_proj <- 0.attention.v_proj 0.attention.v_proj.bias
0.mlp.fc1 <- 0.layernorm_after 0.layernorm_after.bias
0.mlp.fc2: no producer
1.attention.q_proj 1.attention.k_proj 1.attention.v_proj <- 1.layernorm_before 1.layernorm_before.bias
1.attention.o_proj <- 1.attention.v_proj 1.attention.v_proj.bias
1.mlp.fc1 <- 1.layernorm_after 1.layernorm_after.bias
1.mlp.fc2: no producer
classifier <- vit.layernorm vit.layernorm.bias
""",
    "resnet": """
resnet.embedder.embedder.convolution: no producer
0.layers.0.layer.0.convolution: a sum reads it beside what has no factors
0.layers.0.layer.1.convolution <- 0.layers.0.layer.0.normalization 0.layers.0.layer.0.normalization.bias
1.layers.0.layer.0.convolution: a sum reads it beside what has no factors
1.layers.0.layer.1.convolution <- 1.layers.0.layer.0.normalization 1.layers.0.layer.0.normalization.bias
1.layers.1.layer.0.convolution: a sum reads it beside what has no factors
1.layers.1.layer.1.convolution <- 1.layers.1.layer.0.normalization 1.layers.1.layer.0.normalization.bias
classifier.1: a sum reads it beside what has no factors
""",
}


@functools.cache
def canonical(family: str) -> fx.GraphModule:
    """The graph of a family, not to be changed: in copies of it no tensors are tied."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases of 0 and gains of 1 show nothing
            parameter.data += torch.rand(parameter.shape, generator=generator) / 2
    gm = capture_pretrained(model)
    Pipeline(canonical_passes()).run(gm)
    return gm


def flows_of(gm: fx.GraphModule) -> tuple[list[Flow], list[str]]:
    """The first flow into each activation that weights read, and a line for each of these activations."""
    flows: list[Flow] = []
    lines: dict[Op, str] = {}
    short = "|".join(re.escape(f"{path}.") for path in source_of(gm).blocks)
    for op in ops_of(gm):
        if not isinstance(op, Weighted) or isinstance(op, Embedding) or op.input_op in lines:
            continue
        found = [Flows(gm).out_of(producer) for producer in producers_behind(op.input_op)]
        good = next((f for f in found if isinstance(f, Flow)), None)
        text = text_of(good) if good else f"{op.weight_op.node.target}: {text_of(found[0]) if found else 'no producer'}"
        lines[op.input_op] = re.sub(rf"\.weight|\b({short})", "", text)
        if good is not None and all(good.producer != f.producer for f in flows):
            flows.append(good)
    return flows, list(dict.fromkeys(lines.values()))


def double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def two_steps(gm: fx.GraphModule) -> list[Tensor]:
    """The first output (logits) of five tokens, and of two more with the model's own caches; other outputs behind."""
    source = source_of(gm)
    with torch.no_grad():
        first = gm(*double(random_inputs(gm, 2, 5)))
        if not source.is_causal_lm:
            return list(first)
        tokens = torch.tensor([[3, 5], [7, 11]])
        caches = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(source.outputs[1:], first[1:], strict=True)
        }
        given = {"input_ids": tokens, "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
        second = complete(source, given | caches)
        wide = [caches.get(wanted.name, x) for wanted, x in zip(source.inputs, second, strict=True)]
        return [first[0], gm(*wide)[0], *first[1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    gm = canonical(family)
    flows, lines = flows_of(gm)
    assert "\n".join(lines) == EXPECTED[family].strip()
    before, after = lifted(gm), lifted(gm)
    again, same = flows_of(after)
    assert same == lines
    for seed, flow in enumerate(again):
        assert move_factors(GraphIndex(after), flow, factors(flow.count, seed), "test") == len(flow.produced) + len(
            flow.readers
        )
    for flow in flows:
        for part in (*flow.produced, *(reader.weight for reader in flow.readers)):
            assert not torch.allclose(tensor_of(before, part.fqn), tensor_of(after, part.fqn)), part.fqn
    old, new = two_steps(before), two_steps(after)
    logits = 2 if source_of(gm).is_causal_lm else len(old)
    for a, b in zip(old[:logits], new[:logits], strict=True):
        assert (a - b).abs().max() <= FUNCTION * a.abs().max()
    names = source_of(gm).outputs[1:]
    moved = "key" if family == "deepseek" else "value"  # where the latents of keys and values are
    for name, a, b in zip(names, old[logits:], new[logits:], strict=False):
        error = (a - b).abs().max() / a.abs().max()
        assert error > 0.1 if name.endswith(moved) else error <= FUNCTION, name


# -- small graphs

X = torch.ones(2, 5, 8)
IMAGE = torch.ones(2, 4, 6, 6)


class Net(nn.Module):
    """``forward`` of the modules and parameters given."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def producer(gm: fx.GraphModule, name: str) -> Op:
    """The op whose channels come from the parameter ``name``."""
    node = next(iter(gm.graph.find_nodes(op="get_attr", target=name)[0].users))
    while node.target in (aten._to_copy.default, aten.add.Tensor):  # Gemma's (1 + weight)
        node = next(iter(node.users))
    return view(node)


def check(net: nn.Module, x: Tensor, name: str = "up.weight", shared: frozenset[str] = frozenset()) -> str:
    """The flow from ``name`` as a text; where there is one, the function stays when factors move."""
    gm = capture(net, x)
    gm.meta[SHARED] = shared
    found = Flows(gm).out_of(producer(gm, name))
    if isinstance(found, Stopped):
        return found.reason
    before, after = lifted(gm), lifted(gm)
    again = Flows(after).out_of(producer(after, name))
    assert text_of(again) == text_of(found)
    assert isinstance(again, Flow)
    move_factors(GraphIndex(after), again, factors(again.count), "test")
    for part in again.produced:
        assert not torch.equal(tensor_of(before, part.fqn), tensor_of(after, part.fqn))
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert_same_function(before, after, (x,), FUNCTION)
    assert_vals(after, x.double())
    return text_of(found)


def up(**more: Any) -> dict[str, Any]:
    return {"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)} | more


def norm(**more: Any) -> dict[str, Any]:
    return {"norm": nn.LayerNorm(8), "down": nn.Linear(8, 6)} | more


BOTH = "down.weight <- up.weight up.bias"
SUM = "a sum reads it beside what has no factors"
SHARED_READER = "the weight of linear_1 has other readers"


def extra(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def linears(f: Callable[..., Any], **more: Any) -> Net:
    return Net(f, **up(**more))


GAIN = "down.weight <- norm.weight norm.bias"


def with_norm(f: Callable[..., Any], **more: Any) -> Net:
    return Net(f, **norm(**more))


class Gemma(nn.Module):
    """A norm with 1 + weight, in float32 whatever the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


def gemma_twice(m: Any, x: Tensor) -> Tensor:
    gain = 1 + m.norm.weight
    return m.down(x * gain) + (gain * x).sum()


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (
            with_norm(lambda m, x: m.down(m.norm(x)) + m.other(m.norm(x)), other=nn.Linear(8, 6)),
            "the gain of layer_norm has other readers",
        ),
        (
            with_norm(lambda m, x: m.down(h := m.norm(x)) + m.other(h), other=nn.Linear(8, 6)),
            "down.weight other.weight <- norm.weight norm.bias",
        ),
        (with_norm(lambda m, x: m.down(h := m.norm(x)) + h, down=nn.Linear(8, 8)), SUM),
        (with_norm(lambda m, x: m.down(m.norm(x)), norm=nn.LayerNorm(8, bias=False)), "down.weight <- norm.weight"),
        (with_norm(lambda m, x: m.down(m.norm(x)), norm=nn.LayerNorm([5, 8])), "layer_norm has no gain by channel"),
        (with_norm(lambda m, x: m.down(m.norm(x)), norm=nn.GroupNorm(1, 5)), "the channels of linear are mixed"),
        (with_norm(lambda m, x: m.down(m.norm(x)), norm=Gemma()), "down.weight <- norm.weight"),
        (with_norm(gemma_twice), "norm.weight has other readers"),
        (
            with_norm(lambda m, x: m.down(F.layer_norm(x, [8], m.norm.weight, m.norm.weight))),
            "the gain of layer_norm is its bias, too",
        ),
        (with_norm(lambda m, x: m.down(x * m.norm.weight)), "down.weight <- norm.weight"),
        (with_norm(lambda m, x: m.down(m.norm.weight * x)), "down.weight <- norm.weight"),
    ],
)
def test_norms(net: Net, expected: str) -> None:
    assert check(net, X, "norm.weight") == expected


def test_a_norm_without_gain() -> None:
    gm = capture(Net(lambda m, x: m.down(F.layer_norm(x, (8,))), down=nn.Linear(8, 6)), X)
    op = next(op for op in ops_of(gm) if op.node.target == aten.layer_norm.default)
    assert Flows(gm).out_of(op) == Stopped("layer_norm has no gain")
    assert producers_behind(next(op for op in ops_of(gm) if isinstance(op, Weighted)).input_op) == [op]


def test_parameters_that_other_parts_of_the_model_hold() -> None:
    net = linears(lambda m, x: m.down(m.up(x)))
    assert check(net, X, shared=frozenset({"other.weight"})) == BOTH
    assert check(net, X, shared=frozenset({"up.weight"})) == "up.weight has other readers"
    assert check(net, X, shared=frozenset({"up.bias"})) == "the bias of linear is no parameter that it alone has"
    assert check(net, X, shared=frozenset({"down.weight"})) == SHARED_READER
    assert check(net, X, shared=frozenset({"down.bias"})) == BOTH
    assert (
        check(with_norm(lambda m, x: m.down(m.norm(x))), X, "norm.weight", frozenset({"norm.bias"}))
        == "the gain of layer_norm has other readers"
    )


def test_tied_parameters() -> None:
    tokens = torch.ones(2, 5, dtype=torch.int64)
    table, first, second, third = nn.Embedding(12, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(12, 8)
    parts = {"table": table, "up": first, "down": second, "third": third}
    net = Net(lambda m, x: m.down(h := m.up(m.table(x))) + m.third(h), **parts)
    gm = capture(net, tokens)
    assert text_of(Flows(gm).out_of(producer(gm, "up.weight"))) == "down.weight third.weight <- up.weight up.bias"
    second.weight = third.weight
    gm = capture(net, tokens)
    assert Flows(gm).out_of(producer(gm, "up.weight")) == Stopped(SHARED_READER)
    first.weight = table.weight
    gm = capture(net, tokens)
    assert Flows(gm).out_of(producer(gm, "up.weight")) == Stopped("up.weight has other readers")


def test_embeddings_produce_nothing() -> None:
    gm = capture(
        Net(lambda m, x: m.down(m.table(x)), table=nn.Embedding(9, 8), down=nn.Linear(8, 3)),
        torch.ones(2, 5, dtype=torch.int64),
    )
    assert Flows(gm).out_of(producer(gm, "table.weight")) == Stopped(
        "the weight of embedding is no parameter that it alone has"
    )


def test_producers_behind_are_found_nearest_first() -> None:
    net = linears(lambda m, x: m.down((m.up(x) + m.other(x)).relu() * m.extra), other=nn.Linear(8, 12), extra=extra(12))
    gm = capture(net, X)
    down = producer(gm, "down.weight")
    assert isinstance(down, Weighted)
    assert [op.node.name for op in producers_behind(down.input_op)] == ["mul"]
    found = producers_behind(view(view(down.input_op.node).node.all_input_nodes[0]))
    assert [op.node.name for op in found] == ["linear", "linear_1"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"self_attn.q_proj": "norm-linear", "self_attn.o_proj": "ov", "mlp.up_proj": "norm-linear", "mlp.down_proj": "up-down"}),
        ("mixtral", {"self_attn.o_proj": "ov", "mlp.experts.up_proj": "norm-linear", "mlp.experts.down_proj": "up-down"}),
        ("deepseek", {"q_b_proj": "norm-linear", "kv_b_proj": "norm-linear", "o_proj": "ov", "shared_experts.down_proj": "up-down"}),
        ("gemma3", {"self_attn.k_proj": "norm-linear", "self_attn.o_proj": "ov", "mlp.down_proj": "up-down"}),
        ("opt", {"self_attn.q_proj": "norm-linear", "self_attn.out_proj": "ov", "fc1": "norm-linear", "fc2": "linear-linear"}),
        ("gpt2", {"attn.c_attn": "norm-linear", "attn.c_proj": "ov", "mlp.c_fc": "norm-linear"}),
        ("bert", {"attention.output.dense": "ov"}),
    ],
)  # fmt: skip
def test_kinds_of_subgraphs(family: str, expected: dict[str, str]) -> None:
    gm = canonical(family)
    found: dict[str, set[str]] = {name: set() for name in expected}
    for op in ops_of(gm):
        if isinstance(op, Weighted) and not isinstance(op, Embedding):
            flow = Flows(gm).into(op)
            for name in expected:
                if isinstance(flow, Flow) and path_of(op).endswith(f".{name}"):
                    found[name].add(subgraph_of(flow.producer, op))
    assert found == {name: {kind} for name, kind in expected.items()}


def path_of(op: Weighted) -> str:
    """The layer's path: that of its weight."""
    assert isinstance(op.weight_op, Param)
    return op.weight_op.fqn.removesuffix(".weight")


class Paths(nn.Module):
    """Two linears with something between them."""

    def __init__(self, between: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x), x))


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        (lambda m, h, x: h, "linear-linear"),
        (lambda m, h, x: F.relu(h), "linear-linear"),
        (lambda m, h, x: h * 2.0, "linear-linear"),
        (lambda m, h, x: h * m.gain, "linear-linear"),  # a parameter is no gate
        (lambda m, h, x: F.relu(h) * torch.sigmoid(x), "up-down"),
        (lambda m, h, x: torch.softmax(x @ x.mT, -1) @ h, "ov"),
        (lambda m, h, x: torch.softmax(x @ x.mT, -1) @ h * torch.sigmoid(x), "ov"),  # gated attention
    ],
)
def test_kinds_by_what_stands_between(between: Callable[[Any, Tensor, Tensor], Tensor], kind: str) -> None:
    gm = capture(Paths(between), torch.randn(2, 3, 8))
    op = next(op for op in ops_of(gm) if isinstance(op, Weighted) and path_of(op) == "second")
    flow = Flows(gm).into(op)
    assert isinstance(flow, Flow)
    assert subgraph_of(flow.producer, op) == kind
