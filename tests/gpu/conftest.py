"""Sets the allocator that a command would use, before any test of this folder uses a GPU in this process."""

from __future__ import annotations

import pytest

from wanfast.runtime.machine.gpus import set_environment

set_environment()


@pytest.fixture
def forked() -> None:
    """Lets commands start their processes anew, because a fork of a process that uses a GPU cannot use the GPU."""
