"""A model's configuration as an object, from the JSON that artifacts hold."""

import json
from types import SimpleNamespace
from typing import Any


def configuration(text: str) -> Any:
    """The configuration by transformers' own class, or a namespace with the same attributes where it is not installed.

    A model type that transformers does not know, whose class came with the model, gives a ``PreTrainedConfig``.
    """
    try:
        from transformers import AutoConfig, PreTrainedConfig
    except ImportError:
        return json.loads(text, object_hook=_namespace)
    settings: dict[str, Any] = json.loads(text)
    settings.pop("transformers_version", None)
    try:
        return AutoConfig.for_model(**settings)
    except ValueError:
        return PreTrainedConfig(**settings)


def _namespace(entries: dict[str, Any]) -> Any:
    """An object of these attributes; a table that is no settings, such as one by label numbers, stays a dict."""
    return SimpleNamespace(**entries) if all(key.isidentifier() for key in entries) else entries
