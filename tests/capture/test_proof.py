"""A graph that does not compute what its model does is refused, whatever made it so."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.capture.modules import capture_module
from graphq.capture.proof import largest_share, resized, samples_of
from graphq.capture.source import SEQUENCE, source_of
from graphq.compiler import capture
from graphq.errors import GraphError
from tests.models import tiny


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    """Two linears, the second of which is another one where the model is traced, or at one length alone."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        eager = not torch.compiler.is_compiling()
        if (self.when == "traced" and not eager) or (self.when == "shorter" and eager and x.shape[1] == 4):
            x = x * 1.5
        if self.when == "fails" and eager and x.shape[1] == 4:
            raise ValueError("no\nsuch length")
        if self.when == "random":
            x = x + torch.rand_like(x)
        return self.second(x)


class Outer(nn.Module):
    def __init__(self, when: str) -> None:
        super().__init__()
        self.inner = Inner(when)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(self.inner(x))
        return y, y.argmax(-1)


@pytest.mark.parametrize(("when", "sizes"), [("traced", "batch 2, sequence 5"), ("shorter", "batch 1, sequence 4")])
def test_another_result_is_refused_with_the_first_module_that_differs(when, sizes):
    """At the examples, or at the second length alone."""
    torch.manual_seed(0)
    model = Outer(when)
    with pytest.raises(GraphError) as caught:
        capture(model, floats(2, 5, 8))
    text = str(caught.value)
    assert text.startswith("Outer: the captured graph does not compute what the model does: output_0 differs by 0.")
    assert f" of its largest value at {sizes}; " in text
    assert "; the first module whose outputs differ is inner.second (Linear); " in text
    assert graphq.compile(model, "w8a8", inputs=floats(2, 5, 8), check_capture=False).report.layers
    with pytest.raises(GraphError, match=r"does not compute"):
        graphq.compile(model, "w8a8", inputs=floats(2, 5, 8))


def test_what_cannot_be_compared_is_a_note():
    notes = source_of(capture(Outer("random"), floats(2, 5, 8))).notes
    assert notes == ("capture: not compared with the model, which gives another result each time",)
    notes = source_of(capture(Outer("fails"), floats(2, 5, 8))).notes
    assert notes == ("capture: not compared with the model at batch 1, sequence 4: it fails: no",)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_that_keep_to_one_graph_are_proved_in_their_own_dtype(dtype):
    torch.manual_seed(0)
    assert source_of(capture(Outer("").to(dtype), floats(2, 5, 8).to(dtype))).notes == ()


def test_the_proof_draws_no_numbers_and_changes_no_mode():
    model = Outer("").train()
    before = torch.get_rng_state()
    capture_module(model, floats(2, 5, 8), check=True)
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in model.modules()] == [True] * 5


@pytest.mark.parametrize(
    ("wanted", "found", "share"),
    [
        (torch.tensor([1.0, -4.0]), torch.tensor([2.0, -4.0]), 0.25),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), 0.0),
        (torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 1.0]), 1.0),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.0]), 1.0),
        (torch.zeros(2), torch.zeros(2), 0.0),
        (torch.zeros(2), torch.ones(2), 1.0),
        (torch.zeros(2), torch.zeros(3), 1.0),
        (torch.zeros(2), torch.zeros(2).double(), 1.0),
        (torch.zeros(0), torch.zeros(0), 0.0),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), 1.0),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0),
        (torch.tensor([2j, 0]), torch.tensor([2j, 1]), 0.5),
    ],
)
def test_how_far_apart_two_outputs_are(wanted, found, share):
    assert largest_share(wanted, found) == share


def test_examples_at_other_sizes():
    gm = capture_module(Outer(""), floats(2, 5, 8))
    (smaller,) = resized(source_of(gm), [floats(2, 5, 8)]) or []
    assert torch.equal(smaller, floats(2, 5, 8)[:1, :4])
    (two,) = resized(source_of(gm), [floats(1, 1, 8)]) or []
    assert torch.equal(two, floats(1, 1, 8).expand(2, 2, 8))
    fixed = capture_module(Outer(""), floats(2, 5, 8), shapes={"batch": 2, "sequence": 5})
    assert resized(source_of(fixed), [floats(2, 5, 8)]) is None


def test_inputs_of_a_language_model():
    """Tokens with a meaning of their own are left out, the cache is filled and empty, a short window is passed."""
    model: Any = tiny("gemma3")
    model.config.pad_token_id = 1
    window = model.config.sliding_window
    first, second = samples_of(model, source_of(capture(model)))
    names = source_of(capture(model)).names
    ids, mask, positions = (
        dict(zip(names, second, strict=True))[n] for n in ("input_ids", "attention_mask", "position_ids")
    )
    assert ids.shape == mask.shape == positions.shape == (1, window + 3)
    assert positions.tolist() == [[*range(window + 3)]]
    assert not (ids == 1).any()
    assert dict(zip(names, first, strict=True))["position_ids"].tolist() == [[5, 6, 7]] * 2
    caches = [x.shape[2] for name, x in zip(names, first, strict=True) if name.startswith("past")]
    assert set(caches) == {5}
    assert {x.shape[2] for name, x in zip(names, second, strict=True) if name.startswith("past")} == {0}
    assert SEQUENCE in source_of(capture(model)).bounds


@pytest.mark.slow
def test_a_mask_that_is_left_out_where_the_model_is_called():
    """PaliGemma's attention is causal in the graph, and sees both sides in an eager call without images."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"model_type": "gemma", "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128}
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config: Any = PaliGemmaConfig(
        text_config=text | sizes, vision_config=vision | sizes, image_token_index=127, projection_dim=32
    )
    with pytest.raises(
        GraphError, match=r"first module whose outputs differ is model.language_model.layers.0.self_attn"
    ):
        capture(PaliGemmaForConditionalGeneration(config).eval())
