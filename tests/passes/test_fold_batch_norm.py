"""Batch norms go into the layers before them, and the function stays."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.errors import GraphError
from graphq.ir.layers import BY
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import BatchNorm, Conv2d, InferenceBatchNorm, ops_of
from graphq.passes.fold_batch_norm import FoldBatchNorm
from graphq.state import put_tensor, tensor_of
from tests.graphs import assert_vals, run, targets, without_data
from tests.lifted import assert_same_function, lifted
from tests.models import ConvBnRelu, capture, captured, random_inputs

aten = torch.ops.aten
IMAGE = torch.ones(2, 4, 8, 8)


def seen(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with batch norms that have seen something."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in gm.named_buffers():
        if buffer.is_floating_point():
            random = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(random + 0.2 if name.endswith("var") else random - 0.5)
    return gm


def captured_of(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return seen(capture(model, *inputs))


def fold(gm: fx.GraphModule) -> int:
    """The number of changes; a second run finds nothing."""
    count = Pipeline([FoldBatchNorm()], strict=True).run(gm)["fold-batch-norm"]
    assert Pipeline([FoldBatchNorm()], strict=True).run(gm) == {"fold-batch-norm": 0}
    return count


def assert_folds(gm: fx.GraphModule, count: int, *inputs: Tensor) -> fx.GraphModule:
    """``gm`` is folded ``count`` times, in float64, and computes what it did; it is given back folded."""
    before, after = lifted(gm), lifted(gm)
    assert fold(after) == count
    assert_same_function(before, after, inputs, 1e-12)
    assert fold(gm) == count
    assert not any(isinstance(op, BatchNorm | InferenceBatchNorm) for op in ops_of(gm))
    assert_vals(gm, *inputs)
    return gm


def test_golden() -> None:
    gm = captured_of(ConvBnRelu(), IMAGE)
    assert_folds(gm, 1, torch.randn(3, 4, 8, 8))
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 4, 8, 8] = input
%1: f32[batch, 8, 8, 8] = aten.conv2d(%x, @conv.weight, @conv.bias, [1, 1], [1, 1])
%2: f32[batch, 8, 8, 8] = aten.relu(%1)
%3: f32[batch, 8, 6, 6] = aten.conv2d(%2, @depthwise.weight, @depthwise.bias, [1, 1], [0, 0], [1, 1], 8)
return [%3]
""",
    )
    assert list(gm.state_dict()) == ["conv.weight", "conv.bias", "depthwise.weight", "depthwise.bias"]
    assert isinstance(tensor_of(gm, "conv.bias"), nn.Parameter)
    conv = next(op for op in ops_of(gm) if isinstance(op, Conv2d))
    assert conv.node.meta[BY] == ("fold-batch-norm",)
    assert list(conv.node.meta["nn_module_stack"].values())[-1][0] == "conv"


def test_resnet() -> None:
    gm = seen(captured("resnet"))
    before = run(gm, *(inputs := random_inputs(gm)))
    assert_folds(gm, 8, *inputs)
    assert not any("norm" in name for name in gm.state_dict())
    assert (run(gm, *inputs) - before).abs().max() <= 1e-5 * before.abs().max()  # as captured: float32


