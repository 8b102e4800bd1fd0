"""Entries of JSON that may be damaged, read by key."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, cast

_SIZES = 1 << 63


def entry(data: object, key: str, accepts: Callable[[Any], bool], wanted: str) -> Any:
    """``data[key]``, which ``accepts`` holds of. Raises ``ValueError`` that begins with the key, and says that it is
    missing or is not ``wanted``.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{key}: {reprlib.repr(data)} holds no entries")
    entries = cast(Mapping[str, Any], data)
    if key not in entries:
        raise ValueError(f"{key}: missing")
    if not accepts(entries[key]):
        raise ValueError(f"{key}: {reprlib.repr(entries[key])} is not {wanted}")
    return entries[key]


def is_text(value: object) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_text_or_null(value: object) -> bool:
    """Whether it is a string or null."""
    return value is None or isinstance(value, str)


def are_texts(value: object) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(isinstance(one, str) for one in cast(list[object], value))


def is_size(value: object) -> bool:
    """Whether it is a whole number that a size can be: from 0, below 2^63."""
    return type(value) is int and 0 <= value < _SIZES
