"""The exporter's table of translations is made once a process, and no export changes another's."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.onnx._internal.exporter import _registration as registration

from graphq.lowering.onnx import emit as onnx
from graphq.lowering.onnx import torchlib
from graphq.lowering.onnx.torchlib import kept_translations
from tests.models import MLP, capture

relu: Any = torch.ops.aten.relu.default


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One for each time that the translations are made; none are kept before."""
    made: list[str] = []
    apis = cast(Any, registration).onnxscript_apis
    read = apis.get_torchlib_ops

    def spy() -> Any:
        made.append("made")
        return read()

    monkeypatch.setattr(apis, "get_torchlib_ops", spy)
    torchlib._table.cache_clear()
    return made


def table(opset: int) -> Any:
    return registration.ONNXRegistry().from_torchlib(opset_version=opset)


def test_two_exports_make_them_once(calls: list[str], tmp_path: Path) -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    before = FakeTensorMode.cache_misses
    for name in ("a", "b"):
        onnx.emit(gm, tmp_path / name, {})
    assert calls == ["made"]
    assert FakeTensorMode.cache_misses == before
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_the_kept_ones_are_those_of_their_opset(calls: list[str]) -> None:
    for opset in (18, 23):
        own = table(opset)
        with kept_translations():
            kept = table(opset)
        assert type(kept) is type(own)
        assert kept.opset_version == own.opset_version == opset
        assert {op: [str(t.onnx_function) for t in found] for op, found in kept.functions.items()} == {
            op: [str(t.onnx_function) for t in found] for op, found in own.functions.items()
        }
    assert len(calls) == 4  # outside each is made anew


def test_what_one_export_adds_the_next_does_not_see(calls: list[str]) -> None:
    with kept_translations():
        first = table(18)
        count = len(first.get_decomps(relu))
        first.register_op(relu, lambda x: x)
        assert len(first.get_decomps(relu)) == count + 1
        assert len(table(18).get_decomps(relu)) == count
    assert calls == ["made"]


def test_after_an_error_each_is_made_anew(calls: list[str]) -> None:
    with pytest.raises(KeyError), kept_translations():
        raise KeyError
    assert table(18).functions
    assert table(18).functions
    assert len(calls) == 2