class Layer(nn.Module):
    """One layer and a batch norm of its output."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("make", "norm", "shape"),
    [
        (lambda b: nn.Linear(4, 6, bias=b), nn.BatchNorm1d, (5, 4)),
        (lambda b: nn.Conv1d(4, 6, 3, padding=1, bias=b), nn.BatchNorm1d, (5, 4, 7)),
        (lambda b: nn.Conv1d(4, 6, 3, padding="same", groups=2, bias=b), nn.BatchNorm1d, (5, 4, 7)),
        (lambda b: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=b), nn.BatchNorm2d, (5, 4, 7, 6)),
        (lambda b: nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=b), nn.BatchNorm2d, (5, 4, 7, 6)),
        (lambda b: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=b), nn.BatchNorm1d, (5, 4, 7)),
        (lambda b: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=b), nn.BatchNorm2d, (5, 4, 7, 6)),
        (lambda b: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d, (5, 4, 7, 6)),
        (lambda b: nn.ConvTranspose3d(4, 6, 2, groups=2, bias=b), nn.BatchNorm3d, (5, 4, 3, 4, 3)),
        (lambda b: nn.Conv3d(4, 6, 2, groups=2, bias=b), nn.BatchNorm3d, (5, 4, 3, 4, 3)),
    ],
)
def test_every_layer(make: Any, norm: Any, shape: tuple[int, ...], affine: bool, bias: bool) -> None:
    model = Layer(make(bias), norm(6, affine=affine, eps=0.01))
    gm = captured_of(model, torch.ones(shape))
    assert_folds(gm, 1, torch.randn(shape))
    assert list(gm.state_dict()) == ["layer.weight", "layer.bias"]


class Written(nn.Module):
    """A layer written with functions."""

    def __init__(self, call: Any, **tensors: Tensor) -> None:
        super().__init__()
        self.call = call
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.call(self, x))


def test_a_transposed_linear_and_a_weight_of_another_name() -> None:
    model = Written(lambda m, x: torch.addmm(m.b, x, m.w), w=torch.empty(4, 6), b=torch.empty(6))
    gm = assert_folds(captured_of(model, torch.ones(2, 4)), 1, torch.randn(5, 4))
    assert list(gm.state_dict()) == ["w", "b"]
    model = Written(lambda m, x: F.linear(x, m.w), w=torch.empty(6, 4))
    gm = assert_folds(captured_of(model, torch.ones(2, 4)), 1, torch.randn(5, 4))
    assert list(gm.state_dict()) == ["w", "w_bias"]


def test_one_batch_norm_after_another() -> None:
    model = Layer(nn.Conv1d(4, 6, 3), nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)))
    assert_folds(captured_of(model, torch.ones(2, 4, 7)), 2, torch.randn(5, 4, 7))


def test_reduced_precision_is_computed_in_float64() -> None:
    gm = captured_of(Layer(nn.Linear(4, 6), nn.BatchNorm1d(6, eps=0.0)).bfloat16(), torch.ones(2, 4).bfloat16())
    w, var, gamma = (tensor_of(gm, n).double() for n in ("layer.weight", "norm.running_var", "norm.weight"))
    assert fold(gm) == 1
    assert torch.equal(tensor_of(gm, "layer.weight"), (w * (gamma / var.sqrt())[:, None]).bfloat16())
    assert tensor_of(gm, "layer.bias").dtype == torch.bfloat16


class Frozen(nn.Module):
    """A batch norm that is written out, as torchvision's FrozenBatchNorm2d and transformers' detectors have it."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.shape = (1, -1, *[1] * axes)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (tensor.reshape(self.shape) for tensor in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("make", "axes", "shape"),
    [
        (lambda b: nn.Conv2d(4, 6, 3, bias=b), 2, (5, 4, 7, 6)),
        (lambda b: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=b), 1, (5, 4, 7)),
        (lambda b: nn.Linear(4, 6, bias=b), 0, (5, 4)),
    ],
)
def test_a_frozen_batch_norm_that_is_written_out(make: Any, axes: int, shape: tuple[int, ...], bias: bool) -> None:
    gm = captured_of(Layer(make(bias), Frozen(6, axes)), torch.ones(shape))
    assert_folds(gm, 2, torch.randn(shape))
    assert list(gm.state_dict()) == ["layer.weight", "layer.bias"]
    assert len(targets(gm)) == 1


def test_frozen_golden() -> None:
    gm = captured_of(Layer(nn.Conv2d(4, 6, 3, bias=False), Frozen(6, 2)), torch.ones(2, 4, 7, 6))
    assert fold(gm) == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 4, 7, 6] = input
