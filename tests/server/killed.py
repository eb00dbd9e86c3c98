"""Runs `wanfast serve` with the stand-in in a process of its own, which tests kill."""

from __future__ import annotations

import sys
import time
from typing import Any

from tests.server import running
from wanfast.cli import main
from wanfast.runtime.processes.handle import Video
from wanfast.server import serve


class Slow(running.StandIn):
    """Makes a video whose prompt is "a long step" in a step that takes a minute."""

    def make(self, *, on_progress: Any, **options: Any) -> Video:
        if options["prompt"] == "a long step":
            on_progress("high noise", 0, 4)
            time.sleep(60)
        return super().make(on_progress=on_progress, **options)


if __name__ == "__main__":
    serve.serve.__kwdefaults__["start"] = lambda opened: Slow(opened, step_s=0.02)
    main(sys.argv[1:])
