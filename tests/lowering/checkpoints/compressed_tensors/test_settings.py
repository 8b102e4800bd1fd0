"""What ``quantization_config`` says of groups: their names, the order of columns, whom they match."""

import torch

from graphq.lowering.checkpoints.compressed_tensors.settings import quantization_config
from graphq.lowering.checkpoints.layers import QuantizedLinear
from graphq.numerics import Scales
from graphq.spec.quant import parse_quant


def layers(**weights: str) -> dict[str, QuantizedLinear]:
    codes, scales = torch.zeros(4, 4, dtype=torch.int8), Scales(torch.ones(4, 1))
    return {n: QuantizedLinear(n, "linear", codes, scales, parse_quant(w), None, None) for n, w in weights.items()}


def groups(config: dict[str, object]) -> dict[str, list[str]]:
    return {name: group["targets"] for name, group in config["config_groups"].items()}  # type: ignore[attr-defined]


def test_groups_keep_the_names_that_the_spec_has_for_them() -> None:
    held = layers(a="int4/channel", b="int8/channel", c="int4/channel", d="int2/channel")
    found = quantization_config(held, list("abcde"), {"a": "small", "b": "large", "c": "small"})
    assert groups(found) == {"small": ["a", "c"], "large": ["b"], "group_0": ["d"]}
    assert found["ignore"] == ["e"]


def test_layers_of_one_group_that_are_not_quantized_alike_are_two() -> None:
    found = quantization_config(layers(a="int4/channel", b="int8/channel"), list("ab"), {"a": "one", "b": "one"})
    assert groups(found) == {"one": ["a"], "one_0": ["b"]}


def test_a_group_without_a_name_takes_none_that_another_has() -> None:
    held = layers(a="int4/channel", b="int8/channel", c="int2/channel")
    found = quantization_config(held, list("abc"), {"b": "group_0", "c": "group_2"})
    assert groups(found) == {"group_1": ["a"], "group_0": ["b"], "group_2": ["c"]}


def test_layers_of_two_groups_that_are_quantized_alike_stay_apart() -> None:
    found = quantization_config(layers(a="int4/channel", b="int4/channel"), list("ab"), {"a": "one", "b": "two"})
    assert groups(found) == {"one": ["a"], "two": ["b"]}


def test_the_order_of_columns() -> None:
    found = quantization_config(layers(a="int4/channel", b="int4/channel"), list("ab"), None, ["b"])
    assert groups(found) == {"group_0": ["a"], "group_1": ["b"]}
    assert [group["weights"]["actorder"] for group in found["config_groups"].values()] == [None, "weight"]
