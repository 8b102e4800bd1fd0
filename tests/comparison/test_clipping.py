"""What is clipped is what lies beyond a format's outermost values by more than half the step there."""

import pytest
import torch
from expecttest import assert_expected_inline

from graphq.comparison.clipping import clipped, edges
from graphq.numerics.codes import code_values
from graphq.runtime import ops
from graphq.spec.formats import parse_format

FORMATS = ("int4", "int8", "uint8", "float8_e4m3fn", "float8_e5m2", "mxfp4", "mxint8", "nvfp4")


def test_edges_of_every_format():
    lines: list[str] = []
    for format in FORMATS:
        codes = torch.tensor(edges(format))
        held = codes.to(torch.int8 if codes.min() < 0 else torch.uint8)
        lines.append(f"{format}: {code_values(held, parse_format(format)).tolist()}")
    assert_expected_inline(
        "\n".join(lines),
        """\
int4: [-8.0, -7.0, 6.0, 7.0]
int8: [-128.0, -127.0, 126.0, 127.0]
uint8: [0.0, 1.0, 254.0, 255.0]
float8_e4m3fn: [-448.0, -416.0, 416.0, 448.0]
float8_e5m2: [-57344.0, -49152.0, 49152.0, 57344.0]
mxfp4: [-6.0, -4.0, 4.0, 6.0]
mxint8: [-1.984375, -1.96875, 1.96875, 1.984375]
nvfp4: [-6.0, -4.0, 4.0, 6.0]""",
    )


@pytest.mark.parametrize(
    ("format", "scale", "inside", "beyond"),
    [
        ("int8", 0.5, (63.7, -64.2), (63.8, -64.3)),
        ("int8/asym", 0.5, (62.2, -65.7), (62.3, -65.8)),
        ("float8_e4m3fn", 2.0, (927.0, -927.0), (929.0, -929.0)),
    ],
)
def test_half_a_step_beyond_the_last_value(format, scale, inside, beyond):
    zero_point = torch.tensor(3, dtype=torch.int8) if format.endswith("asym") else None
    arguments = (torch.tensor(scale), zero_point, None, format, [-1])
    x = torch.tensor([*inside, *beyond, 0.1, float("nan"), float("inf")])
    codes = ops.quantize(x, *arguments)
    assert clipped(x, codes, arguments).tolist() == [False, False, True, True, False, True, True]
