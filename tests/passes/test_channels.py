"""Factors of channels: where they can move, and that the function stays when they do."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.batches import complete
from graphq.compiler import canonical_passes
from graphq.hugging_face import capture_pretrained
from graphq.passes.channels import Blocked, Flow, flow_from, move_factors, producers_behind
from graphq.pipeline import Pipeline
from graphq.source import SHARED, source_of
from graphq.state import tensor_of
from graphq.views import Embedding, Op, Weighted, ops_of, view
from tests.graphs import assert_vals
from tests.lifted import assert_same_function, lifted
from tests.models import FAMILIES, MoE, capture, random_inputs, tiny

aten = torch.ops.aten
FUNCTION = 1e-12  # of the largest output, in float64


def factors(count: int, seed: int = 0) -> Tensor:
    """Numbers from 1/4 to 4."""
    return 4 ** (2 * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)


def text_of(found: Flow | Blocked) -> str:
    """``readers <- produced``, with the number of labels that move where it is not all."""
    if isinstance(found, Blocked):
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
        found = [flow_from(gm, producer) for producer in producers_behind(op.input_op)]
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
        assert move_factors(after, flow, factors(flow.count, seed), "test") == len(flow.produced) + len(flow.readers)
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
    found = flow_from(gm, producer(gm, name))
    if isinstance(found, Blocked):
        return found.reason
    before, after = lifted(gm), lifted(gm)
    again = flow_from(after, producer(after, name))
    assert text_of(again) == text_of(found)
    assert isinstance(again, Flow)
    move_factors(after, again, factors(again.count), "test")
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


def between(f: Callable[..., Any], **more: Any) -> Net:
    """``f`` between two linears."""
    return Net(lambda m, x: m.down(f(m.up(x))), **up(**more))


BOTH = "down.weight <- up.weight up.bias"


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (F.relu, BOTH),
        (lambda h: -F.leaky_relu(h) / 3, BOTH),
        (lambda h: h.abs() * h.shape[1], BOTH),
        (lambda h: F.pad(h, (0, 0, 1, 1)), "the channels of linear_1 are mixed"),
        (lambda h: h.flip(1), "aten.flip.default reads it"),
        (lambda h: h.mean(1), BOTH),
        (lambda h: h.transpose(1, 2).unflatten(1, (3, 4)).flatten(1, 2).transpose(1, 2), BOTH),
        (lambda h: h + h * 2, BOTH),
        (lambda h: F.pad(h, (0, 0, 1, 1), mode="replicate"), "aten.pad.default reads it"),
        (lambda h: h.double().float(), BOTH),
        (F.silu, "aten.silu.default reads it"),
        (F.gelu, "aten.gelu.default reads it"),
        (torch.square, "aten.square.default reads it"),
        (lambda h: h * h, "it is multiplied by itself"),
        (lambda h: h * -h, "it is multiplied by itself"),
        (lambda h: 1 / h.abs(), "aten.reciprocal.default reads it"),
        (lambda h: torch.ones_like(h) / h, "it is a divisor"),
        (lambda h: h + 1, "a sum reads it beside what has no factors"),
        (lambda h: h.int().float(), "aten._to_copy.default makes it torch.int32"),
        (lambda h: h * h.mean(-1, keepdim=True), "a mean mixes its channels"),
        (lambda h: F.pad(h, (0, 0, 1, 1), value=1.0), "aten.pad.default reads it"),
        (lambda h: torch.cat([h[..., 6:], h[..., :6]], -1), BOTH),
        (lambda h: h + h.flip(-1).flip(-1)[..., :12], "aten.flip.default reads it"),
        (lambda h: h + torch.cat([h[..., 6:], h[..., :6]], -1), "it is added to other channels"),
        (lambda h: h.repeat(1, 2, 1), BOTH),
        (lambda h: F.max_pool1d(h, 3, 1, 1), "aten.max_pool1d.default mixes its channels"),
        (lambda h: h.softmax(-1), "aten.softmax.int reads it"),
        (lambda h: h.softmax(1) @ torch.ones(12, 12), "aten.softmax.int reads it"),
        (lambda h: h @ torch.ones(12, 12), "it is multiplied by what is no weight"),
        (lambda h: h.transpose(1, 2) @ h, "it is multiplied by what is no weight"),
    ],
)
def test_between_two_linears(f: Callable[..., Any], expected: str) -> None:
    assert check(between(f), torch.ones(2, 5, 8)) == expected


HALF = "down.weight <- up.weight up.bias 6/12"
SUM = "a sum reads it beside what has no factors"
SHARED_READER = "the weight of linear_1 has other readers"


def extra(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def linears(f: Callable[..., Any], **more: Any) -> Net:
    return Net(f, **up(**more))


def gated(m: Any, x: Tensor) -> Tensor:
    gate, up = m.up(x).chunk(2, -1)
    return m.down(F.silu(gate) * up)


def gated_alone(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        # some of the labels
        (linears(gated, down=nn.Linear(6, 8)), HALF),
        (linears(gated_alone, gate=nn.Linear(8, 12)), BOTH),
        (between(lambda h: F.pad(h[..., :6], (0, 6))), HALF),
        (between(lambda h: h[..., :6].repeat(1, 1, 2)), HALF),
        (between(lambda h: h[..., :6].repeat_interleave(2, -1)), HALF),
        (between(lambda h: torch.cat([h[..., :6].relu(), h[..., 6:].sigmoid()], -1)), HALF),
        # products
        (linears(lambda m, x: m.down(m.mix(x).mT.softmax(-1) @ m.up(x)), mix=nn.Linear(8, 7)), BOTH),
        # other readers
        (linears(lambda m, x: (m.down(h := m.up(x)), h)), "it is an output of the model"),
        (linears(lambda m, x: (m.down(h := m.up(x)), h[..., 6:])), HALF),
        (linears(lambda m, x: m.up(x)), "it is an output of the model"),
        (linears(lambda m, x: m.down(m.up(x)) + m.up.weight.sum()), "up.weight has other readers"),
        (
            linears(lambda m, x: m.down(m.up(x)) + m.up.bias.sum()),
            "the bias of linear is no parameter that it alone has",
        ),
        (linears(lambda m, x: m.down(m.up(x)) + m.down.weight.sum()), SHARED_READER),
        (linears(lambda m, x: m.down(m.up(x)) + m.down.bias.sum()), "down.weight <- up.weight up.bias"),
        (linears(lambda m, x: m.down(m.down(m.up(x))), up=nn.Linear(8, 8), down=nn.Linear(8, 8)), SHARED_READER),
        (
            linears(lambda m, x: m.down(m.up(m.up(x))), up=nn.Linear(8, 8), down=nn.Linear(8, 8)),
            "up.weight has other readers",
        ),
        (linears(lambda m, x: m.down(x) + m.up(m.down(x)), up=nn.Linear(8, 8), down=nn.Linear(8, 8)), SUM),
        # weights that are computed
        (linears(lambda m, x: F.linear(m.up(x), m.down.weight * 2)), SHARED_READER),
        (linears(lambda m, x: m.down(F.linear(x, m.up.weight * 2))), "aten.mul.Tensor has no weights of its own"),
        # parameters on the way
        (linears(lambda m, x: m.down(m.up(x) + m.extra), extra=extra(12)), f"{BOTH} extra"),
        (linears(lambda m, x: m.down(m.up(x) - m.extra), extra=extra(12)), "aten.sub.Tensor reads it"),
        (linears(lambda m, x: m.down(m.up(x) + m.extra) + m.extra.sum(), extra=extra(12)), SUM),
        (linears(lambda m, x: m.down(m.up(x) + m.extra), extra=extra(1)), SUM),
        (linears(lambda m, x: m.down(m.up(x) + m.extra), extra=extra(5, 12)), SUM),
        (linears(lambda m, x: m.down(m.up(x) * m.extra), extra=extra(12)), BOTH),
        (linears(lambda m, x: m.down(m.up(x) + m.other(x)), other=nn.Linear(8, 12)), SUM),
        (
            linears(
                lambda m, x: m.down(torch.cat([m.up(x), m.other(x)], -1)), other=nn.Linear(8, 4), down=nn.Linear(16, 8)
            ),
            BOTH,
        ),
        (
            linears(lambda m, x: m.down(torch.cat([m.up(x), m.other(x)], 1)), other=nn.Linear(8, 12)),
            "the channels of linear_2 are mixed",
        ),
    ],
)
def test_two_linears(net: Net, expected: str) -> None:
    assert check(net, X) == expected


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
        (with_norm(lambda m, x: m.down(x * m.norm.weight)), "down.weight <- norm.weight"),
        (with_norm(lambda m, x: m.down(m.norm.weight * x)), "down.weight <- norm.weight"),
    ],
)
def test_norms(net: Net, expected: str) -> None:
    assert check(net, X, "norm.weight") == expected


def test_a_norm_without_gain() -> None:
    gm = capture(Net(lambda m, x: m.down(F.layer_norm(x, (8,))), down=nn.Linear(8, 6)), X)
    op = next(op for op in ops_of(gm) if op.node.target == aten.layer_norm.default)
    assert flow_from(gm, op) == Blocked("layer_norm has no gain")
    assert producers_behind(next(op for op in ops_of(gm) if isinstance(op, Weighted)).input_op) == [op]


def attention(f: Callable[..., Tensor], heads: int = 4, **more: Any) -> Net:
    """``f`` of query, key and value with ``heads`` heads of keys and values, and 4 of queries."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (m.q, m.k, m.v))
        return m.down(f(q, k, v).transpose(1, 2).flatten(2))

    parts = {"q": nn.Linear(8, 16), "k": nn.Linear(8, heads * 4), "v": nn.Linear(8, heads * 4)}
    return Net(forward, **(parts | {"down": nn.Linear(16, 8)} | more))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3)).softmax(-1) @ v


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in m.qkv(x).split(8, -1))
    return m.down(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


VALUES = "down.weight <- v.weight v.bias"
COMPARED = "attention compares it"


@pytest.mark.parametrize(
    ("net", "name", "expected"),
    [
        (attention(F.scaled_dot_product_attention), "v.weight", VALUES),
        (attention(F.scaled_dot_product_attention), "q.weight", COMPARED),
        (attention(F.scaled_dot_product_attention), "k.weight", COMPARED),
        (attention(lambda q, k, v: F.scaled_dot_product_attention(q, v, v)), "v.weight", COMPARED),
        (attention(lambda q, k, v: F.scaled_dot_product_attention(q, q, v, k @ k.mT)), "v.weight", VALUES),
        (attention(lambda q, k, v: F.scaled_dot_product_attention(q, q, v, k[..., :1])), "k.weight", COMPARED),
        (attention(by_hand), "v.weight", VALUES),
        (attention(by_hand), "k.weight", "a product mixes its channels"),
        (attention(by_hand), "q.weight", "it is multiplied by what is no weight"),
        (attention(repeated, 2), "v.weight", VALUES),
        (attention(grouped, 2), "v.weight", VALUES),
        (attention(grouped, 1), "v.weight", VALUES),
        (
            Net(fused, qkv=nn.Linear(8, 24), down=nn.Linear(8, 6)),
            "qkv.weight",
            "down.weight <- qkv.weight qkv.bias 8/24",
        ),
    ],
)
def test_attention(net: Net, name: str, expected: str) -> None:
    assert check(net, X, name) == expected


def test_heads_that_share_values_share_factors() -> None:
    for f in (repeated, grouped):
        gm = capture(attention(f, 2), X)
        found = flow_from(gm, producer(gm, "v.weight"))
        assert isinstance(found, Flow)
        assert found.readers[0].channels.tolist() == [*range(4)] * 2 + [*range(4, 8)] * 2


def convolutions(f: Callable[..., Any], first: int = 1, second: int = 1, **more: Any) -> Net:
    """``f`` between two convolutions of so many groups."""
    parts = {
        "up": nn.Conv2d(4, 8, 3, groups=first),
        "down": nn.Conv2d(8, 6 if second < 8 else 8, 3, padding=1, groups=second),
    }
    return Net(lambda m, x: m.down(f(m.up(x))), **(parts | more))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (convolutions(F.relu), BOTH),
        (convolutions(lambda h: F.max_pool2d(h.relu(), 3, 1, 1)), BOTH),
        (convolutions(lambda h: F.avg_pool2d(h, 2)), BOTH),
        (convolutions(F.relu, 2, 2), BOTH),
        (convolutions(F.relu, 4, 8), BOTH),
        (convolutions(F.relu6), "aten.relu6.default reads it"),
        (convolutions(F.relu, down=nn.Conv2d(8, 6, 3, padding="same", bias=False)), BOTH),
        (convolutions(lambda h: F.adaptive_avg_pool2d(h, 1).flatten(1), down=nn.Linear(8, 3)), BOTH),
        (convolutions(lambda h: h.mean((2, 3)), down=nn.Linear(8, 3)), BOTH),
        (convolutions(lambda h: h.relu().flatten(1), down=nn.Linear(128, 3)), BOTH),
        (convolutions(lambda h: h, down=nn.Linear(4, 3)), "the channels of linear are mixed"),
        (convolutions(lambda h: h.transpose(1, 2), down=nn.Conv2d(4, 3, 1)), "the channels of conv2d_1 are mixed"),
        (convolutions(lambda h: F.conv_transpose2d(h, torch.ones(8, 8, 1, 1))), "aten.conv_transpose2d.input reads it"),
    ],
)
def test_convolutions(net: Net, expected: str) -> None:
    assert check(net, IMAGE) == expected


