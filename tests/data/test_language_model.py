"""Log-likelihoods and greedy text are those of the logits, whatever gives them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphq.data.language_model import LanguageModel, language_model
from graphq.errors import SpecError
from tests.checkpoints import WORDS, write_tokenizer

SUCCESSORS = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))


class Bigrams:
    """The logits behind a token depend on it alone."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor) -> Tensor:
        self.lengths.append(input_ids.shape[1])
        return SUCCESSORS[input_ids]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 6, "eos_token_id": [1]}))
    return tmp_path


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return language_model(Bigrams(), folder)


def test_settings(folder: Path, model: LanguageModel):
    assert (model.longest, model.ends, model.start) == (6, (1,), 0)
    (folder / "config.json").write_text("{}")
    other = language_model(Bigrams(), folder)
    assert (other.longest, other.ends) == (2048, ())
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(SpecError, match="names no token that starts or ends a text"):
        _ = language_model(Bigrams(), folder).start


def test_likelihood_by_hand(model: LanguageModel):
    p = SUCCESSORS.double().log_softmax(-1)
    found, greedy = model.likelihood([5, 7], [9, 11])
    assert found == pytest.approx(float(p[7, 9] + p[9, 11]), rel=1e-6)
    assert not greedy
    best = int(SUCCESSORS[7].argmax())
    assert model.likelihood([5, 7], [best]) == (pytest.approx(float(p[7, best]), rel=1e-6), True)
    assert model.likelihood([5], []) == (0.0, True)


def test_what_is_too_long_is_cut_in_front(model: LanguageModel):
    calls: Any = model.call
    p = SUCCESSORS.double().log_softmax(-1)
    found, _ = model.likelihood(list(range(2, 20)), [30, 31])
    assert calls.lengths == [6]
    assert found == pytest.approx(float(p[19, 30] + p[30, 31]), rel=1e-6)
    found, _ = model.likelihood([3], [4, 5, 6, 7, 8, 9])  # as many as it reads
    assert calls.lengths == [6, 6]
    with pytest.raises(SpecError, match="a continuation of 7 tokens; the model reads 6"):
        model.likelihood([3], [4] * 7)


def walk(start: int, most: int) -> list[int]:
    found: list[int] = []
    while len(found) < most:
        start = int(SUCCESSORS[start].argmax())
        if start == 1:
            break
        found.append(start)
    return found


def test_greedy_text(model: LanguageModel):
    expected = [WORDS[i] for i in walk(5, 4)]
    assert model.continued(WORDS[5], 4).split() == expected
    stopped = model.continued(WORDS[5], 4, until=[expected[1]])
    assert stopped.split() == expected[:1]
    assert model.continued("", 1).split() == [WORDS[i] for i in walk(0, 1)]


def test_a_token_that_ends_a_text_is_no_part_of_it(folder: Path):
    first, second = walk(5, 2)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": second}))
    assert language_model(Bigrams(), folder).continued(WORDS[5], 8).split() == [WORDS[first]]


def test_likelihoods_add_up(model: LanguageModel):
    total = math.fsum(math.exp(model.likelihood([5], [i])[0]) for i in range(100))
    assert total == pytest.approx(1, rel=1e-5)
