"""Names of multi-agent tasks and what they stand for. A name is only ever looked up or parsed by a fixed grammar."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torchrl.envs import EnvBase

Arguments = dict[str, Any]

SUITES: dict[str, tuple[str, ...]] = {
    # The environments and counts of EMAX (arXiv 2302.03439); the choice of tasks within them is ours.
    "emax21": (
        "lbf/8x8-2p-2f-coop",
        "lbf/8x8-3p-1f-coop",
        "lbf/10x10-3p-3f",
        "lbf/10x10-4p-2f-coop",
        "lbf/10x10-4p-4f-coop",
        "lbf/15x15-4p-3f",
        "lbf/2s-8x8-2p-2f-coop",
        "bpush/8x8-2ag",
        "bpush/8x8-3ag",
        "bpush/12x12-2ag",
        "bpush/12x12-4ag",
        "bpush/20x20-2ag",
        "rware/tiny-2ag",
        "rware/tiny-4ag",
        "rware/small-2ag",
        "rware/small-4ag",
        "mpe/spread-3",
        "mpe/spread-4",
        "mpe/spread-5",
        "mpe/tag",
        "mpe/adversary",
    ),
    # Minutes on a laptop's processor.
    "laptop": (
        "matrix/climbing",
        "matrix/penalty-100",
        "lbf/5x5-2p-1f-coop",
        "lbf/8x8-2p-2f",
        "lbf/8x8-2p-2f-coop",
        "bpush/6x6-2ag",
    ),
}
"""Named lists of tasks."""

# What lbforaging 2.0.0 and rware 2.0.0 register.
_LBF_SIZES, _LBF_PLAYERS, _LBF_FOOD = range(5, 20), range(2, 10), range(1, 5)
_RWARE_SIZES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5)}  # shelf rows, shelf columns
_RWARE_REQUESTS = {"": 1.0, "-easy": 2.0, "-hard": 0.5}  # requested shelves per agent
_RWARE_AGENTS = range(1, 20)
_BPUSH_SIZES, _BPUSH_AGENTS = (6, 8, 10, 12, 16, 20), (2, 3, 4)  # listed; other sizes are understood too
_SPREAD_AGENTS = range(2, 7)
_PENALTIES = (0, 25, 50, 75, 100)

# Scenarios of vmas 1.5.2 and maps of SMAC: an id outside these lists never reaches the package, which would import it.
_VMAS = (
    "balance", "ball_passage", "ball_trajectory", "buzz_wire", "discovery", "dispersion", "dropout", "flocking",
    "football", "give_way", "joint_passage", "joint_passage_size", "multi_give_way", "navigation", "passage",
    "reverse_transport", "road_traffic", "sampling", "transport", "wheel", "wind_flocking", "simple",
    "simple_adversary", "simple_crypto", "simple_push", "simple_reference", "simple_speaker_listener",
    "simple_spread", "simple_tag", "simple_world_comm",
)  # fmt: skip
_SMAC = (
    "3m", "8m", "25m", "5m_vs_6m", "8m_vs_9m", "10m_vs_11m", "27m_vs_30m", "MMM", "MMM2", "2s3z", "3s5z",
    "3s5z_vs_3s6z", "3s_vs_3z", "3s_vs_4z", "3s_vs_5z", "1c3s5z", "2m_vs_1z", "corridor", "6h_vs_8z", "2s_vs_1sc",
    "so_many_baneling", "bane_vs_bane", "2c_vs_64zg",
)  # fmt: skip


def known_tasks() -> list[str]:
    """Every task id that :func:`make_env` lists; boulder pushing also understands other sizes."""
    lbf = [
        f"lbf/{sight}{size}x{size}-{players}p-{food}f{coop}"
        for sight in ("", "2s-")
        for size in _LBF_SIZES
        for players in _LBF_PLAYERS
        for food in _LBF_FOOD
        for coop in ("", "-coop")
    ]
    rware = [
        f"rware/{size}-{agents}ag{requests}"
        for size in _RWARE_SIZES
        for agents in _RWARE_AGENTS
        for requests, share in _RWARE_REQUESTS.items()
        if int(agents * share) >= 1
    ]
    return [
        *lbf,
        *rware,
        *(f"bpush/{size}x{size}-{agents}ag" for size in _BPUSH_SIZES for agents in _BPUSH_AGENTS),
        *(f"mpe/spread-{agents}" for agents in _SPREAD_AGENTS),
        "mpe/tag",
        "mpe/adversary",
        "matrix/climbing",
        *("matrix/penalty-" + str(k) for k in _PENALTIES),
        *(f"vmas/{scenario}" for scenario in _VMAS),
        *(f"smac/{name}" for name in _SMAC),
    ]


# -- grammar: from the part after the family's name to constructor arguments; None where it does not fit ---------------
def _parse_lbf(name: str) -> Arguments | None:
    found = re.fullmatch(r"(2s-)?(\d{1,2})x(\d{1,2})-(\d{1,2})p-(\d{1,2})f(-coop)?(-ind)?(-pen)?", name)
    if found is None:
        return None
    sight, (rows, columns, players, food) = found[1], (int(found[i]) for i in (2, 3, 4, 5))
    if found[7] or found[8]:
        suffix, option = ("-ind", "max_food_level: 1") if found[7] else ("-pen", "penalty: 0.1")
        plain = name.replace("-ind", "").replace("-pen", "")
        raise ValueError(
            f"task 'lbf/{name}': lbforaging registers no '{suffix}' ids; take 'lbf/{plain}' with options: {{{option}}}"
        )
    for what, value, allowed, option in (
        ("food counts", food, _LBF_FOOD, f"food: {food}"),
        ("player counts", players, _LBF_PLAYERS, f"agents: {players}"),
        ("sizes", rows, _LBF_SIZES, f"rows: {rows}, columns: {columns}"),
    ):
        square = rows == columns or what != "sizes"
        if value not in allowed or not square:
            low, high = allowed[0], allowed[-1]
            rule = f"{what} {low}..{high} only" if square else "square fields only"
            size, count, items = (_clip(rows, _LBF_SIZES), _clip(players, _LBF_PLAYERS), _clip(food, _LBF_FOOD))
            near = f"lbf/{sight or ''}{size}x{size}-{count}p-{items}f{found[6] or ''}"
            raise ValueError(
                f"task 'lbf/{name}': lbforaging registers {rule}; to construct it anyway take '{near}' with "
                f"options: {{{option}}}"
            )
    return {
        "rows": rows,
        "columns": columns,
        "agents": players,
        "food": food,
        "sight": 2 if sight else None,
        "coop": found[6] is not None,
    }


def _parse_rware(name: str) -> Arguments | None:
    found = re.fullmatch(rf"({'|'.join(_RWARE_SIZES)})-(\d{{1,2}})ag(-easy|-hard)?", name)
    if found is None or int(found[2]) not in _RWARE_AGENTS:
        return None
    agents, (rows, columns) = int(found[2]), _RWARE_SIZES[found[1]]
    requests = int(agents * _RWARE_REQUESTS[found[3] or ""])
    if requests < 1:
        raise ValueError(f"task 'rware/{name}': requests no shelf at all (half of one agent); take two agents or more")
    return {
        "shelf_columns": columns,
        "column_height": 8,
        "shelf_rows": rows,
        "agents": agents,
        "request_queue_size": requests,
    }


def _parse_bpush(name: str) -> Arguments | None:
    found = re.fullmatch(r"(\d{1,3})x(\d{1,3})-(\d{1,2})ag", name)
    if found is None:
        return None
    return {"height": int(found[1]), "width": int(found[2]), "agents": int(found[3])}


def _parse_mpe(name: str) -> Arguments | None:
    if name in ("tag", "adversary"):
        return {}
    found = re.fullmatch(r"spread-(\d)", name)
    return {"agents": int(found[1])} if found and int(found[1]) in _SPREAD_AGENTS else None


def _parse_matrix(name: str) -> Arguments | None:
    from datamodules.envs.matrix_games import CLIMBING, penalty_table

    if name == "climbing":
        return {"payoffs": CLIMBING}
    found = re.fullmatch(r"penalty-(\d{1,3})", name)
    return {"payoffs": penalty_table(-float(found[1]))} if found and int(found[1]) in _PENALTIES else None


def _clip(value: int, allowed: range) -> int:
    return min(max(value, allowed[0]), allowed[-1])


_PARSERS: dict[str, Callable[[str], Arguments | None]] = {
    "lbf": _parse_lbf,
    "rware": _parse_rware,
    "bpush": _parse_bpush,
    "mpe": _parse_mpe,
    "matrix": _parse_matrix,
    "vmas": lambda name: {"scenario": name} if name in _VMAS else None,
    "smac": lambda name: {"map_name": name} if name in _SMAC else None,
}
_ONLY = {"bpush": "tensor", "matrix": "tensor", "vmas": "package", "smac": "package"}


def _tensor_class(family: str, name: str) -> type[EnvBase]:
    if family == "lbf":
        from datamodules.envs.foraging import Foraging

        return Foraging
    if family == "rware":
        from datamodules.envs.warehouse import Warehouse

        return Warehouse
    if family == "bpush":
        from datamodules.envs.boulder_push import BoulderPush

        return BoulderPush
    if family == "matrix":
        from datamodules.envs.matrix_games import MatrixGame

        return MatrixGame
    from datamodules.envs import particles

    return {"s": particles.Spread, "t": particles.Tag, "a": particles.Adversary}[name[0]]


def _package_class(family: str, name: str) -> type[EnvBase]:
    from datamodules.envs import adapters

    if family == "mpe":
        return {"s": adapters.PackageSpread, "t": adapters.PackageTag, "a": adapters.PackageAdversary}[name[0]]
    if family == "lbf":
        return adapters.PackageForaging
    if family == "rware":
        return adapters.PackageWarehouse
    if family == "smac":
        return adapters.PackageSmac
    from datamodules.envs.vmas_adapter import PackageVmas

    return PackageVmas


def make_env(
    task: str,
    envs: int,
    *,
    backend: Literal["tensor", "package"] = "tensor",
    device: torch.device | str = "cpu",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    workers: int = 0,
) -> EnvBase:
    """``envs`` copies of a task as one environment with the keys of :class:`datamodules.envs.base.MultiAgentEnv`.

    Args:
        task: id as in :func:`known_tasks`, such as ``lbf/8x8-2p-2f-coop`` (ids of lbforaging without prefix and
            suffix), ``rware/tiny-2ag-hard``, ``bpush/8x8-2ag`` (height x width), ``mpe/spread-3``, ``mpe/tag``,
            ``matrix/penalty-100`` (k = -100), ``vmas/simple_spread`` or ``smac/3m``.
        envs: copies in the batch.
        backend: ``tensor``: Plumbline's own batched environment; ``package``: the original package, stepped copy by
            copy. ``vmas`` and ``smac`` have the package alone, ``bpush`` and ``matrix`` the tensors alone.
        device: where the batch lives; packages step on the processor.
        seed: of the environment's generator.
        options: overrides arguments of the environment's constructor.
        workers: processes that the copies of a package are split over; 0: this one.

    Raises:
        ValueError: for an unknown task, backend or option, naming the nearest known ones; for a value that the
            environment refuses.
        ImportError: one line, if the package is missing.
    """
    family, _, name = task.partition("/")
    arguments = _PARSERS[family](name) if family in _PARSERS else None
    if arguments is None:
        near = difflib.get_close_matches(task, known_tasks(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"families are {', '.join(_PARSERS)}"
        raise ValueError(f"task: no task '{task}'; {hint}")
    if backend not in ("tensor", "package"):
        raise ValueError(f"backend: tensor or package, got '{backend}'")
    if _ONLY.get(family, backend) != backend:
        raise ValueError(f"backend: '{task}' has backend {_ONLY[family]} only, got '{backend}'")
    if workers < 0 or (workers > 0 and backend == "tensor"):
        raise ValueError(f"workers: needs backend package and a count >= 0 (tensors need none), got {workers}")
    kind = _tensor_class(family, name) if backend == "tensor" else _package_class(family, name)
    allowed = [
        key
        for key in inspect.signature(kind.__init__).parameters  # signature(kind) is that of EnvBase's metaclass
        if key not in ("self", "envs", "device", "seed", "workers")
    ]
    for key in options or {}:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"options: {kind.__name__} has no '{key}'; nearest is '{near}' of {', '.join(sorted(allowed))}"
            )
    arguments = {**arguments, **(options or {}), "device": device, "seed": seed}
    if backend == "package":
        arguments["workers"] = workers
    return cast(Callable[..., EnvBase], kind)(envs, **arguments)
