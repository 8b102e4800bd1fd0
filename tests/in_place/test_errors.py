"""What ``graphq.quantize`` and ``graphq.convert`` refuse, in these words; the model is as it was then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.errors import GraphError, GraphqError, SpecError
from graphq.runtime.layers import QuantizedLayer
from graphq.spec.algorithms import ALGORITHMS
from tests.in_place.test_quantizer import data, linears, seeded
from tests.models import MLP, Blocks, ConvBnRelu, Twice


def snapshot(model: nn.Module) -> list[Any]:
    """Modules, tensors, hooks and attributes of a model, by identity."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        found.append((name, module, {k: {a: id(b) for a, b in v.items()} if isinstance(v, dict) else v for k, v in own.items()}))  # fmt: skip
    return found


def refused(model: Any, config: Any, kind: type[GraphqError] = SpecError) -> str:
    """The error of ``graphq.quantize``, which leaves the model as it was."""
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(kind) as error:
        graphq.quantize(model, config)
    assert type(error.value) is kind
    assert before is None or snapshot(model) == before
    return str(error.value)


def rules(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"graphq": 1, "rules": list(items), **more}


INT8 = rules({"match": "kind:linear", "weight": "int8/channel"})
WHOLE_GRAPH = [name for name, entry in ALGORITHMS.items() if not entry.in_place]


