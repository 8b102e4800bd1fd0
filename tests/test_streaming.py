"""A checkpoint that is compiled tensor by tensor is, byte for byte, the one that is made in memory."""

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import graphq
from graphq.compiler import Compiled
from graphq.state import deferred_of, deferred_tensors
from tests.models import tiny

TARGET = "compressed-tensors"
W4 = {"graphq": 1, "weight": "int4/g32"}
EXPERT = {
    "graphq": 1,
    "rules": [{"match": "*", "weight": "int4/g32/mse"}, {"match": "*.experts.1.up_proj", "float": True}],
}
ALL = {
    "graphq": 1,
    "rules": [{"match": "*", "weight": "int4/asym/g32"}, {"match": "embed_tokens", "weight": "int8/channel"}],
}

TOKENS = [torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def saved(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    tiny(family, **options).to(dtype).save_pretrained(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def emitted(made: Compiled, folder: Path) -> dict[str, bytes]:
    made.emit(TARGET, folder, shard_bytes=40_000, consumer="any")
    return files_of(folder)


@pytest.mark.parametrize(
    ("family", "dtype", "options", "spec"),
    [
        ("llama", torch.bfloat16, {"num_hidden_layers": 1}, W4),
        ("llama", torch.bfloat16, {"num_hidden_layers": 1, "tie_word_embeddings": True}, ALL),
        ("llama", torch.float32, {"num_hidden_layers": 1}, {"graphq": 1, "weight": "int4/g32/hqq"}),
        ("mixtral", torch.bfloat16, {"num_hidden_layers": 1}, EXPERT),
        ("mixtral", torch.bfloat16, {"num_hidden_layers": 1}, {"graphq": 1, "weight": "int8/channel"}),
        pytest.param("opt", torch.bfloat16, {}, "w8a8", marks=pytest.mark.slow),
        pytest.param("opt", torch.bfloat16, {"tie_word_embeddings": False}, "w8a8", marks=pytest.mark.slow),
        pytest.param("llama", torch.bfloat16, {}, {"graphq": 1, "weight": "int8/channel/ssz"}, marks=pytest.mark.slow),
    ],
)
def test_the_same_files(family: str, dtype: torch.dtype, options: Any, spec: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family, dtype, **options)
    late = graphq.compile(folder, spec, target=TARGET, target_options={"consumer": "any"})
    assert deferred_tensors(late._graph)
    found = emitted(late, tmp_path / "late")
    assert deferred_tensors(late._graph)  # nothing was kept
    report = late.report
    assert not deferred_tensors(late.graph)  # from here on it is in memory
    assert emitted(late, tmp_path / "whole") == found
    assert late.report == report
    assert any(layer.sqnr_db for layer in report.layers)


def test_a_report_that_is_asked_for_first(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1)
    made = graphq.compile(folder, W4, target=TARGET)
    ratios = [layer.sqnr_db for layer in made.report.layers if layer.weight is not None]
    assert ratios
    assert None not in ratios
    assert not deferred_tensors(made.graph)
    tokens = torch.tensor([[1, 2, 3]])
    logits: Any = made(tokens)
    assert logits["logits"].shape == (1, 3, 128)
    made.emit("torch", tmp_path / "torch")  # another target than that it was compiled for
    again: Any = graphq.load(tmp_path / "torch")(tokens)
    assert torch.equal(again["logits"], logits["logits"])


@pytest.mark.parametrize(
    ("family", "algorithms"),
    [
        ("llama", ["gptq"]),
        ("llama", ["awq"]),
        pytest.param("mixtral", ["awq"], marks=pytest.mark.slow),
        pytest.param("llama", ["rotate", "gptq"], marks=pytest.mark.slow),
        pytest.param("opt", ["smooth-quant"], marks=pytest.mark.slow),
        pytest.param("llama", ["equalize"], marks=pytest.mark.slow),
    ],
)
def test_block_by_block(family: str, algorithms: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read for their block, and its codes wait in a file for being written."""
    folder = saved(tmp_path / "model", family)
    spec = {"graphq": 1, "weight": "int4/g32", "algorithms": [{name: {}} for name in algorithms]}
    options: dict[str, Any] = {"target": TARGET, "target_options": {"consumer": "any"}}
    options |= {"calibration": TOKENS} if algorithms != ["equalize"] else {}
    (tmp_path / "scratch").mkdir()
    late = graphq.compile(folder, spec, scratch_dir=tmp_path / "scratch", **options)
    held = late._graph.state_dict(keep_vars=True)
    assert [name for name, tensor in held.items() if tensor.numel() > 4096 and deferred_of(tensor) is None] == []
    found = emitted(late, tmp_path / "late")
    monkeypatch.setattr("graphq.compiler.why_whole", lambda *_: "asked for")
    assert ("graphq.choices" in found) == (algorithms in (["awq"], ["smooth-quant"]))
    whole = graphq.compile(folder, spec, **options)
    assert not deferred_tensors(whole._graph)
    assert emitted(whole, tmp_path / "whole") == found
    assert late.report == whole.report
    del late, held
    gc.collect()  # graphs are cycles
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_model_that_has_to_be_held_whole_and_does_not_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1)
    gptq = W4 | {"algorithms": [{"gptq": {}}]}
    for spec, target, line in (
        (W4 | {"input": "int8/tensor"}, TARGET, "static scales without an algorithm are calibrated on the whole model"),
        (gptq, "torch", "gptq: only a checkpoint (target=) is written block by block"),
    ):
        with pytest.raises(
            graphq.SpecError, match="^" + re.escape(f"memory: {line}, which holds the whole model: 1 MiB")
        ):
            graphq.compile(folder, spec, target=target, calibration=TOKENS, memory="50KB")
    with pytest.raises(graphq.SpecError, match="memory: '2 pages' is not a size"):
        graphq.compile(folder, W4, memory="2 pages")
