"""Models with states through whole compiles: artifacts that are loaded again read texts and generate as the graph does."""

from pathlib import Path
from typing import Any

import pytest
import torch

import graphq
from graphq.capture.source import source_of
from graphq.lowering.torch.module import load
from graphq.runtime.onnx_session import OnnxSession
from graphq.runtime.stepping import read_text
from tests.family_models import FAMILIES, text

BY_NAME = {one.name: one for one in FAMILIES}
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(
    "family", ["lfm2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3.5", "mamba2", "falcon-h1"))]
)
def test_artifacts(family: str, tmp_path: Path) -> None:
    compiled = graphq.compile(BY_NAME[family].build(), "w8a8")
    source = source_of(compiled.graph)
    ids, mask = text(2, 6), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        wanted = read_text(source, lambda one: compiled.graph(*one), {"input_ids": ids})["logits"]

    compiled.save(tmp_path / "torch")
    loaded = load(tmp_path / "torch")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, atol=1e-4, rtol=1e-3)
    tokens = loaded.generate(ids, attention_mask=mask, **OPTIONS)
    assert tokens.shape == (2, 11)

    compiled.emit("onnx", tmp_path / "onnx")
    session = OnnxSession(tmp_path / "onnx" / "model.onnx", source)
    found: Any = session(ids)
    torch.testing.assert_close(found.logits, wanted, atol=1e-4, rtol=1e-3)
    first: Any = session(ids[:, :2])
    rest: Any = session(ids[:, 2:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, wanted[:, 2:], atol=1e-4, rtol=1e-3)
