"""The file of what algorithms chose."""

import re
from pathlib import Path

import pytest
import torch

from graphq.artifacts.choices import CHOICES_FILE, read_choices, write_choices
from graphq.errors import TargetError
from graphq.ir.choices import Choices


def test_what_is_kept_is_read(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    choices = Choices("1 awq", tensors)
    choices.keep("factors a.weight", torch.tensor([1.0, 2.0], dtype=torch.float64))
    choices.keep("clip a.weight", torch.tensor([[3, 4]], dtype=torch.uint8).T)
    write_choices(tmp_path, tensors)
    assert [file.name for file in tmp_path.iterdir()] == [CHOICES_FILE]
    found = Choices("1 awq", read_choices(tmp_path))
    assert [*found.tensors] == ["1 awq clip a.weight", "1 awq factors a.weight"]
    factors, clip = found.kept("factors a.weight"), found.kept("clip a.weight")
    assert factors is not None
    assert factors.tolist() == [1.0, 2.0]
    assert factors.dtype == torch.float64
    assert clip is not None
    assert clip.tolist() == [[3], [4]]
    assert found.kept("clip b.weight") is None
    assert Choices("0 awq", found.tensors).kept("clip a.weight") is None


def test_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    files: list[bytes] = []
    for names in ("ab", "ba"):
        write_choices(tmp_path, {name: torch.ones(2) for name in names})
        files.append((tmp_path / CHOICES_FILE).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "damaged or incomplete: "),
        (b"\xff" * 20, "damaged or incomplete: "),
        (b"\x02" + b"\0" * 7 + b"[]", "damaged or incomplete: its header does not begin with {"),
    ],
)
def test_what_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / CHOICES_FILE
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TargetError, match=f"^{re.escape(f'{file}: {message}')}"):
        read_choices(tmp_path)
