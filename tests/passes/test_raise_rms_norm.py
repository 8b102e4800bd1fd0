"""RMS norms that are written out become one op, and the function stays; what differs in one thing stays as written."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.layers import BY
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import ops_of
from graphq.passes.raise_rms_norm import RaiseRmsNorm
from graphq.passes.remove_no_ops import RemoveNoOps
from tests.graphs import assert_vals, run, targets
from tests.lifted import assert_same_function, lifted
from tests.models import capture

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
aten = torch.ops.aten


def raise_norms(gm: fx.GraphModule) -> int:
    """The number of changes; a second run finds nothing."""
    count = Pipeline([RaiseRmsNorm()], strict=True).run(gm)["raise-rms-norm"]
    assert Pipeline([RaiseRmsNorm()], strict=True).run(gm) == {"raise-rms-norm": 0}
    return count


class Norm(nn.Module):
    """A norm that ``f`` writes out, of twice x."""

    def __init__(self, f: Any, width: int = 8) -> None:
        super().__init__()
        self.f = f
        self.gain = nn.Parameter(torch.rand(width, generator=torch.Generator().manual_seed(2)) + 0.5)
        self.other = nn.Parameter(torch.ones(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x * 2)


def llama(m: Norm, x: Tensor) -> Tensor:
    return m.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def transformers_casts(m: Norm, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return m.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


FORMS = {
    "llama": llama,
    "gain on the right": lambda m, x: (x * (x.pow(2).mean(-1, True) + 1e-6).rsqrt()) * m.gain,
    "root on the left": lambda m, x: m.gain * ((x.pow(2).mean(-1, True) + 1e-6).rsqrt() * x),
    "a product with itself": lambda m, x: m.gain * (x * ((x * x).mean(2, True) + 1e-3).rsqrt()),
    "a quotient": lambda m, x: x / (x.pow(2).mean(-1, True) + 1e-6).sqrt() * m.gain,
    "casts to its own dtype": transformers_casts,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form(name: str) -> None:
    gm = capture(Norm(FORMS[name]), X)
    RemoveNoOps().run(gm)  # the casts of a model in float32
    before, after = lifted(gm), lifted(gm)
    assert raise_norms(after) == 1
    assert_same_function(before, after, (X,), 1e-12)
    wanted = run(gm, X)
    assert raise_norms(gm) == 1
    assert targets(gm) == ["aten.mul.Tensor", "aten.rms_norm"]
    assert (run(gm, X) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert_vals(gm, X)


def test_golden() -> None:
    gm = capture(Norm(llama), X)
    assert raise_norms(gm) == 1
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%1: f32[batch, sequence, 8] = aten.mul.Tensor(%x, 2)
%2: f32[batch, sequence, 8] = aten.rms_norm(%1, [8], @gain, 1e-06)
return [%2]
""",
    )
    norm = next(op for op in ops_of(gm) if op.node.target is aten.rms_norm.default)
    assert norm.node.meta[BY] == ("raise-rms-norm",)


def test_two_norms_of_one_tensor_and_one_after_another() -> None:
    gm = capture(Norm(lambda m, x: llama(m, x) + llama(m, llama(m, x))), X)
    assert raise_norms(gm) == 3
    assert targets(gm).count("aten.rms_norm") == 3


# -- near misses


def eps_outside(m: Norm, x: Tensor) -> Tensor:
    return m.gain * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6))


def no_eps(m: Norm, x: Tensor) -> Tensor:
    return m.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


def read_square(m: Norm, x: Tensor) -> Tensor:
    square = x.pow(2)
    return m.gain * (x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6)) + square


def read_mean(m: Norm, x: Tensor) -> Tensor:
    mean = x.pow(2).mean(-1, keepdim=True)
    return m.gain * (x * torch.rsqrt(mean + 1e-6)) + mean


def read_shifted(m: Norm, x: Tensor) -> Tensor:
    shifted = x.pow(2).mean(-1, keepdim=True) + 1e-6
    return m.gain * (x * torch.rsqrt(shifted)) + shifted


def read_root(m: Norm, x: Tensor) -> Tensor:
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.gain * (x * root) + root


def read_normal(m: Norm, x: Tensor) -> Tensor:
    normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.gain * normal + normal


def over(m: Norm, x: Tensor, mean: Any, gain: Any = None) -> Tensor:
    return (m.gain if gain is None else gain) * (x * torch.rsqrt(mean + 1e-6))


NEAR = {
    "eps outside of the root": eps_outside,
    "no eps": no_eps,
    "an eps that is a tensor": lambda m, x: m.gain * (x * torch.rsqrt(x.pow(2).mean(-1, True) + m.other[0, 0])),
    "an eps that is scaled": lambda m, x: m.gain * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, True), 1e-6, alpha=2))),
    "another axis": lambda m, x: over(m, x, x.pow(2).mean(1, True)),
    "two axes": lambda m, x: over(m, x, x.pow(2).mean((-1, -2), True)),
    "no axis kept": lambda m, x: over(m, x[0, :1], x[0, :1].pow(2).mean(-1)),
    "a mean in another dtype": lambda m, x: over(m, x, x.pow(2).mean(-1, True, dtype=torch.float64).float()),
    "a sum": lambda m, x: over(m, x, x.pow(2).sum(-1, True)),
    "another power": lambda m, x: over(m, x, x.pow(4).mean(-1, True)),
    "a square of something else": lambda m, x: over(m, x, (x + 1).pow(2).mean(-1, True)),
    "a product with something else": lambda m, x: over(m, x, (x * (x + 1)).mean(-1, True)),
    "a quotient by its square": lambda m, x: m.gain * (x / (x.pow(2).mean(-1, True) + 1e-6).rsqrt()),
    "a root divided": lambda m, x: m.gain * ((x.pow(2).mean(-1, True) + 1e-6).sqrt() / x),
    "another reader of the square": read_square,
    "another reader of the mean": read_mean,
    "another reader of what is rooted": read_shifted,
    "another reader of the root": read_root,
    "another reader before the gain": read_normal,
    "no gain": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "a gain that is computed": lambda m, x: over(m, x, x.pow(2).mean(-1, True), m.gain + 1),
    "a gain of more axes": lambda m, x: over(m, x, x.pow(2).mean(-1, True), m.other),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    gm = capture(Norm(NEAR[name]), X)
    before = dump(gm)
    assert raise_norms(gm) == 0
    assert dump(gm) == before


def test_a_gain_of_one_element_for_a_wider_axis() -> None:
    assert raise_norms(capture(Norm(llama, width=1), X)) == 0


@pytest.mark.parametrize("f", [llama, transformers_casts])
def test_in_other_dtypes_it_rounds_where_the_op_does_not(f: Any) -> None:
    """Transformers casts up and back, and multiplies by the gain after that."""
    gm = capture(Norm(f).bfloat16(), X.bfloat16())
    RemoveNoOps().run(gm)
    assert raise_norms(gm) == 0


def test_a_gain_in_another_dtype() -> None:
    model = Norm(lambda m, x: m.gain * (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, True) + 1e-6)))
    assert raise_norms(capture(model, X)) == 0
    one = Norm(lambda m, x: llama(m, x.double()))
    assert raise_norms(capture(one, X)) == 0
