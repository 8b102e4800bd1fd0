"""What is computed in integers of what is known before a model runs, and what in float of inputs that are integers."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.ir.test_grids import layer, placed, row, table


class Queries(nn.Module):
    """What is looked for in x is a table, in front of which stands a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.linear(self.table).tanh()
        return queries.softmax(-1) @ x.mT


def test_what_layers_make_of_constants_is_computed_in_integers() -> None:
    profile = table(Linear=layer(), Tanh=row(), Softmax=row(), MatMul=row(), Transpose=row("same"))
    assert_expected_inline(
        placed(profile, Queries(), torch.randn(2, 3, 4)),
        """\
x -> m_t  grid 0: uint8/tensor  x.value
table -> linear  grid 1: uint8/tensor  table.value
linear -> all  grid 2: uint8/tensor  linear.output
tanh -> all  grid 3: uint8/tensor  Tanh.output
softmax -> all  grid 4: uint8/tensor  Softmax.output
m_t -> all  grid 0: uint8/tensor moved  Transpose.output
matmul -> all  grid 5: uint8/tensor  MatMul.output
""",
    )


class Rotated(nn.Module):
    """x turned by angles that are made of positions, which are integers."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.to(x.dtype)[:, :, None] * 0.25
        return x * angles.cos() + angles


def test_what_is_made_of_integers_for_ops_in_float_stays_float() -> None:
    """The angles, of which a cosine is taken, in float; not where something in integers reads them, too."""
    x, positions = torch.randn(2, 3, 4), torch.arange(3).repeat(2, 1)
    profile = table(Mul=row(), Add=row(), Unsqueeze=row("same"))
    both = placed(profile, Rotated(), x, positions)
    assert "mul -> all" in both

    class Cosine(Rotated):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return x * (positions.to(x.dtype)[:, :, None] * 0.25).cos()

    assert_expected_inline(
        placed(profile, Cosine(), x, positions),
        """\
x -> mul_1  grid 0: uint8/tensor  x.value
cos -> mul_1  grid 1: uint8/tensor  cos.output
mul_1 -> all  grid 2: uint8/tensor  Mul.output
""",
    )
