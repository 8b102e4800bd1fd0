"""Model directories for tests: a tiny transformers model with a tokenizer that splits text at spaces."""

import json
from pathlib import Path
from typing import Any

from tests.models import tiny

WORDS = ("<s>", "<unk>", *(f"w{i}" for i in range(98)))


def save_checkpoint(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A model of ``tests.models`` of one block, saved in ``folder`` with its tokenizer."""
    tiny(family, **({"num_hidden_layers": 1} if family == "llama" else {}) | options).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of a hundred words; text starts with ``<s>``, and other words are ``<unk>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made: Any = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))


def text(words: int) -> str:
    """A text of this many different-looking words."""
    return " ".join(WORDS[2 + (i * i + 3 * i) % 98] for i in range(words))
