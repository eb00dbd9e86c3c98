"""Sets the allocator that a command would use, before any test of this folder uses a GPU in this process."""

from __future__ import annotations

from wanfast.runtime.machine.gpus import set_environment

set_environment()