class Parts(nn.Module):
    """Layers that are more than they seem."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.mirror = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
        self.normed: Any = nn.Linear(8, 8)
        weight = self.normed.weight.detach()
        del self.normed.weight
        self.normed.weight = weight  # as weight norm in its old form, which computes it in a hook
        self.parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.plain = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mirror(self.encoder(x)[:, None])[:, 0]
        return self.plain(self.parametrized(self.normed(h)))


def poisoned(value: float) -> nn.Module:
    model = seeded(MLP())
    model.down.weight.data[1, 2] = value
    return model


def with_name() -> nn.Module:
    model = MLP()
    model.down.register_buffer("scale_d", torch.ones(1))
    return model


REFUSED: dict[str, tuple[Callable[[], Any], Any, type[GraphqError], str]] = {
    "no module": (lambda: "llama", INT8, GraphError, "model: a str is no module"),
    "a layer alone": (
        lambda: nn.Linear(8, 8), INT8, GraphError,
        "model: a Linear alone cannot be replaced in place; put it into a module",
    ),
    "no layers": (
        lambda: nn.Sequential(nn.Conv1d(3, 3, 3), nn.ReLU()), INT8, GraphError,
        "model: Sequential has no nn.Linear and no nn.Conv2d to quantize",
    ),
    "a wrapped model": (
        lambda: nn.DataParallel(MLP()), INT8, GraphError,
        "model: a DataParallel wraps the model; quantize what it wraps, and wrap it again",
    ),
    "a compiled model": (
        lambda: torch.compile(MLP()), INT8, GraphError,
        "model: a OptimizedModule wraps the model; quantize what it wraps, and wrap it again",
    ),
    "NaN": (lambda: poisoned(torch.nan), INT8, GraphError, "down: the weight holds NaN or Inf"),
    "Inf": (lambda: poisoned(-torch.inf), INT8, GraphError, "down: the weight holds NaN or Inf"),
    "no data": (
        lambda: MLP().to("meta"), INT8, GraphError,
        "up: the weight is on the meta device; load the model's weights first",
    ),
    "a dtype": (
        lambda: MLP().to(torch.float8_e4m3fn), INT8, GraphError,
        "up: the weight is torch.float8_e4m3fn; graphq quantizes float64, float32, bfloat16, float16",
    ),
    "a name": (
        with_name, INT8, GraphError,
        "down.scale_d: the model has this name already, which graphq gives to a factor; rename it",
    ),
    "nothing planned": (
        lambda: MLP(), rules({"match": "kind:linear", "float": "to see"}), SpecError,
        "the config quantizes no layer of this model\nup: stays float: to see\ndown: stays float: to see",
    ),
    "nothing possible": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")),
        rules({"match": "kind:conv2d", "weight": "int8/channel"}), SpecError,
        ("the config quantizes no layer of this model\n"
        "0: stays float: it pads by circular; in place, graphq quantizes convolutions that pad with zeros"),
    ),
    "an input alone": (
        MLP, rules({"match": "kind:linear", "input": "int8/tensor"}), SpecError,
        ("up: input int8/tensor: graphq.quantize quantizes weights, alone or with inputs; give a weight, too\n"
        "down: input int8/tensor: graphq.quantize quantizes weights, alone or with inputs; give a weight, too"),
    ),
    "algorithms of graphs": (
        MLP, {**INT8, "algorithms": WHOLE_GRAPH}, SpecError,
        "\n".join(
            f"algorithms[{i}]: {name} needs the graph of the model; use graphq.compile"
            for i, name in enumerate(WHOLE_GRAPH)
        ),
    ),
    "an option": (
        MLP, {**INT8, "algorithms": [{"gptq": {"dampening": 3}}]}, SpecError,
        "algorithms[0]: gptq: dampening: 3 is not a number above 0, up to 1",
    ),
    "a cache": (
        MLP, {**INT8, "cache": "int8/token/dynamic"}, SpecError,
        "cache: int8/token/dynamic: in place, layers alone are quantized; leave it out of the spec, or use graphq.compile",
    ),
    "a rule without layers": (
        MLP, rules({"match": "upp", "weight": "int8/channel"}), SpecError,
        "rules[0]: upp matches no layer; did you mean up?",
    ),
    "an algorithm without layers": (
        MLP, {**INT8, "algorithms": [{"gptq": {"match": "upp"}}]}, SpecError,
        "algorithms[0]: gptq: upp matches no layer; did you mean up?",
    ),
    "blocks that are not there": (
        Blocks, rules({"match": "up#7", "weight": "int8/channel"}), SpecError,
        "rules[0]: up#7: block 7 does not exist: this model has blocks 0 to 1; #a-b is a list, write #a..b for a range",
    ),
    "tokens of a convolution": (
        ConvBnRelu, rules({"match": "kind:conv2d", "weight": "int8/channel", "input": "int8/token/dynamic"}), SpecError,
        ("rules[0]: conv: input int8/token/dynamic: a convolution's input has no token vectors; use one scale per tensor\n"
        "rules[0]: depthwise: input int8/token/dynamic: a convolution's input has no token vectors; use one scale per"
        " tensor"),
    ),
    "a config": (MLP, 8, SpecError, "a spec is a path, a preset's name, a mapping or a Spec, not 8"),
    "a dialect": (MLP, {"bits": 8}, SpecError, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    model, config, kind, message = REFUSED[name]
    found = refused(model(), config, kind)
    if message:
        assert found == message
    else:
        assert "no dialect is recognised" in found


@torch.no_grad()
def test_layers_that_are_more_than_linears_stay_float() -> None:
    model = Parts().eval()
    (x,) = data(2, 5, 8, count=1)
    formats = {"weight": "int8/channel", "input": "int8/tensor"}
    graphq.quantize(model, rules({"match": "kind:linear", **formats}, {"match": "kind:conv2d", **formats}))
    report = graphq.in_place_report(model)
    read = "nn.TransformerEncoderLayer reads its weight without calling it"
    assert {layer.layer.fqn: layer.reason for layer in report.layers} == {
        "encoder.linear1": read,
        "encoder.linear2": read,
        "mirror": "it pads by reflect; in place, graphq quantizes convolutions that pad with zeros",
        "normed": "its weight is computed at each call",
        "plain": "",
    }
    other = "; in place, nn.Linear and nn.Conv2d are quantized"
    assert report.notes == (
        f"encoder.self_attn: stays float: a MultiheadAttention{other}",
        f"encoder.self_attn.out_proj: stays float: a NonDynamicallyQuantizableLinear{other}",
        f"parametrized: stays float: a ParametrizedLinear{other}",
        f"parametrized.parametrizations.weight: stays float: a ParametrizationList{other}",
    )
    model(x)
    fake = model(x)
    graphq.convert(model)
    torch.testing.assert_close(model(x), fake, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_model_is_quantized_and_converted_once() -> None:
    model: Any = nn.Sequential(seeded(MLP()))
    (x,) = data(4, 8, count=1)
    graphq.quantize(model[0], INT8)
    again = "is quantized already; quantize a fresh model"
    assert refused(model[0], INT8, GraphError) == f"model: MLP {again}"
    assert refused(model, INT8, GraphError) == f"model: 0 {again}"
    for use in (graphq.convert, graphq.in_place_report):
        with pytest.raises(GraphError) as error:
            use(model)
        assert str(error.value) == "model: Sequential was not given to graphq.quantize; its part 0 was"
    model(x)
    graphq.convert(model[0])
    with pytest.raises(GraphError) as error:
        graphq.convert(model[0])
    assert str(error.value) == "model: MLP is converted already"
    assert refused(model[0], INT8, GraphError) == f"model: MLP {again}"
    inner = nn.ModuleDict({"0": model[0].up})  # the packed layer itself
    assert refused(inner, INT8, GraphError) == f"0: {again}"


def test_a_model_that_was_not_quantized_is_not_converted() -> None:
    model: Any
    for model, name in ((MLP(), "MLP"), ("llama", "str")):
        for use in (graphq.convert, graphq.in_place_report):
            with pytest.raises(GraphError) as error:
                use(model)
            assert str(error.value) == f"model: {name} was not given to graphq.quantize"


@torch.no_grad()
def test_a_conversion_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(MLP())
    (x,) = data(4, 8, count=1)
    graphq.quantize(model, linears("int4/channel"))
    with pytest.raises(SpecError, match="0 of 1 batches"):
        graphq.convert(model)
    model(x)
    fake = model(x)
    before = snapshot(model)
    made: list[Any] = []

    def fails(self: Any) -> Any:
        made.append(self)
        if len(made) == 2:
            raise MemoryError
        return original(self)

    from graphq.in_place.layer import InPlaceLayer

    original = InPlaceLayer.quantized
    monkeypatch.setattr(InPlaceLayer, "quantized", fails)
    with pytest.raises(MemoryError):
        graphq.convert(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), fake)
    graphq.convert(model)
    assert isinstance(model.down, QuantizedLayer)
    assert torch.equal(model(x), fake)


@torch.no_grad()
def test_a_packed_layer_names_what_it_is() -> None:
    model = seeded(Twice())
    graphq.quantize(model, linears("int4/channel"))
    model(data(4, 8)[0])
    graphq.convert(model)
    assert (model.shared.in_features, model.shared.out_features) == (8, 8)
    assert repr(model.shared).startswith("QuantizedLayer(\n  [8, 8], weight int4/channel\n")
