"""mxfp4 experts, as gpt-oss is stored: the numbers that transformers dequantizes to."""

from pathlib import Path

import pytest
import torch

from graphq.errors import GraphqError
from graphq.lowering.checkpoints.sources.read import read_quantized
from tests.quantized_checkpoints import changed, gpt_oss

STACK = "model.layers.1.mlp.experts.gate_up_proj"


def test_the_numbers_are_those_of_transformers(tmp_path: Path) -> None:
    wanted = gpt_oss(tmp_path)
    found = read_quantized(tmp_path)
    assert len(found.weights) == 4 * len(wanted) == 16
    for name, stack in wanted.items():
        deferred = found.tensors[name].deferred(tuple(stack.shape), torch.float32)
        assert deferred is not None
        assert torch.equal(deferred.read(), stack.float())
        assert torch.equal(deferred.member(2).read(), stack[2].float())
        assert found.tensors[name].deferred((1, *stack.shape[1:]), torch.float32) is None
    path, _, role = STACK.rpartition(".")
    one = found.weights[f"{path}.3.{role}"]
    assert torch.equal(one.numbers(), wanted[STACK][3].T)
    assert (str(one.quant), one.input, one.format) == ("mxfp4", None, "mxfp4")
    assert one.nbytes == 192 * 2 * 17


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("_scales", None, f": {STACK}: mxfp4: has no gate_up_proj_scales"),
        (
            "_scales",
            torch.ones(4, 192, 3, dtype=torch.uint8),
            f"/model.safetensors: {STACK}_scales: U8[4, 192, 3], where U8 or F8_E8M0[4, 192, 2] belongs",
        ),
        (
            "_blocks",
            torch.ones(4, 192, 2, dtype=torch.uint8),
            f"/model.safetensors: {STACK}_blocks: [4, 192, 2]: are no blocks",
        ),
        (
            "_blocks",
            torch.ones(4, 192, 2, 16),
            f"/model.safetensors: {STACK}_blocks: F32[4, 192, 2, 16], where U8[4, 192, 2, 16] belongs",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, suffix: str, tensor: torch.Tensor | None, message: str) -> None:
    gpt_oss(tmp_path)

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(STACK + suffix)
        tensors.update({} if tensor is None else {STACK + suffix: tensor})

    changed(tmp_path, apply)
    with pytest.raises(GraphqError) as caught:
        read_quantized(tmp_path)
    assert str(caught.value) == f"{tmp_path}{message}"
