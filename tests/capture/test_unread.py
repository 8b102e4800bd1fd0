"""A directory whose weights stay in their files compiles to what it compiles to when they are loaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphq
from graphq.capture.hugging_face import capture_directory
from graphq.capture.source import source_of
from graphq.capture.unread import capture_unread, read_all
from graphq.compiler import Compiled
from graphq.deferred import InFile
from graphq.ir.text import dump
from graphq.state import deferred_tensors, tensor_of
from tests.models import tiny
from tests.shared_captures import captured_once

W4: dict[str, Any] = {"graphq": 1, "weight": "int4/asym/g32"}


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A directory of one or two blocks, in 16 bits if not said otherwise."""
    one = {"num_hidden_layers": 1} if family == "llama" else {}
    tiny(family, **one, **options).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _captured_once() -> Iterator[None]:
    """Loaded models share their exports, and unread ones theirs."""
    with captured_once(apart=True):
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read, as often as they are."""
    names: list[str] = []
    read = InFile.read

    def counted(self: InFile) -> torch.Tensor:
        names.append(self.key)
        return read(self)

    monkeypatch.setattr(InFile, "read", counted)
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
    assert not deferred_tensors(a.graph)


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3", "mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in ("deepseek", "opt", "gpt2"))],
)
def test_the_same_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    """gemma3 and opt tie their head to the embedding, gpt2 stores buffers and transposes, mixtral and deepseek have
    experts, which files hold one by one.
    """
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


@pytest.mark.parametrize("target", [None, "compressed-tensors"])
def test_each_tensor_is_read_once(llama: Path, target: str | None, tmp_path: Path, reads: list[str]) -> None:
    made = graphq.compile(llama, W4, target=target)
    if target is not None:
        assert sorted(reads) == sorted(name for name in load_file(llama / "model.safetensors") if "norm" in name)
        made.emit(target, tmp_path / "out")
    assert sorted(reads) == sorted(load_file(llama / "model.safetensors"))


def test_what_needs_all_weights_loads_them(llama: Path, reads: list[str]) -> None:
    tokens = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    graphq.compile(llama, {"graphq": 1, "weight": "int8/channel", "input": "int8/tensor"}, calibration=[tokens])
    graphq.compile(llama, W4 | {"algorithms": [{"rotate": {}}]})
    capture_directory(llama)
    assert reads == []


def test_read_anew_at_each_use(llama: Path) -> None:
    gm = capture_unread(llama, torch.float32)
    assert gm is not None
    name = "lm_head.weight"
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
        {"model.norm.weight": torch.full((64,), 1 + 2.0**-12)},  # of a dtype that bfloat16 does not hold
        {"lm_head.weight": torch.full((128, 64), 1 + 2.0**-12)},
        {"model.extra.weight": torch.ones(3, dtype=torch.bfloat16)},
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},  # which no one misses
    ],
)
def test_directories_with_other_tensors(
    tmp_path: Path, tensors: dict[str, Any], monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    folder = saved(tmp_path)
    change(folder, **tensors)
    found = graphq.compile(folder, W4)
    assert reads
    assert_same(found, loaded(folder, W4, monkeypatch))


def test_a_dtype_that_is_not_read_is_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change(folder, **{"lm_head.weight": torch.ones(128, 64, dtype=torch.float64)})
    assert capture_unread(folder, torch.float32) is None


def test_what_is_missing_or_misshapen_is_said_by_the_loader(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change(folder, **{"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)})
    with pytest.raises(graphq.GraphError, match="1 of another shape"):
        graphq.compile(folder, W4)
    change(folder, **{"model.norm.weight": None})
    with pytest.raises(graphq.GraphError, match="1 missing"):
        graphq.compile(folder, W4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configurations_without_a_dtype(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, dtype=dtype)
    assert_same(graphq.compile(folder, W4), loaded(folder, W4, monkeypatch))
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(graphq.compile(folder, W4), loaded(folder, W4, monkeypatch))


def test_experts_in_one_file_as_a_stack(tmp_path: Path) -> None:
    """As transformers holds them, not as it saves them."""
    model = tiny("mixtral")
    folder = saved(tmp_path, "mixtral")
    (folder / "model.safetensors").unlink()
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    gm = capture_unread(folder, torch.float32)
    assert gm is not None
    for name, deferred in deferred_tensors(gm).items():
        assert torch.equal(deferred.read(), state[name].float()), name
        if name.endswith("experts.down_proj"):
            assert torch.equal(deferred.member(1).read(), state[name][1].float())


@pytest.mark.parametrize("where", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("target", [None, "compressed-tensors"])
def test_numbers_that_are_none_are_named(tmp_path: Path, where: str, target: str | None) -> None:
    folder = saved(tmp_path / "model")
    held = load_file(folder / "model.safetensors")[where]
    held[1, 2] = torch.nan
    change(folder, **{where: held})
    with pytest.raises(graphq.GraphError, match=f"{where.removesuffix('.weight')}.* holds NaN or Inf"):
        graphq.compile(folder, W4, target=target).emit("compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
