"""Reports in as few words as update rules read of them."""

from __future__ import annotations

from typing import Any

LARGE = 3.0


def finding(
    name: str, deficit: float | None, direction: str = "up", tau: float = 1.0, scale: float = 1.0, **changed
) -> dict:
    """A judgement and the fresh figure that it is on; ``changed``: fields of the figure."""
    sign = 1.0 if direction == "up" else -1.0
    bound = tau - sign * scale * (deficit or 0.0)
    figure = {
        "name": name, "split": "fresh", "status": "measured", "reason": "", "value": bound + sign, "low": bound,
        "high": bound + LARGE, "direction": direction, "conditions": {},
    } | changed  # fmt: skip
    if direction == "down" and "high" not in changed:
        figure |= {"low": bound - LARGE, "high": bound}
    judged = {
        "figure": name, "direction": direction, "tau": tau, "scale": scale, "kind": "gate", "deficit": deficit,
        "raw": "fail", "ruling": "fail", "reason": "",
    }  # fmt: skip
    return {"judged": judged, "figure": figure}


def report(*findings: dict) -> dict[str, Any]:
    """A report of these, with anchor figures that nothing may read."""
    fresh = [dict(one["figure"]) for one in findings]
    anchor = [{**one, "split": "anchor", "value": 0.5, "low": 0.4, "high": 0.6} for one in fresh]
    return {"figures": [*fresh, *anchor], "judgements": [dict(one["judged"]) for one in findings]}
