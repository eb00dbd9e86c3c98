"""The JSON beside every video: what was asked, what ran, with which versions, how long; enough to run it again."""

from __future__ import annotations

from typing import Any

from wanfast.runtime.machine.packages import versions
from wanfast.runtime.planning.plan import Plan


def planned(plan: Plan) -> dict[str, Any]:
    """The result document before any work: a dry run's; a run adds its seconds, memory, hardware and weights."""
    return {
        "output": plan.config.output.output,
        "plan": plan.to_json(),
        "requested": dict(plan.requested),
        "effective": plan.config.to_json(),
        "seconds": {},
        "versions": versions(),
    }
