"""Compiled models are copied, and refused by pickle, which would lose what their graphs came from."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graphq
from tests.models import MLP

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    compiled = graphq.compile(MLP(), {"graphq": 1, "weight": "int8/channel"}, inputs=X)
    path: Path = tmp_path_factory.mktemp("made") / "artifact"
    compiled.save(path)
    return {"Compiled": compiled, "module": compiled.module, "loaded": graphq.load(path)}


def _save(model: Any) -> None:
    torch.save(model, io.BytesIO())


@pytest.mark.parametrize("kind", ["Compiled", "module", "loaded"])
@pytest.mark.parametrize("write", [pickle.dumps, lambda model: pickle.dumps([model], protocol=2), _save])
def test_pickle_is_refused(made: dict[str, Any], kind: str, write: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError) as caught:
        write(made[kind])
    assert str(caught.value) == (
        f"a {'Compiled' if kind == 'Compiled' else 'CompiledModel'} cannot be pickled: write what graphq.compile returns"
        " with its save(path), and read it with graphq.load(path); a state dict can be pickled"
    )


@pytest.mark.parametrize("kind", ["Compiled", "module", "loaded"])
def test_copies(made: dict[str, Any], kind: str) -> None:
    model = made[kind]
    expected = model(X)
    for copied in (copy.copy(model), copy.deepcopy(model), copy.deepcopy([model])[0]):
        assert type(copied) is type(model)
        assert torch.equal(copied(X), expected)
    one, other = copy.deepcopy([model, model])
    assert one is other
    tensors: Any = getattr(one, "module", one)
    for tensor in tensors.state_dict().values():
        tensor.zero_()
    assert not one(X).any()
    assert torch.equal(model(X), expected)


def test_a_state_dict_is_pickled(made: dict[str, Any]) -> None:
    file = io.BytesIO()
    torch.save(made["module"].state_dict(), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    copied = copy.deepcopy(made["module"])
    for tensor in copied.state_dict().values():
        tensor.zero_()
    copied.load_state_dict(read)
    assert torch.equal(copied(X), made["module"](X))
