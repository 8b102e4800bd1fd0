"""A graph of one token held to its source on a text: read token by token it must give what the model gives at once.

One step of the graph is proved against one step of the source (``capture.proof``). Models may read a text of many
tokens in another way than its steps: in blocks or chunks, under masks that a step leaves out.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture.export import evaluating
from graphq.capture.proof import drawn_ids, first_line, largest_share
from graphq.capture.source import PAST, TOTAL, Source, TensorInput, source_of
from graphq.errors import GraphError

_SHORTEST: Final = 6
_LONGEST: Final = 64  # of what a configuration has, as each token is a call
_PADDED: Final = 2
# What a text is read by, in blocks, and how far back attention looks.
_BLOCKS: Final = ("sliding_window", "attention_window_size", "block_size", "chunk_size", "mamba_chunk_size")
_TOLERANCE: Final = 1e-3  # of the largest logit, float32: other sums of the same numbers come to about 1e-5


def prove_text(gm: fx.GraphModule, model: nn.Module, run: Callable[..., Any]) -> tuple[str, ...]:
    """Notes on texts for which the graph of one token, called for each, gives not what the model does.

    The text is longer than the blocks, chunks and windows of the configuration, as far as these are small. ``run``
    calls the model. Raises ``GraphError`` where the two differ. It is a note in less than float32, and for a text with
    padding in front, which is held to the text alone. Nothing is compared without weights.
    """
    if any(isinstance(x, FakeTensor) or x.is_meta for x in gm.state_dict(keep_vars=True).values()):
        return ()
    source = source_of(gm)
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = [size for name in _BLOCKS if isinstance(size := getattr(config, name, None), int) and size < _LONGEST]
    length = max([_SHORTEST, *(size + 3 for size in sizes)])
    device = next(model.parameters()).device
    ids = drawn_ids(config, (1, length), torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
        try:
            wanted = run(input_ids=ids, use_cache=False).logits
        except Exception as error:  # noqa: BLE001 - whatever its code raises
            return (f"capture: not compared on a text of {length} tokens: the model fails: {first_line(error)}",)
        share = largest_share(wanted, _logits(gm, source, ids, 0))
        if share > _TOLERANCE:
            found = f"a text of {length} tokens, read one by one, differs by {share:.2g} of its largest logit"
            if wanted.dtype in (torch.float16, torch.bfloat16):
                rounding = f"the rounding of {wanted.dtype}, or more"
                return (f"capture: {found} from the same read at once: {rounding}",)
            raise GraphError(
                f"{type(model).__name__}: {found} from the same read at once: the model's step computes something else"
                ' than its text; declare the length of all texts with shapes={"sequence": ...} and cache=False'
            )
        if "attention_mask" in source.names:
            share = largest_share(wanted, _logits(gm, source, ids, _PADDED))
            if share > _TOLERANCE:
                found = f"behind padding a text differs by {share:.2g} of its largest logit from the same without"
                return (f"capture: {found}; read texts of one length together",)
    return ()


def _logits(gm: fx.GraphModule, source: Source, ids: Tensor, padding: int) -> Tensor:
    """``[1, tokens, V]``, of the text behind so many tokens of padding."""
    read = torch.cat([ids[:, :1].expand(1, padding), ids], 1)
    mask = torch.ones_like(read)
    mask[:, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kept = {one.name: _empty(one, ids.device) for one in source.inputs if one.name in source.pasts}
    logits: list[Tensor] = []
    for place in range(read.shape[1]):
        given = dict(kept)
        for one in source.inputs:
            match one.name:
                case "input_ids":
                    given[one.name] = read[:, place : place + 1]
                case "position_ids":
                    given[one.name] = positions[:, place : place + 1]
                case "attention_mask":
                    given[one.name] = mask[:, 0 if one.shape[1] == TOTAL else place : place + 1]
                case _:
                    pass
        found = dict(zip(source.outputs, gm.forward(*(given[name].contiguous() for name in source.names)), strict=True))
        kept = {pair.past: found[pair.present] for pair in source.caches}
        logits.append(found["logits"])
    return torch.cat(logits[padding:], 1)


def _empty(wanted: TensorInput, device: torch.device) -> Tensor:
    sizes = [size if isinstance(size, int) else 0 if size == PAST else 1 for size in wanted.shape]
    return torch.zeros(sizes, dtype=wanted.dtype, device=device)
