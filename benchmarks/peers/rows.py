"""What vs_llm_compressor.py compares: the same scheme as a graphq spec and as a recipe of llm-compressor.

Options of an algorithm that are not written are each tool's defaults. ``half`` and ``joint`` are compressed-tensors'
scale and rounding, so that both tools choose among the same codes.
"""

from dataclasses import dataclass
from typing import Any, Final, final

ATTENTION: Final = r"re:.*self_attn\.(q|k|v|o)_proj$"
MLP: Final = r"re:.*mlp\.(gate|up|down)_proj$"
DOWN: Final = r"re:.*down_proj$"
NOT_DOWN: Final = r"re:.*(q|k|v|o|gate|up)_proj$"
TENSOR: Final = {"num_bits": 8, "strategy": "tensor", "dynamic": False, "observer": "static_minmax"}


@final
@dataclass(frozen=True)
class Row:
    """One comparison. ``time``: graphq's seconds may be this multiple of the peer's.

    ``None``: a control. Both round to nearest and must give the same, which shows that the schemes are the same.
    """

    name: str
    spec: dict[str, Any]
    recipe: list[tuple[str, dict[str, Any]]]
    time: float | None


def _spec(rules: dict[str, str], *algorithms: str | dict[str, Any]) -> dict[str, Any]:
    """A native spec: match -> "weight" or "weight input"."""
    written: list[dict[str, str]] = []
    for match, formats in rules.items():
        weight, _, x = formats.partition(" ")
        written.append({"match": match, "weight": weight} | ({"input": x} if x else {}))
    return {"graphq": 1, "rules": written, "algorithms": list(algorithms)}


def _weights(bits: int, symmetric: bool, group_size: int = 128) -> dict[str, Any]:
    return {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": group_size}


def _on_linears(modifier: str, scheme: str) -> tuple[str, dict[str, Any]]:
    return modifier, {"targets": ["Linear"], "scheme": scheme, "ignore": ["lm_head"]}


W8A8: Final = "int8/half/channel int8/half/token/dynamic"
W8A8_STATIC: Final = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": TENSOR,
}
ROWS: Final = (
    Row("RTN W4A16 g128", _spec({"blocks": "int4/half/g128"}), [_on_linears("QuantizationModifier", "W4A16")], None),
    Row(
        "RTN W4A16 asym g128",
        _spec({"blocks": "int4/asym/joint/g128"}),
        [_on_linears("QuantizationModifier", "W4A16_ASYM")],
        None,
    ),
    Row("RTN W8A8", _spec({"blocks": W8A8}), [_on_linears("QuantizationModifier", "W8A8")], None),
    Row(
        "GPTQ W4A16 g128",
        _spec({"blocks": "int4/half/g128"}, "gptq"),
        [_on_linears("GPTQModifier", "W4A16")],
        1 / 2,
    ),
    Row(
        "GPTQ W4A16 asym g128",
        _spec({"blocks": "int4/asym/joint/g128"}, "gptq"),
        [_on_linears("GPTQModifier", "W4A16_ASYM")],
        1 / 2,
    ),
    Row(
        "AWQ W4A16 asym g128",
        _spec({"blocks": "int4/asym/joint/g128"}, "awq"),
        [("AWQModifier", {}), _on_linears("QuantizationModifier", "W4A16_ASYM")],
        1 / 5,
    ),
    Row(
        "SmoothQuant W8A8",
        _spec({"blocks": W8A8}, {"smooth-quant": {"alpha": 0.5}}),
        [("SmoothQuantModifier", {"smoothing_strength": 0.5}), _on_linears("QuantizationModifier", "W8A8")],
        1,
    ),
    Row(
        "SmoothQuant W8A8 static",
        _spec({"blocks": "int8/half/channel int8/half/tensor"}, {"smooth-quant": {"alpha": 0.5}}),
        [
            ("SmoothQuantModifier", {"smoothing_strength": 0.5}),
            ("QuantizationModifier", {"config_groups": {"all": W8A8_STATIC}, "ignore": ["lm_head"]}),
        ],
        1,
    ),
    Row(  # llm-compressor's examples/quantization_non_uniform/quantization_int4_int8.py
        "GPTQ int4, down_proj int8",
        _spec({"blocks": "int4/asym/joint/g128", "down_proj": "int8/half/g128"}, "gptq"),
        [
            (
                "GPTQModifier",
                {
                    "config_groups": {
                        "down": {"targets": [DOWN], "weights": _weights(8, True)},
                        "rest": {"targets": [NOT_DOWN], "weights": _weights(4, False)},
                    },
                    "ignore": ["lm_head"],
                },
            )
        ],
        1 / 2,
    ),
    Row(  # its README.md, "Quantization with Multiple Quantization Modifiers"
        "AWQ W4A16 attention + GPTQ W8A8 mlp",
        _spec(
            {"self_attn": "int4/half/g128", "mlp": W8A8},
            {"awq": {"match": "self_attn"}},
            {"gptq": {"match": "mlp"}},
        ),
        [
            (
                "AWQModifier",
                {
                    "mappings": [
                        {
                            "smooth_layer": "re:.*input_layernorm$",
                            "balance_layers": ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"],
                        },
                        {"smooth_layer": "re:.*v_proj$", "balance_layers": ["re:.*o_proj$"]},
                    ]
                },
            ),
            ("QuantizationModifier", {"targets": [ATTENTION], "scheme": "W4A16"}),
            ("GPTQModifier", {"targets": [MLP], "scheme": "W8A8"}),
        ],
        1 / 2,
    ),
)