%1: f32[batch, 6, 5, 4] = aten.conv2d(%x, @layer.weight, @layer.bias)
return [%1]
""",
    )


class Scaled(nn.Module):
    """A linear whose output is scaled by channel, and then what else a use makes of it."""

    def __init__(self, use: Any, bias: bool = True) -> None:
        super().__init__()
        self.use = use
        self.linear = nn.Linear(4, 6, bias=bias)
        self.gain = nn.Parameter(torch.rand(6) + 0.5)
        self.one = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize(
    ("use", "bias", "names"),
    [
        (lambda m, x: m.linear(x) * m.gain, True, ["linear.weight", "linear.bias"]),
        (lambda m, x: m.gain * m.linear(x), False, ["linear.weight"]),  # which needs no bias
        (lambda m, x: m.linear(x) + m.gain, True, ["linear.weight", "linear.bias"]),
        (lambda m, x: m.gain[None] + m.linear(x), False, ["linear.weight", "linear.bias"]),
        (lambda m, x: m.linear(x) * m.gain.exp(), True, ["linear.weight", "linear.bias"]),
    ],
)
def test_a_scale_or_a_shift_of_channels(use: Any, bias: bool, names: list[str]) -> None:
    gm = assert_folds(captured_of(Scaled(use, bias), torch.ones(2, 3, 4)), 1, torch.randn(5, 3, 4))
    assert sorted(gm.state_dict()) == sorted(names)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.linear(x) * x[..., :1],
        lambda m, x: m.linear(x) * m.one,  # one element for all channels
        lambda m, x: m.linear(x[:, None]) * m.gain.view(6, 1, 1),  # another axis
        lambda m, x: m.linear(x[:, 0]) * m.gain[None, None],  # more axes
        lambda m, x: m.linear(x[:, :6]) * m.gain.outer(m.gain),  # each its own
        lambda m, x: m.linear(x[:, :1]) * m.gain[:, None],  # along tokens
        lambda m, x: torch.add(m.linear(x), m.gain, alpha=2),
        lambda m, x: torch.add(m.gain, m.linear(x), alpha=2),
        lambda m, x: m.linear(x) * torch.rand_like(m.gain),
        lambda m, x: m.linear(x) * m.gain.double(),
        lambda m, x: m.linear(x) * 2.0,
        lambda m, x: (y := m.linear(x)) * m.gain + y,
        lambda m, x: m.linear(x) * m.gain + m.linear.weight.sum(),
        lambda m, x: (y := m.linear(x)) * y,
        lambda m, x: m.linear(x).relu() * m.gain,
    ],
)
def test_what_is_no_scale_or_shift_of_channels(use: Any) -> None:
    gm = captured_of(Scaled(use), torch.ones(2, 6, 4))
    before = dump(gm)
    assert fold(gm) == 0
    assert dump(gm) == before


# -- near misses


def also_read(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return m.norm(y) + y


def called_twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.linear(x)) + m.linear(x + 1)


def weight_read(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.linear(x)) + m.linear.weight.sum()


def bias_read(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.linear(x)) + m.linear.bias.sum()


def computed_weight(m: Any, x: Tensor) -> Tensor:
    return m.norm(F.linear(x, m.linear.weight * 2, m.linear.bias))


def computed_bias(m: Any, x: Tensor) -> Tensor:
    return m.norm(F.linear(x, m.linear.weight, m.linear.bias * 2))


def computed_gamma(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(m.linear(x), n.running_mean, n.running_var, n.weight * 2, n.bias)


def computed_beta(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(m.linear(x), n.running_mean, n.running_var, n.weight, n.bias * 2)


def computed_mean(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(m.linear(x), n.running_mean * 2, n.running_var, n.weight, n.bias)


def computed_var(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(m.linear(x), n.running_mean, n.running_var * 2, n.weight, n.bias)


def training(m: Any, x: Tensor) -> Tensor:
    n = m.norm
    return F.batch_norm(m.linear(x), n.running_mean.clone(), n.running_var.clone(), n.weight, n.bias, training=True)


def of_the_batch(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(m.linear(x), None, None, m.norm.weight, m.norm.bias, training=True)


def another_axis(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.linear(x.unsqueeze(1).expand(-1, 6, -1)))


def something_between(m: Any, x: Tensor) -> Tensor:
    return m.norm(F.relu(m.linear(x)))


def plain(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.linear(x))


class Use(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use = use
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


USES = [
    *(also_read, called_twice, weight_read, bias_read, computed_weight, computed_bias, computed_gamma, computed_beta),
    *(computed_mean, computed_var, training, of_the_batch, another_axis, something_between),
]


@pytest.mark.parametrize("use", USES)
def test_near_misses(use: Any) -> None:
    gm = captured_of(Use(use), torch.ones(2, 4))
    before = dump(gm)
    assert fold(gm) == 0
    assert dump(gm) == before


def test_training() -> None:
    gm = captured_of(Use(plain), torch.ones(2, 4))
    norm = next(op for op in ops_of(gm) if isinstance(op, BatchNorm)).node
    norm.args = (*norm.args[:5], True, *norm.args[6:])
    assert FoldBatchNorm().run(gm) == 0


def test_what_the_near_misses_miss() -> None:
    assert_folds(captured_of(Use(plain), torch.ones(2, 4)), 1, torch.randn(5, 4))


def test_tied_weights_stay_tied_and_tied_biases_part() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x)) + self.b(x)

    for name in ("weight", "bias"):
        model = Tied()
        setattr(model.b, name, getattr(model.a, name))
        gm = captured_of(model, torch.ones(2, 4))
        assert {f"a.{name}", f"b.{name}"} <= {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
        before, after = lifted(gm), lifted(gm)
        assert fold(after) == (name == "bias")
        assert_same_function(before, after, (torch.randn(5, 4),), 1e-12)


def test_a_convolution_of_one_image_has_its_channels_elsewhere() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 1)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x[0]))  # [6, 6, 6]: its channels are axis 0

    gm = captured_of(One(), torch.ones(2, 4, 6, 6))
    conv, norm = (next(op for op in ops_of(gm) if isinstance(op, kind)) for kind in (Conv2d, BatchNorm))
    assert fold(gm) == 0
    assert norm.node in conv.node.users


@pytest.mark.parametrize(("beta", "alpha", "count"), [(1, 1, 1), (2, 1, 0), (1, 0.5, 0)])
def test_scaled_products(beta: float, alpha: float, count: int) -> None:
    model = Written(
        lambda m, x: torch.addmm(m.b, x, m.w, beta=beta, alpha=alpha), w=torch.empty(4, 6), b=torch.empty(6)
    )
    assert fold(captured_of(model, torch.ones(2, 4))) == count


@pytest.mark.parametrize("shape", [(1, 6), (1,)])
def test_biases_of_other_shapes(shape: tuple[int, ...]) -> None:
    model = Written(lambda m, x: torch.addmm(m.b, x, m.w), w=torch.empty(4, 6), b=torch.empty(shape))
    assert fold(captured_of(model, torch.ones(2, 4))) == 0


def test_statistics_that_are_read() -> None:
    gm = captured("resnet")
    norm = next(op for op in ops_of(gm) if isinstance(op, InferenceBatchNorm))
    norm.users[0].node.args = (norm.node, 1)
    assert FoldBatchNorm().run(gm) == 7


def test_a_bias_whose_name_is_taken() -> None:
    gm = captured_of(ConvBnRelu(), IMAGE)
    put_tensor(gm, "conv.bias", torch.ones(3))
    w = tensor_of(gm, "conv.weight").clone()
    with pytest.raises(GraphError) as error:
        FoldBatchNorm().run(gm)
    assert str(error.value) == (
        "conv.bias: the model has a tensor of this name, which fold-batch-norm gives to a layer's bias; rename it"
    )
    assert torch.equal(tensor_of(gm, "conv.weight"), w)


def test_without_weights_the_graph_is_the_same() -> None:
    real, fake = captured("resnet"), without_data(captured("resnet"))
    assert fold(fake) == fold(real) == 8
    assert dump(fake) == dump(real)
    assert "conv.bias" not in targets(real)