def test_a_batch_norm() -> None:
    net = convolutions(F.relu, 1, 8, norm=nn.BatchNorm2d(8))
    net.run = lambda m, x: m.down(F.relu(m.norm(m.up(x))))
    assert check(net, IMAGE, "norm.weight") == "down.weight <- norm.weight norm.bias"
    assert check(net, IMAGE) == "aten.batch_norm.default reads it"


@pytest.mark.parametrize("net", [convolutions(F.relu), convolutions(F.relu, 2, 2)])
def test_one_image_without_batches(net: Net) -> None:
    forward = net.run
    net.run = lambda m, x: forward(m, x[0])
    assert check(net, torch.ones(2, 4, 10, 10)) == BOTH  # as many rows as channels between them


def test_convolutions_of_one_axis() -> None:
    parts = {"up": nn.Conv1d(4, 6, 3), "down": nn.Conv1d(6, 4, 3, padding="same", groups=2)}
    assert check(Net(lambda m, x: m.down(m.up(x).relu()), **parts), torch.ones(2, 4, 8)) == BOTH


ORDER = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda h: h[ORDER], BOTH),
        (lambda h: h[:, ORDER], "rows are picked across its channels"),
        (lambda h: h[ORDER, ORDER][:, None] * torch.ones(1, 8), "rows are picked across its channels"),
        (lambda h: h.index_select(0, ORDER), BOTH),
        (lambda h: h.index_select(1, ORDER), "rows are picked across its channels"),
        (lambda h: h.index_select(-1, ORDER), "rows are picked across its channels"),
        (lambda h: h[h.argsort(0)[:, 0]], "aten.argsort.default reads it"),
        (lambda h: torch.ones(9, 8)[h[:, 0].to(torch.int64).clamp(0, 8)], "aten._to_copy.default makes it torch.int64"),
    ],
)
def test_rows(f: Callable[..., Any], expected: str) -> None:
    net = between(f, up=nn.Linear(8, 8), down=nn.Linear(8, 8))
    assert check(net, torch.ones(8, 8)) == expected


def test_experts() -> None:
    net = MoE()
    net.__class__ = type("Experts", (MoE,), {})  # no copy
    assert check(net, torch.ones(5, 8), "experts.gate_up_proj") == "experts.down_proj <- experts.gate_up_proj 6/12"


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
    assert text_of(flow_from(gm, producer(gm, "up.weight"))) == "down.weight third.weight <- up.weight up.bias"
    second.weight = third.weight
    gm = capture(net, tokens)
    assert flow_from(gm, producer(gm, "up.weight")) == Blocked(SHARED_READER)
    first.weight = table.weight
    gm = capture(net, tokens)
    assert flow_from(gm, producer(gm, "up.weight")) == Blocked("up.weight has other readers")


def test_embeddings_produce_nothing() -> None:
    gm = capture(
        Net(lambda m, x: m.down(m.table(x)), table=nn.Embedding(9, 8), down=nn.Linear(8, 3)),
        torch.ones(2, 5, dtype=torch.int64),
    )
    assert flow_from(gm, producer(gm, "table.weight")) == Blocked(
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
