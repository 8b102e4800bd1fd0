"""How far the next tokens that two language models expect agree."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch.nn.functional as F
from torch import Tensor

from graphq.errors import GraphError

_ROWS: Final = 256  # tokens whose logits are held in float32 and more at a time


@final
@dataclass(frozen=True)
class Agreement:
    """kl: the mean over tokens of KL(reference || other), in nats. top1: the share of tokens at which both expect the
    same next token most. tokens: how many were compared.
    """

    kl: float
    top1: float
    tokens: int

    def to_json(self) -> Mapping[str, Any]:
        """Plain data: ``kl``, ``top1``, ``tokens``."""
        return {"kl": self.kl if self.kl < float("inf") else None, "top1": self.top1, "tokens": self.tokens}

    def __str__(self) -> str:
        return f"KL divergence {self.kl:.6g}, top-1 agreement {self.top1:.2%} ({self.tokens} tokens)"


@final
class AgreementOver:
    """The agreement over all batches that were added."""

    def __init__(self) -> None:
        self._kl = 0.0
        self._same = 0
        self._tokens = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Logits ``[..., vocabulary]`` of the same tokens. Raises ``GraphError`` for unlike shapes."""
        if reference.shape != other.shape:
            raise GraphError(f"logits of shape {list(other.shape)} beside {list(reference.shape)}: not of one model")
        rows = (x.reshape(-1, x.shape[-1]) for x in (reference, other))
        for want, got in zip(*(x.split(_ROWS) for x in rows), strict=True):
            self._same += int((want.argmax(-1) == got.argmax(-1)).sum())
            wide = (x.double().log_softmax(-1) for x in (want, got))
            expected, found = wide
            self._kl += float(F.kl_div(found, expected, reduction="sum", log_target=True))
            self._tokens += want.shape[0]

    def found(self) -> Agreement:
        """Over no tokens both are equal."""
        count = max(self._tokens, 1)
        kl = self._kl / count
        kl = max(kl, 0.0) if kl == kl else float("inf")  # what is rounded may fall below
        return Agreement(kl, self._same / count if self._tokens else 1.0, self._tokens)
