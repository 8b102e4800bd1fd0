"""Models that PEFT wraps. Its classes are stood in for by ones of the same names and parts, since it is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graphq import compiler
from graphq.capture.adapters import without_adapters
from graphq.capture.source import source_of
from graphq.errors import GraphError
from tests.checkpoints import save_checkpoint
from tests.models import MLP

X = torch.ones(2, 8)


class Lora(nn.Module):
    """A linear with a low-rank addition, as ``peft.tuners.lora.layer.Linear``."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Ia3(nn.Module):
    """Another tuner's layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ia3_l = nn.ParameterDict({"default": nn.Parameter(torch.ones(base_layer.out_features))})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * self.ia3_l["default"]


class LoraModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PeftModel(nn.Module):
    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)


class PeftModelForCausalLM(PeftModel):
    pass


for made in (Ia3, LoraModel, PeftModel, PeftModelForCausalLM):
    made.__module__ = "peft.stand_in"


def adapted(layer: type[Any] = Lora, only: str = "") -> nn.Module:
    model = MLP()
    for name in ("up", "down"):
        if only in name:
            setattr(model, name, layer(getattr(model, name)))
    return model


@pytest.mark.parametrize("wrapper", [PeftModel, PeftModelForCausalLM])
def test_a_model_without_adapters_is_the_one_inside(wrapper: type[PeftModel]) -> None:
    model = MLP()
    assert without_adapters(wrapper(LoraModel(model))) is model
    gm = compiler.capture(wrapper(LoraModel(model)), X)
    assert sorted(gm.state_dict()) == ["down.bias", "down.weight", "up.bias", "up.weight"]


def test_other_models_are_left_alone() -> None:
    model = nn.Sequential(MLP())
    assert without_adapters(model) is model
    own = MLP()
    own.base_layer = nn.Linear(8, 8)  # a name that anyone may use
    assert without_adapters(own) is own


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (PeftModel(LoraModel(adapted())), "base_model.model.up: carries a PEFT adapter (and 1 more layers)"),
        (torch.nn.Sequential(adapted(only="down")), "0.down: carries a PEFT adapter"),
        (adapted(Ia3, only="up"), "up: carries a PEFT adapter"),
    ],
)
def test_adapters_are_to_be_merged(model: nn.Module, layer: str) -> None:
    for call in (without_adapters, lambda m: compiler.compile(m, "w8a16", inputs=X), lambda m: compiler.capture(m, X)):
        with pytest.raises(GraphError) as error:
            call(model)
        assert str(error.value) == f"{layer}; compile what merge_and_unload() returns"


def test_learned_prompts_are_refused() -> None:
    model = PeftModel(MLP())
    model.prompt_encoder = nn.ModuleDict()
    assert without_adapters(model) is model.base_model
    model.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(4, 8)})
    with pytest.raises(GraphError) as error:
        without_adapters(model)
    assert str(error.value) == "prompt_encoder: PeftModel puts learned prompts before its inputs"


def test_a_wrapper_whose_model_is_not_found() -> None:
    model = LoraModel(MLP())
    model.model = None  # type: ignore[assignment]
    with pytest.raises(GraphError, match="LoraModel: the model that it wraps is not found"):
        without_adapters(model)


# -- directories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
def test_an_adapter_beside_the_weights_is_noted(weights: bool, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a")
    assert not source_of(compiler.capture(path, weights=weights)).notes
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    save_file({"a": torch.ones(1)}, path / "adapter_model.safetensors")
    (note,) = source_of(compiler.capture(path, weights=weights)).notes
    assert note == (
        "adapter_config.json: the adapter beside the weights is left out; merge it (merge_and_unload()) and save the"
        " result"
    )


def test_an_adapter_without_its_model(tmp_path: Path) -> None:
    told = ": an adapter (adapter_config.json) without its model; load both, merge_and_unload(), and save the result"
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(GraphError) as error:
        compiler.capture(tmp_path)
    assert str(error.value) == f"{tmp_path}{told}"
    model = save_checkpoint(tmp_path / "a")
    (model / "model.safetensors").unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).rename(model / name)
    with pytest.raises(GraphError) as error:
        compiler.capture(model)
    assert str(error.value) == f"{model}{told}"
