"""Perplexity of a causal language model, and the windows of tokens it is measured and calibrated on.

Perplexity is exp(mean of the windows' mean next-token losses), in nats. The built-in texts are the source code of
modules of the running Python's standard library: they are there on every machine, and nothing is downloaded.
"""

import inspect
import json
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq.data.agreement import Agreement, AgreementOver
from graphq.errors import GraphError, SpecError

if TYPE_CHECKING:
    import tokenizers

# Never trained on by examples/models/stdlib-llama: its train.py holds the same list.
HELD_OUT: Final = (
    "argparse",
    "tarfile",
    "zipfile",
    "statistics",
    "dataclasses",
    "typing",
    "heapq",
    "ipaddress",
    "fractions",
    "difflib",
    "configparser",
    "textwrap",
)
# Shares no module with HELD_OUT. Short ones first, so that few windows still see many of them.
CALIBRATION: Final = (
    "csv",
    "json.decoder",
    "random",
    "urllib.parse",
    "socket",
    "pathlib",
    "shutil",
    "threading",
    "ast",
    "subprocess",
    "logging",
    "inspect",
)


@final
@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the id of the token that starts each text (None: texts start with their first token)."""

    vocabulary: "tokenizers.Tokenizer"
    bos: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, after ``bos``; the tokenizer's own template of special tokens is not applied."""
        ids = self.encode_as_it_is(text)
        return ids if self.bos is None else [self.bos, *ids]

    def encode_as_it_is(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, in which special tokens stand already, as a chat template writes them."""
        return self.vocabulary.encode(text, add_special_tokens=False).ids


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: ``tokenizer.json``, with the ``bos_token`` that ``tokenizer_config.json`` names.

    Raises ``SpecError`` where a file is missing or cannot be read, or the named token is not in the vocabulary.
    """
    import tokenizers

    file, config_file = Path(folder, "tokenizer.json"), Path(folder, "tokenizer_config.json")
    for path in (file, config_file):
        if not path.is_file():
            raise SpecError(
                f"{path}: no such file; a tokenizer is a folder with tokenizer.json and tokenizer_config.json"
            )
    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise SpecError(f"{file}: not a tokenizer: {error}") from error
    try:
        config: Any = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(f"{config_file}: not JSON: {error}") from error
    token: Any = config.get("bos_token") if isinstance(config, dict) else None
    if isinstance(token, dict):  # how transformers writes a token with its stripping options
        token = cast("dict[str, Any]", token).get("content")
    if token is None:
        return Tokenizer(vocabulary, None)
    bos = vocabulary.token_to_id(token) if isinstance(token, str) else None
    if bos is None:
        raise SpecError(f"{config_file}:bos_token: {token!r} is not in the vocabulary of {file.name}")
    return Tokenizer(vocabulary, bos)


def text_windows(tokenizer: Tokenizer, texts: Iterable[str], length: int, count: int | None = None) -> Tensor:
    """The first ``count`` windows of ``length`` tokens of the texts, one after the other: int64 ``[count, length]``.

    The tokens left over at the end are dropped. ``count=None`` gives all windows. Raises ``SpecError`` where the texts
    do not hold that many, or any.
    """
    if length < 2:
        raise SpecError(f"length: {length}: a window needs 2 tokens, the second to be predicted from the first")
    if count is not None and count < 1:
        raise SpecError(f"count: {count} is not a positive number of windows")
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer.encode(text)
        if count is not None and len(tokens) >= count * length:
            break
    held = len(tokens) // length
    wanted = max(held, 1) if count is None else count
    if held < wanted:
        raise SpecError(f"text: its {len(tokens)} tokens fill {held} windows of {length}; {wanted} needed")
    return torch.tensor(tokens[: wanted * length], dtype=torch.int64).view(wanted, length)


def standard_library_windows(
    tokenizer: Tokenizer, modules: Sequence[str] = HELD_OUT, count: int = 320, length: int = 256
) -> Tensor:
    """The first windows of the sources of ``modules``, in their order: int64 ``[count, length]``.

    The text is that of the running Python: another patch release gives other windows, and a slightly other perplexity.
    Raises ``SpecError`` where a module's source is not there, or the sources are too short.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    return text_windows(tokenizer, (_source(root, module) for module in modules), length, count)


def calibration_windows(
    tokenizer: Tokenizer, modules: Sequence[str] = CALIBRATION, count: int = 128, length: int = 256
) -> Tensor:
    """Windows to calibrate on, from modules that the evaluation text does not hold: int64 ``[count, length]``.

    Raises what ``standard_library_windows`` raises.
    """
    return standard_library_windows(tokenizer, modules, count, length)


def _source(root: Path, module: str) -> str:
    stem = root.joinpath(*module.split("."))
    for file in (stem.with_suffix(".py"), stem / "__init__.py"):
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="ignore")
    raise SpecError(f"text: module {module} has no source file in {root}")


def perplexity(model: Callable[..., Any], windows: Tensor, batch_size: int = 16) -> float:
    """The exponential of the mean over ``windows`` of their mean next-token losses; infinity where that overflows.

    ``model`` is called as ``model(input_ids=...)`` where it has such a parameter, else ``model(input_ids)``, with int64
    ``[batch, length]`` on ``windows``' device; a module with dropout must be in eval mode. It returns the logits
    ``[batch, length, vocabulary]``, a tuple that starts with them, or a mapping or object that names them ``logits``.
    ``windows``: int64 ``[n, length]``, n >= 1, length >= 2; anything else raises ``SpecError``. Losses are computed in
    float32, whatever the logits' dtype. Raises ``GraphError`` where the model returns something else.
    """
    _check_windows(windows, batch_size)
    losses: list[Tensor] = []
    with torch.inference_mode():
        for batch in windows.split(batch_size):
            logits = _logits(model, batch)
            # One window at a time: the float32 copy of a batch of logits can be gigabytes.
            for x, window in zip(logits, batch, strict=True):
                losses.append(F.cross_entropy(x[:-1].float(), window[1:]))
        return torch.stack(losses).double().mean().exp().item()


def agreement(
    reference: Callable[..., Any], model: Callable[..., Any], windows: Tensor, batch_size: int = 16
) -> Agreement:
    """How far the next tokens that ``model`` expects at every place of ``windows`` agree with those of ``reference``.

    Both are called, and ``windows`` are, as for ``perplexity``, which raises the same errors. Two that have unlike
    vocabularies are a ``GraphError``, too.
    """
    _check_windows(windows, batch_size)
    over = AgreementOver()
    with torch.inference_mode():
        for batch in windows.split(batch_size):
            over.add(_logits(reference, batch), _logits(model, batch))
    return over.found()


def _check_windows(windows: Tensor, batch_size: int) -> None:
    if windows.dim() != 2 or windows.dtype != torch.int64:
        raise SpecError(f"windows: {_describe(windows)}; they are int64 [n, length]")
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise SpecError(f"windows: {_describe(windows)}; at least one window of at least 2 tokens is needed")
    if batch_size < 1:
        raise SpecError(f"batch_size: {batch_size} is not a positive number of windows")


def _logits(model: Callable[..., Any], batch: Tensor) -> Tensor:
    return logits_of(model(input_ids=batch) if takes_input_ids(model) else model(batch), batch)


def takes_input_ids(model: Callable[..., Any]) -> bool:
    """Whether a model is called by the name of its tokens, ``input_ids``, rather than by their place."""
    call = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.kind is p.VAR_KEYWORD or (p.name == "input_ids" and p.kind in by_name) for p in parameters)


def logits_of(output: object, batch: Tensor) -> Tensor:
    """The logits ``[batch, length, vocabulary]`` in what a model returned for ``batch``. Raises ``GraphError``."""
    found: object
    match output:
        case Tensor():
            found = output
        case tuple() if output:
            found = cast("tuple[object, ...]", output)[0]
        case Mapping():
            found = cast("Mapping[str, object]", output).get("logits")
        case _:
            found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise GraphError(
            f"the model returned {type(output).__name__} without logits; perplexity needs a language model"
        )
    if found.dim() != 3 or found.shape[:2] != batch.shape:
        raise GraphError(f"the model returned logits of shape {list(found.shape)} for {list(batch.shape)} tokens")
    return found


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
