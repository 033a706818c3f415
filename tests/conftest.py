# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Workers of pytest-xdist have one, and rich keeps the width it was imported with.
os.environ.pop("COLUMNS", None)
# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def single_threaded() -> Iterator[None]:
    """Tensors here are so small that torch's threads mostly wait for each other: half the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
