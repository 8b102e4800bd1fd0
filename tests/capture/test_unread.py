"""A directory whose weights stay in their files compiles to what it compiles to when they are loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphq
from graphq.capture import unread
from graphq.capture.hugging_face import capture_directory
from graphq.capture.source import source_of
from graphq.capture.unread import capture_unread, read_all
from graphq.compiler import Compiled
from graphq.ir.text import dump
from graphq.state import UNREAD, tensor_of
from tests.models import tiny

W4: dict[str, Any] = {"graphq": 1, "weight": "int4/asym/g32"}


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A directory of one or two blocks in 16 bits."""
    one = {"num_hidden_layers": 1} if family == "llama" else {}
    tiny(family, **one, **options).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read, as often as they are."""
    names: list[str] = []
    call = unread._Reader.__call__

    def counted(self: Any) -> Any:
        names.append(self.place[1])
        return call(self)

    monkeypatch.setattr(unread._Reader, "__call__", counted)
    return names


def loaded(folder: Path, spec: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Compiled:
    """As it was compiled when transformers loaded it."""
    with monkeypatch.context() as patch:
        patch.setattr("graphq.compiler.capture_unread", lambda *_: None)
        return graphq.compile(folder, spec, **options)


def assert_same(a: Compiled, b: Compiled) -> None:
    """The same graph of the same tensors, the same report."""
    assert dump(a.graph) == dump(b.graph)
    ours, theirs = (c.graph.state_dict(keep_vars=True) for c in (a, b))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert type(tensor) is type(theirs[name])
        assert torch.equal(tensor, theirs[name])
        assert tensor.dtype == theirs[name].dtype
    assert source_of(a.graph) == source_of(b.graph)
    assert a.report == b.report
    assert UNREAD not in a.graph.meta


@pytest.mark.parametrize("family", ["llama", "gemma3", pytest.param("opt", marks=pytest.mark.slow)])
def test_the_same_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    """gemma3 and opt tie their head to the embedding; gemma3's gains are folded, for which all weights are read."""
    folder = saved(tmp_path, family)
    found = graphq.compile(folder, W4)
    count = len(reads)
    assert_same(found, loaded(folder, W4, monkeypatch))
    assert len(reads) == count > 0
    head = ("lm_head.weight", "model.embed_tokens.weight")
    held = found.graph.state_dict(keep_vars=True)
    if family == "gemma3":
        assert held[head[0]].data_ptr() == held[head[1]].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_in_a_dtype_that_is_asked_for(llama: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(graphq.compile(llama, W4, dtype=dtype), loaded(llama, W4, monkeypatch, dtype=dtype))


def test_tied_weights_that_are_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    folder = saved(tmp_path, tie_word_embeddings=True)
    for match in ("*", "lm_head"):
        spec = {"graphq": 1, "rules": [{"match": match, "weight": "int8/channel"}]}
        reads.clear()
        found = graphq.compile(folder, spec)
        assert reads
        assert_same(found, loaded(folder, spec, monkeypatch))
        held = found.graph.state_dict(keep_vars=True)
        head, table = held["lm_head.weight"], held["model.embed_tokens.weight"]
        assert (head.data_ptr() == table.data_ptr()) == (match == "*")


def test_a_weight_is_read_when_it_is_used(llama: Path, reads: list[str]) -> None:
    """Once to be checked, once to be rounded or held."""
    graphq.compile(llama, W4)
    names = load_file(llama / "model.safetensors").keys()
    assert {name: reads.count(name) for name in names} == dict.fromkeys(names, 2)


def test_what_needs_all_weights_loads_them(llama: Path, reads: list[str]) -> None:
    tokens = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    graphq.compile(llama, {"graphq": 1, "weight": "int8/channel", "input": "int8/tensor"}, calibration=[tokens])
    graphq.compile(llama, W4 | {"algorithms": [{"rotate": {}}]})
    capture_directory(llama)
    assert reads == []


def test_read_anew_at_each_use(llama: Path) -> None:
    gm = capture_unread(llama, torch.float32)
    assert gm is not None
    name = "model.norm.weight"
    first = tensor_of(gm, name)
    assert isinstance(first, nn.Parameter)
    assert not first.requires_grad
    with torch.no_grad():
        first.fill_(7)
    stored = load_file(llama / "model.safetensors")
    assert torch.equal(tensor_of(gm, name), stored[name].float())
    read_all(gm)
    assert torch.equal(tensor_of(gm, name), stored[name].float())
    read_all(gm)


def test_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    tiny("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(graphq.compile(tmp_path, W4), loaded(tmp_path, W4, monkeypatch))
    assert reads


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """The directory with these tensors; None: without one."""
    file = folder / "model.safetensors"
    held: dict[str, Any] = load_file(file) | tensors
    save_file({k: v for k, v in held.items() if v is not None}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.norm.weight": torch.ones(64)},  # of another dtype
        {"model.extra.weight": torch.ones(3, dtype=torch.bfloat16)},
    ],
)
def test_other_directories_are_loaded(
    tmp_path: Path, tensors: dict[str, Any], monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    folder = saved(tmp_path)
    change(folder, **tensors)
    assert_same(graphq.compile(folder, W4), loaded(folder, W4, monkeypatch))
    assert reads == []


def test_what_is_missing_or_misshapen_is_said_by_the_loader(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change(folder, **{"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)})
    with pytest.raises(graphq.GraphError, match="1 of another shape"):
        graphq.compile(folder, W4)
    change(folder, **{"model.norm.weight": None})
    with pytest.raises(graphq.GraphError, match="1 missing"):
        graphq.compile(folder, W4)


def test_float_checkpoints_and_configurations_without_a_dtype_are_loaded(tmp_path: Path) -> None:
    assert capture_unread(saved(tmp_path / "float", dtype=torch.float32), torch.float32) is None
    folder = saved(tmp_path / "none")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert capture_unread(folder, torch.float32) is None


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_models_whose_parameters_passes_make_are_loaded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    """Experts are split and stacked, buffers are stored."""
    folder = saved(tmp_path, family)
    found = graphq.compile(folder, W4)
    if family == "mixtral":
        assert reads == []
    assert_same(found, loaded(folder, W4, monkeypatch))
