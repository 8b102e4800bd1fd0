"""Bags of embeddings of known sizes in ONNX: a Gather and a reduction, the same rows."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

import graphq
from graphq.ir.text import dump
from graphq.lowering.onnx.bags import spell_bags
from tests.graphs import assert_vals, run, targets
from tests.lowering.onnx import sessions
from tests.models import capture

IDS = torch.randint(0, 9, (3, 4), generator=torch.Generator().manual_seed(1))
ONE = torch.randint(0, 9, (2, 7), generator=torch.Generator().manual_seed(2)).float()  # whose second axis is fixed


class Bag(nn.Module):
    """Rows of a table, as ``call`` puts them into bags; ``offsets`` are its own."""

    offsets: Tensor

    def __init__(self, call: Any, *offsets: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 8, dtype=torch.float64))
        self.register_buffer("offsets", torch.tensor(offsets))
        self.call = call

    def forward(self, ids: Tensor) -> Tensor:
        return self.call(self, ids)


def of_rows(mode: str, **options: Any) -> Any:
    return lambda m, ids: F.embedding_bag(ids, m.table, mode=mode, **options)


def of_offsets(mode: str, *offsets: int, **options: Any) -> Bag:
    return Bag(lambda m, ids: F.embedding_bag(ids[0].long(), m.table, m.offsets, mode=mode, **options), *offsets)


def weighted(m: Bag, ids: Tensor) -> Tensor:
    return F.embedding_bag(ids, m.table, mode="sum", per_sample_weights=m.table[ids, 0])


def weighted_offsets(m: Bag, ids: Tensor) -> Tensor:
    return F.embedding_bag(ids[0].long(), m.table, m.offsets, mode="sum", per_sample_weights=m.table[ids[0].long(), 0])


SPELLED: dict[str, tuple[Bag, Tensor]] = {
    "sum": (Bag(of_rows("sum")), IDS),
    "mean": (Bag(of_rows("mean")), IDS),
    "max": (Bag(of_rows("max")), IDS),
    "weights": (Bag(weighted), IDS),
    "bags of one": (Bag(of_rows("max")), IDS[:, :1]),
    "offsets, sum": (of_offsets("sum", 0, 2, 3), ONE),
    "offsets, mean": (of_offsets("mean", 0, 5), ONE),
    "offsets, max": (of_offsets("max", 0, 1, 2), ONE),
    "offsets with the last": (of_offsets("mean", 0, 4, 7, include_last_offset=True), ONE),
    "offsets, weights": (Bag(weighted_offsets, 0, 3), ONE),
}


@pytest.mark.parametrize("name", SPELLED)
def test_the_same_function(name: str) -> None:
    model, ids = SPELLED[name]
    gm = capture(model, ids)
    wanted = run(gm, ids)
    assert spell_bags(gm) == 1
    assert not [target for target in targets(gm) if "bag" in target or "arange" in target]
    assert (run(gm, ids) - wanted).abs().max() <= 1e-12
    assert_vals(gm, ids)
    assert spell_bags(gm) == 0


def parts(m: Bag, ids: Tensor) -> Tensor:
    """Bags of two out of a table of rows of four."""
    flat = ids.reshape(-1)
    return F.embedding_bag(flat, m.table, torch.arange(0, flat.numel(), 2), mode="sum")


def late(m: Bag, ids: Tensor) -> Tensor:
    return F.embedding_bag(ids.reshape(-1), m.table, torch.arange(ids.shape[0]) * ids.shape[1], mode="sum")


KEPT: dict[str, tuple[Bag, Tensor]] = {
    "indices that count for nothing": (Bag(of_rows("sum", padding_idx=2)), IDS),
    "bags of parts of rows": (Bag(parts), IDS),
    "offsets that are computed": (Bag(late), IDS),
    "an empty bag": (of_offsets("sum", 0, 2, 2), ONE),
    "an empty last bag": (of_offsets("mean", 0, 7), ONE),
    "indices of unknown number": (
        Bag(lambda m, ids: F.embedding_bag(ids.reshape(-1), m.table, m.offsets, mode="sum"), 0, 1),
        IDS,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_near_misses(name: str) -> None:
    model, ids = KEPT[name]
    gm = capture(model, ids)
    before = dump(gm)
    assert spell_bags(gm) == 0
    assert dump(gm) == before


def test_golden() -> None:
    gm = capture(Bag(weighted), IDS)
    assert spell_bags(gm) == 1
    assert_expected_inline(
        dump(gm),
        """\
%ids: i64[batch, 4] = input
%1: f64[9] = aten.select.int(@table, 1, 0)
%2: f64[batch, 4] = aten.index.Tensor(%1, [%ids])
%3: f64[4*batch] = aten.reshape(%2, [-1])
%4: f64[batch, 4, 8] = aten.embedding(@table, %ids)
%5: f64[batch, 4, 1] = aten.reshape(%3, [-1, 4, 1])
%6: f64[batch, 4, 8] = aten.mul.Tensor(%4, %5)
%7: f64[batch, 8] = aten.sum.dim_IntList(%6, [1], False)
return [%7]
""",
    )


def test_a_file_has_no_loop(tmp_path: Path) -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 16, mode="mean"), nn.Linear(16, 4)).eval()
    rules = [{"match": "0", "weight": "int8/channel"}]
    compiled = graphq.compile(model, {"graphq": 1, "rules": rules}, inputs=IDS)
    compiled.emit("onnx", tmp_path / "onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node]
    assert kinds == ["DequantizeLinear", "Gather", "ReduceMean", "Transpose", "MatMul", "Add"]
    (found,), _ = sessions.run(tmp_path / "onnx", IDS)
    assert (found - compiled.graph(IDS)[0]).abs().max() <= 1e-6
