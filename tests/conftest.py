"""What holds for all tests: how many examples a property sees, and one thread for each of several test processes."""

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from types import CodeType
from typing import Any, cast

import pytest
import torch
from hypothesis import settings
from torch.fx import graph_module

from tests.shared_captures import captured_once

settings.register_profile("quick", deadline=None, derandomize=True)  # the same examples in every run
settings.register_profile("fuzz", deadline=None, max_examples=1000)  # make test-all: new ones in every run
settings.load_profile("quick")

# Files of half a minute and more, and the last ones by name: begun last, they would keep one of several processes waiting.
LONG = (
    "test_emit.py",
    "test_examples.py",
    "test_conformance.py",
    "test_stored.py",
    "test_spellings.py",
    "test_random_graphs.py",
    "test_every_layer.py",
    "test_masked.py",
    "test_cost.py",
    "test_awq.py",
    "test_allowed_ops.py",
    "test_random_placements.py",
    "test_matrix.py",
    "test_cli.py",
    "test_compiler.py",
    "test_artifacts.py",
    "test_options.py",
    "test_verifier.py",
    "test_whole_graph.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first; the rest stays in its order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """Garbage is looked for more rarely, and not among what was imported: libraries hold half a million objects."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def _captured_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Outside of ``tests/capture``, models that differ in their weights alone are exported once."""
    with contextlib.nullcontext() if "capture" in request.path.parts else captured_once():
        yield


_CODES: dict[str, CodeType] = {}


def _run_source(src: str, names: dict[str, Any], co_fields: dict[str, Any] | None = None) -> None:
    """As torch makes the ``forward`` of a graph; equal texts are compiled once, and that is most of them."""
    file = cast(Any, graph_module)._loader.cache(src, names, co_fields)
    if src not in _CODES:
        _CODES[src] = compile(src, file, "exec", dont_inherit=True)
    exec(_CODES[src], names)  # noqa: S102


graph_module._exec_with_source = _run_source
gc.disable()  # until all is imported
# Torch's own record of each export: pytest listens to loggers that hand nothing on, and torch writes it for a listener.
logging.getLogger("torch.__trace").propagate = True
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
