"""Every frontend, fed for a minute with documents that coverage guides: nothing but ``SpecError`` comes out."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from graphq.frontends import DIALECTS


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_nothing_but_spec_errors(dialect):
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), dialect, "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
