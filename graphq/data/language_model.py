"""A causal language model and its tokenizer, whatever computes it: text in, log-likelihoods and greedy text out.

The whole text is given to the model at each step: a graph without a cache serves as well as one with it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from graphq.data.evaluate import Tokenizer, load_tokenizer, logits_of, takes_input_ids
from graphq.data.model_text import check_fit
from graphq.data.records import check_text
from graphq.errors import SpecError

_LONGEST: Final = 2048  # where the configuration says nothing, as lm-eval has it


@final
@dataclass(frozen=True)
class LanguageModel:
    """call: gives logits for token ids. longest: how many tokens it reads at once. ends: the ids that end a text.
    folder: whose configuration says which tokens it knows.
    """

    call: Callable[..., Any]
    tokenizer: Tokenizer
    longest: int
    ends: tuple[int, ...] = ()
    folder: Path | None = None

    @property
    def start(self) -> int:
        """The token that stands before a text's first one. Raises ``SpecError`` where the tokenizer has none."""
        found = self.tokenizer.bos if self.tokenizer.bos is not None else next(iter(self.ends), None)
        if found is None:
            raise SpecError("tokenizer: names no token that starts or ends a text")
        return found

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits ``[length, vocabulary]`` behind each of the last ``longest`` of the tokens."""
        ids = torch.tensor([tokens[-self.longest :]], dtype=torch.int64)
        with torch.inference_mode():
            made = self.call(input_ids=ids) if takes_input_ids(self.call) else self.call(ids)
            return logits_of(made, ids)[0]

    def likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The natural logarithm of the probability of the continuation behind the context, and whether each of its
        tokens is the likeliest. Of what is longer than the model reads, the end of the context is taken.
        """
        if len(continuation) > self.longest:
            raise SpecError(f"a continuation of {len(continuation)} tokens; the model reads {self.longest}")
        if not continuation:
            return 0.0, True
        read = [*context, *continuation][-(self.longest + 1) : -1]
        rows = self.logits(read)[-len(continuation) :].float().log_softmax(-1)
        wanted = torch.tensor(list(continuation))
        found = rows.gather(-1, wanted[:, None]).double().sum()
        return float(found), bool((rows.argmax(-1) == wanted).all())

    def continued(self, prompt: str, most: int, until: Sequence[str] = ()) -> str:
        """The likeliest text behind the prompt, token by token: ``most`` tokens, or up to one that ends a text, or to
        the first of the texts ``until``, which is left out.
        """
        check_text("prompt", prompt)
        tokens = self.tokenizer.vocabulary.encode(prompt).ids or [self.start]
        if self.folder is not None:
            check_fit(self.folder, torch.tensor([tokens[-self.longest :]]))
        first = len(tokens)
        for _ in range(most):
            found = int(self.logits(tokens)[-1].argmax())
            if found in self.ends:
                break
            tokens.append(found)
            made = self._text(tokens, first)
            if any(stop and stop in made for stop in until):
                break
        made = self._text(tokens, first)
        stops = [made.index(stop) for stop in until if stop and stop in made]
        return made[: min(stops)] if stops else made

    def _text(self, tokens: Sequence[int], first: int) -> str:
        """What the tokens from the ``first`` on add to the text: decoders look at what stands in front."""
        decode = self.tokenizer.vocabulary.decode
        front, whole = decode(list(tokens[:first])), decode(list(tokens))
        return whole[len(front) :] if whole.startswith(front) else decode(list(tokens[first:]))


def language_model(call: Callable[..., Any], folder: str | Path) -> LanguageModel:
    """``call`` with the tokenizer and the settings in ``folder``. Raises ``SpecError`` for a folder without them."""
    try:
        config: Any = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    sizes = (config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx"))
    longest = next((size for size in sizes if type(size) is int and size > 0), _LONGEST)
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return LanguageModel(
        call, load_tokenizer(folder), longest, tuple(one for one in ends if type(one) is int), Path(folder)
    )
