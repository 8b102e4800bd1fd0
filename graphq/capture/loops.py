"""Which part of a model is a loop over its text: a recurrence written in Python, which no graph of any length holds."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphq.capture.export import block_lists

# One chunk and two of 256, several of smaller ones, with the same rest: padding of the last one is no loop.
_LENGTHS: Final = (44, 300)


def loop_over_text(model: nn.Module, run: Callable[..., Any]) -> str | None:
    """The first module of the repeated blocks that calls more ops for more tokens, in words; None if none does.

    ``run`` calls the model on ``input_ids``. Export would unroll such a loop before it found that it cannot.
    """
    shorter, longer = (_calls(model, run, length) for length in _LENGTHS)
    prefixes = tuple(f"{path}." for path in block_lists(model))
    for name, module in model.named_modules():
        if name.startswith(prefixes) and shorter[name] != longer[name]:
            counts = " and ".join(str(calls[name]) for calls in (shorter, longer))
            sizes = " and ".join(map(str, _LENGTHS))
            return f"{name} ({type(module).__name__}) is a loop over tokens: {counts} ops for {sizes} of them"
    return None


def _calls(model: nn.Module, run: Callable[..., Any], length: int) -> Counter[str]:
    """How many ops each module calls itself for a text of this length."""
    counts: Counter[str] = Counter()
    inside: list[str] = [""]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[inside[-1]] += 1
            return func(*args, **(kwargs or {}))

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_pre_hook(enter(name)) for name, module in named]
    handles += [module.register_forward_hook(leave) for _, module in named]
    device = next(model.parameters()).device
    try:
        with Count():
            run(input_ids=torch.zeros(1, length, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return counts
