"""The routing problems by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from datamodules.routing.cvrp import CVRP
from datamodules.routing.op import OP
from datamodules.routing.pctsp import PCTSP, SPCTSP
from datamodules.routing.problem import Problem
from datamodules.routing.sdvrp import SDVRP
from datamodules.routing.tsp import TSP

_KINDS: tuple[type[Problem], ...] = (TSP, CVRP, SDVRP, PCTSP, SPCTSP, OP)
PROBLEMS: dict[str, type[Problem]] = {kind.spec.name: kind for kind in _KINDS}
"""The problems by name."""


def make_problem(name: str, **options: Any) -> Problem:
    """The problem called ``name``, made with its constructor's ``options`` (``capacity`` of cvrp, say).

    Raises:
        ValueError: an unknown name or option, naming those there are, or an option out of range.
    """
    kind = PROBLEMS.get(name)
    if kind is None:
        near = difflib.get_close_matches(str(name), PROBLEMS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"problem: unknown name {name!r}{meant}: choose one of {', '.join(PROBLEMS)}")
    takes_any = kind.__init__ is object.__init__  # its signature says *args, **kwargs, but it takes nothing
    known = [] if takes_any else list(inspect.signature(kind).parameters)
    for key in options:
        if key not in known:
            raise ValueError(f"problem: {name} has no option {key!r}: it has {', '.join(known) or 'none'}")
    return kind(**options)
