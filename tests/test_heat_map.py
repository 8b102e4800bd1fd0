"""Layers are put where they belong, and what stands in one place is added up."""

import sys

import pytest
import torch
from expecttest import assert_expected_inline

import graphq
from graphq.errors import GraphqError
from graphq.heat_map import heat_map, place_of
from tests.models import Blocks, tiny


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers.3", "mlp.up_proj")),
        ("model.layers.3.mlp.experts.17.up_proj", ("model.layers.3", "mlp.experts.*.up_proj")),
        ("layer1.0.conv2", ("layer1.0", "conv2")),
        ("lm_head", ("model", "lm_head")),
        ("model.embed_tokens", ("model", "embed_tokens")),
        ("classifier.1", ("classifier", "1")),
        ("h.2.c2.w3", ("h.2", "c2.w3")),
    ],
)
def test_places(layer, place):
    assert place_of(layer) == place


def row(layer, weight: str | None = "int4/g32", nbytes=10, shape=(4, 8), sqnr=None):
    return {
        "layer": layer,
        "weight": None if weight is None else {"text": weight},
        "input": None,
        "bytes": nbytes,
        "float_bytes": 64,
        "shape": list(shape),
        "sqnr_db": sqnr,
    }


def test_experts_of_a_block_are_one_cell():
    found = heat_map(
        [row(f"a.0.experts.{i}.up", sqnr=20.0 + i) for i in range(3)] + [row("a.0.experts.3.up", None, 64)]
    )
    (cell,) = found.cells.values()
    assert (cell.layers, cell.nbytes, cell.float_nbytes, cell.sqnr_db) == (4, 94, 256, 20)
    assert cell.bits == 8 * 94 / 128
    assert cell.plans == ("int4/g32", "float")
    assert not cell.is_float


def test_a_models_report():
    model = tiny("llama")
    spec = {"graphq": 1, "weight": "int4/g32", "rules": [{"match": "down_proj", "weight": "int8/channel", "input": "int8/token/dynamic"}]}  # fmt: skip
    found = heat_map(graphq.explain(model, spec).rows())
    lines = [
        f"{found.rows[i]} {found.columns[j]}: {cell.bits:g} bits, {', '.join(cell.plans)}"
        for (i, j), cell in sorted(found.cells.items())
        if i in (0, 1)
    ]
    assert_expected_inline("\n".join(lines), """\
model embed_tokens: 32 bits, float
model lm_head: 32 bits, float
model.layers.0 self_attn.q_proj: 5 bits, int4/g32
model.layers.0 self_attn.k_proj: 5 bits, int4/g32
model.layers.0 self_attn.v_proj: 5 bits, int4/g32
model.layers.0 self_attn.o_proj: 5 bits, int4/g32
model.layers.0 mlp.gate_proj: 5 bits, int4/g32
model.layers.0 mlp.up_proj: 5 bits, int4/g32
model.layers.0 mlp.down_proj: 8.33333 bits, int8/channel x int8/token/dynamic""")  # fmt: skip


def test_a_plot_has_three_maps():
    pytest.importorskip("matplotlib")
    report = graphq.compile(tiny("llama"), {"graphq": 1, "weight": "int4/g32"}).report
    figure = report.plot()
    maps = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title() for axes in maps] == ["bits a weight", "SQNR, dB", "MB"]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["model", "model.layers.0", "model.layers.1"]
    shown = maps[0].get_images()[0].get_array()
    assert float(shown[1, 2]) == 8 * 2.5 / 4 == 5
    assert bool(shown.mask[1, 0])


def test_a_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = graphq.explain(Blocks(), {"graphq": 1, "weight": "int4/channel"}, inputs=torch.ones(2, 8))
    with pytest.raises(GraphqError, match=r"pip install 'graphq\[plots\]'"):
        report.plot()
