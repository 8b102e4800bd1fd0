"""Which input of a captured model is its mask."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.artifacts.manifest import source_from_json, source_json
from graphq.capture.modules import capture_module
from graphq.capture.source import SEQUENCE, source_of
from graphq.compiler import capture
from graphq.data.batches import complete
from graphq.data.masks import masked_batch
from graphq.errors import PassError, SpecError
from tests.models import captured, tiny

IDS, MASK = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


class Masked(nn.Module):
    """A linear on rows of an embedding, and 0 where there is no token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, pad_mask: Tensor) -> Tensor:
        return self.linear(self.embedding(ids)) * pad_mask.unsqueeze(-1)


@pytest.mark.parametrize(("family", "mask"), [("llama", "attention_mask"), ("bert", "attention_mask"), ("vit", None)])
def test_transformers_models_say_it_themselves(family: str, mask: str | None) -> None:
    source = source_of(captured(family))
    assert source.mask == mask
    assert source_from_json(source_json(source)).mask == mask


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()])
def test_a_module_is_told(mask: Tensor) -> None:
    source = source_of(capture_module(Masked(), (IDS, mask), mask="pad_mask"))
    assert source.mask == "pad_mask"
    assert source.notes == ()
    ids, itself = masked_batch(source, complete(source, (IDS, mask))).validity
    assert ids.mask is not None
    assert torch.equal(ids.mask, MASK.bool())
    assert itself.is_trivial
    assert torch.equal(complete(source, IDS)[1], torch.ones(2, 5, dtype=mask.dtype))  # left out: all are tokens


def test_a_mask_that_is_not_declared_is_noted() -> None:
    gm = capture_module(Masked(), (IDS, MASK))
    source = source_of(gm)
    assert source.mask is None
    assert source.notes == (
        "pad_mask: is not declared as the mask of padding: all tokens calibrate (compile takes mask='pad_mask')",
    )
    assert masked_batch(source, (IDS, MASK)).is_trivial


def test_masks_that_are_none() -> None:
    with pytest.raises(SpecError, match=r"^mask: the model has no input padmask; it takes ids, pad_mask$"):
        graphq.compile(Masked(), "w8a8", inputs=(IDS, MASK), mask="padmask")
    wide = MASK[:, None, None, :]
    with pytest.raises(SpecError, match=r"^mask: pad_mask has shape \(2, 1, 1, 5\); a mask of tokens is \(batch, toke"):
        capture_module(Masked(), (IDS, wide), mask="pad_mask")
    with pytest.raises(SpecError, match=r"^mask: input_ids: this model's mask is attention_mask$"):
        capture(tiny("bert"), mask="input_ids")
    with pytest.raises(SpecError, match=r"^mask: pixel_values: this model takes no mask$"):
        capture(tiny("vit"), mask="pixel_values")
    assert source_of(capture(tiny("bert"), mask="attention_mask")).mask == "attention_mask"


class ChannelsFirst(nn.Module):
    """A convolution of one column along tokens, which are the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.conv(x) * mask.unsqueeze(1)


class Waves(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


@pytest.mark.parametrize(("model", "shape", "axis"), [(ChannelsFirst(), (2, 3, 5), 2), (Waves(), (2, 5), 1)])
def test_tokens_are_found_where_the_mask_has_as_many(model: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    x = torch.ones(shape)
    source = source_of(capture_module(model, (x, MASK), mask="mask"))
    assert source.inputs[0].shape[axis] == SEQUENCE
    assert source.notes == ()
    found, _ = masked_batch(source, complete(source, (x, MASK))).validity
    assert found.mask is not None
    assert torch.equal(found.mask, (MASK.bool() if x.dim() == 2 else MASK.bool()[:, None]).expand(shape))


def test_as_many_channels_as_tokens_are_noted() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    notes = source_of(capture_module(ChannelsFirst(), (torch.ones(2, 3, 3), mask), mask="mask")).notes
    assert notes[-1] == "x: dimensions 1 and 2 are as large as mask: dimension 1 is taken for its tokens"


def test_a_mask_that_reaches_no_input() -> None:
    class Apart(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask.sum(1)[:, None, None]

    nine = torch.ones(2, 9, dtype=torch.int64)
    expected = r"^mask: no input has the 9 tokens of mask \(2, 9\); there are x \(2, 6, 8\)$"
    with pytest.raises(SpecError, match=expected):
        capture_module(Apart(), (torch.ones(2, 6, 8), nine), mask="mask")
    with pytest.raises(SpecError, match=r"^mask: no input has the 5 tokens of input \(2, 5\); there is no other$"):
        capture_module(nn.Embedding(16, 8), IDS, mask="input")


@pytest.mark.parametrize(("name", "mask"), [("ids", MASK), ("pad_mask", (MASK - 1.0) * 1e9)])
def test_an_input_of_other_numbers_is_no_mask(name: str, mask: Tensor) -> None:
    with pytest.raises(
        SpecError, match=rf"^mask: {name} holds -?\S+; a mask is 1 where a token counts and 0 elsewhere"
    ):
        capture_module(Masked(), (IDS, mask), mask=name)


def test_explain_and_compare_take_the_mask() -> None:
    given: dict[str, Any] = {"inputs": (IDS, MASK), "mask": "pad_mask", "cache": False}
    assert not any("declared" in note for note in graphq.explain(Masked(), "w8a8", **given).notes)
    assert "linear" in str(graphq.compare(Masked(), "w8a8", "w8a16", **given, dialect="native"))
    wrong: dict[str, Any] = given | {"mask": "padmask"}
    with pytest.raises(SpecError, match=r"^mask: the model has no input padmask"):
        graphq.explain(Masked(), "w8a8", **wrong)
    with pytest.raises(SpecError, match=r"^mask: the model has no input padmask"):
        graphq.compare(Masked(), "w8a8", "w8a16", **wrong)
    with pytest.raises(SpecError, match="dialect"):
        graphq.compare(Masked(), "w8a8", "w8a16", **given, dialect="none")


def test_compile_leaves_masked_tokens_out() -> None:
    torch.manual_seed(0)
    model = Masked()
    model.embedding.weight.data[8:10] *= 100  # beyond the mask's reach
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/tensor"}
    made = [
        graphq.compile(model, spec, inputs=(ids, MASK), mask=mask, calibration=[(ids, MASK)])
        for ids, mask in ((IDS.flip(0), "pad_mask"), (IDS.flip(0), None))
    ]
    scales = [float(one.graph.state_dict()["linear.input_scale"]) for one in made]
    rows = model.embedding.weight.detach()[IDS.flip(0)]
    wanted = [float(rows[MASK.bool()].abs().max()) / 127, float(rows.abs().max()) / 127]
    assert scales == pytest.approx(wanted, rel=1e-6)
    assert scales[1] > 10 * scales[0]
    assert made[0].report.notes == ()


def test_a_graph_that_fails_where_the_model_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphq.capture import modules

    real = modules.export_flat

    def broken(*args: object, **options: object) -> object:
        gm = real(*args, **options)  # pyright: ignore[reportArgumentType]
        gm.linear.weight.data = torch.ones(8, 7)  # pyright: ignore[reportAttributeAccessIssue]
        return gm

    monkeypatch.setattr(modules, "export_flat", broken)
    with pytest.raises(PassError, match=r"^capture: the graph of Masked fails where it does not: "):
        capture_module(Masked(), (IDS, MASK), mask="pad_mask")
