"""What holds for all tests: how many examples a property sees, and one thread for each of several test processes."""

import os

import torch
from hypothesis import settings

settings.register_profile("quick", deadline=None, derandomize=True)  # the same examples in every run
settings.register_profile("fuzz", deadline=None, max_examples=2000)  # make test-all
settings.load_profile("quick")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
