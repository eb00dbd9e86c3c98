"""Before any test of this folder uses a GPU in this process: the allocator that a command would take."""

from __future__ import annotations

from wanfast.runtime.machine.gpus import expand_segments

expand_segments()
