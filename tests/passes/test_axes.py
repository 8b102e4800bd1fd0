"""Every algorithm on layers whose inputs have no batches: convolutions of one image, linears of one vector."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq

ALGORITHMS: list[Any] = [
    *({"smooth-quant": {"where": where}} for where in ("fold", "multiply")),
    *("gptq", "awq", {"awq": {"where": "multiply"}}, {"awq": {"power": 4}}, "correct-bias", "equalize"),
    {"auto-round": {"steps": 3}},
]


class OneImage(nn.Module):
    """Convolutions of the mean of a batch."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), second

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3), keepdim=True) + self.second(self.first(x.mean(0)).relu())[None]


class OneVector(nn.Module):
    """Linears of a learned vector, beside one of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(16))
        self.first, self.second, self.gate = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.second(self.first(self.query).relu())


class OneSignal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 4, 3, padding="same"), nn.Conv1d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2), keepdim=True) + self.second(self.first(x.mean(0)).relu())[None]


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "as many rows as channels": (lambda: OneImage(nn.Conv2d(4, 5, 3)), (3, 4, 4, 6)),
    "more rows than channels": (lambda: OneImage(nn.Conv2d(4, 5, 3)), (3, 4, 7, 6)),
    "groups": (lambda: OneImage(nn.Conv2d(4, 8, 3, groups=2, padding="same")), (3, 4, 7, 6)),
    "depthwise": (lambda: OneImage(nn.Conv2d(4, 4, 3, groups=4)), (3, 4, 4, 6)),
    "one axis": (OneSignal, (3, 4, 9)),
    "vectors": (OneVector, (3, 16)),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_without_batches(name: str, algorithm: Any) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().eval()
    x = torch.randn(shape)
    x[:, 1] *= 8
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/tensor", "algorithms": [algorithm]}
    with torch.no_grad():
        made, wanted = graphq.compile(model, spec, inputs=x, calibration=[x])(x), model(x)
    # 2 %: what 8 bits leave of weights and inputs; a factor of a wrong axis is off by more than 50 %.
    assert (made - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("input", ["int8/asym/tensor", "int8/token/dynamic", "int8/tensor/ofmr"])
def test_vectors_in_every_input_format(input: str) -> None:
    torch.manual_seed(0)
    model, x = OneVector().eval(), torch.randn(3, 16)
    with torch.no_grad():
        spec = {"graphq": 1, "weight": "int8/channel", "input": input}
        made, wanted = graphq.compile(model, spec, inputs=x, calibration=[x])(x), model(x)
    assert (made - wanted).norm() <= 0.02 * wanted.norm()


def test_images_with_ofmr() -> None:
    torch.manual_seed(0)
    model, x = OneImage(nn.Conv2d(4, 5, 3)).eval(), torch.randn(3, 4, 4, 6)
    spec = {"graphq": 1, "weight": "int8/channel/ofmr", "input": "int8/tensor"}
    with torch.no_grad():
        made, wanted = graphq.compile(model, spec, inputs=x, calibration=[x])(x), model(x)
    assert (made - wanted).norm() <= 0.02 * wanted.norm()
