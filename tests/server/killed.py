"""Runs `wanfast serve` with the stand-in in a process of its own, which tests kill."""

from __future__ import annotations

import sys

from tests.server import running
from wanfast.cli import main
from wanfast.server import serve

if __name__ == "__main__":
    serve.serve.__kwdefaults__["start"] = lambda opened: running.StandIn(opened, step_s=0.02)
    main(sys.argv[1:])
