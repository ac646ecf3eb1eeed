"""Multi-robot warehouse (RWARE; Papoudakis et al. 2021, NeurIPS datasets and benchmarks), the rules of rware 2.0.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv

NOOP, FORWARD, TURN_LEFT, TURN_RIGHT, TOGGLE = range(5)
UP, DOWN, LEFT, RIGHT = range(4)

_CLOCKWISE = (UP, RIGHT, DOWN, LEFT)
_STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # dx, dy of UP, DOWN, LEFT, RIGHT
_MARKS = 3  # what a cell shows of shelves: none, a shelf, a requested shelf
_CELL_FEATURES = 7  # agent present, its direction (4), shelf present, shelf requested


def _set_ranks(starts: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Order in which the package lists the agents of one crowd; ``None`` where it lists them as they were added.

    Cells are nodes, agents are edges ``start -> target``. rware hands each weakly connected component to networkx as a
    subgraph view; a view holding less than half of all nodes is listed in the order of a Python set of its cells. That
    order is decided by hashes and by the order of insertion, so the same sets are built here.
    """
    followers: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, target in zip(starts, targets, strict=True):
        followers.setdefault(start, [])
        followers.setdefault(target, []).append(start)
    heads_for = dict(zip(starts, targets, strict=True))
    ranks: dict[tuple[int, int], int] = {}
    done: set[tuple[int, int]] = set()
    for source in followers:
        if source in done:
            continue
        component, queue = {source}, [source]
        for cell in queue:
            ahead = [heads_for[cell]] if cell in heads_for else []
            for neighbour in ahead + followers[cell]:
                if neighbour not in component:
                    component.add(neighbour)
                    queue.append(neighbour)
        done |= component
        if 2 * len(component) < len(followers):
            copied = set(cell for cell in component)  # noqa: C401  (one by one, as the view does: it sets the order)
            ranks.update((cell, rank) for rank, cell in enumerate(copied))
    return [ranks.get(start) for start in starts]


class Warehouse(MultiAgentEnv):
    """Robots that fetch requested shelves, bring them to a goal and put them back.

    Actions: no-op, forward, turn left, turn right, toggle (lift the shelf underneath, or set down the carried one where
    there is no highway). A loaded robot cannot enter a cell with a standing shelf. An observation holds the robot's own
    x, y, whether it carries, its direction (one of four), whether it is on a highway, and for each cell of the square
    window around it, row by row: whether a robot is there, that robot's direction (``[1, 0, 0, 0]`` if none), whether
    a shelf is there and whether that is requested.

    Moves, as in rware: each robot heads for a cell, its own unless it goes forward. Following robot after robot, its
    way ends in a robot that stays, in two robots that would swap, in a larger circle of robots or in a free cell. In
    the first two cases it stays. Circles move, what waits behind them stays. Of all robots on the way to the same free
    cell the longest chain moves; between chains of equal length rware takes what networkx lists first, and so does
    this class.

    State (``self.fields``); cells are flat indices into the grid with a border ``sensor_range`` wide:

    - ``pose`` ``[envs, agents]``: cell * 4 + direction;
    - ``load`` ``[envs, agents]``: number of the carried shelf, from 1 in row-major order of their places; 0 for none;
    - ``standing`` ``[envs, cells]``: number of the shelf standing there;
    - ``marks`` ``[envs, shelves + 1]``: 2 for a requested shelf, 1 for others, 0 for "no shelf" in column 0;
    - ``shown`` ``[envs, cells]``: what observations show of a cell, following from the rest;
    - ``delivered`` ``[envs, agents]``: has delivered and not put down since (two-stage reward);
    - ``inactive`` ``[envs]``: steps since a delivery.

    Args:
        envs: copies in the batch.
        shelf_columns: groups of shelves side by side, odd; ``column_height``: shelves in a column; ``shelf_rows``:
            groups one above the other. The grid is ``(column_height + 1) * shelf_rows + 2`` high and
            ``3 * shelf_columns + 1`` wide.
        agents: robots.
        request_queue_size: shelves requested at any time; ``None``: as many as robots.
        sensor_range: cells seen in each direction.
        max_inactivity: steps without a delivery that terminate an episode; ``None``: never.
        reward_type: who gets 1 for a delivery: the robot (``individual``), each robot (``global``), or the robot
            a half then and a half when it sets the shelf down (``two_stage``).
        episode_limit: steps.
        time_limit: as in :class:`MultiAgentEnv`; rware terminates.
        layout: rows of ``x`` (shelf), ``.`` (highway) and ``g`` (goal); replaces the three sizes above.
        device, seed: as in :class:`MultiAgentEnv`.

    Raises:
        ValueError: a size out of range, more robots than cells, no goal in the layout, or as many requests as shelves.
    """

    name, idle_action = "rware", NOOP

    def __init__(
        self,
        envs: int,
        *,
        shelf_columns: int = 3,
        column_height: int = 8,
        shelf_rows: int = 1,
        agents: int = 2,
        request_queue_size: int | None = None,
        sensor_range: int = 1,
        max_inactivity: int | None = None,
        reward_type: Literal["individual", "global", "two_stage"] = "individual",
        episode_limit: int = 500,
        time_limit: Literal["terminated", "truncated"] = "terminated",
        layout: str | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if layout is None:
            plan = _plan_from_sizes(shelf_columns, column_height, shelf_rows)
        else:
            plan = _plan_from_layout(layout)
        requests = agents if request_queue_size is None else request_queue_size
        shelves = sum(line.count("x") for line in plan)
        height, width = len(plan), len(plan[0])
        if sensor_range < 1:
            raise ValueError(f"Warehouse: sensor_range must be >= 1, got {sensor_range}")
        if not 1 <= agents <= height * width:
            raise ValueError(f"Warehouse: agents must be in [1, {height * width}], one a cell, got {agents}")
        if not 1 <= requests < shelves:
            raise ValueError(
                f"Warehouse: request_queue_size must be in [1, {shelves}), below the {shelves} shelves, got {requests}"
            )
        if max_inactivity is not None and max_inactivity < 1:
            raise ValueError(f"Warehouse: max_inactivity must be >= 1 or None, got {max_inactivity}")
        if reward_type not in ("individual", "global", "two_stage"):
            raise ValueError(f"Warehouse: reward_type: individual, global or two_stage, got '{reward_type}'")
        side = 2 * sensor_range + 1
        super().__init__(
            envs,
            num_agents=agents,
            num_actions=5,
            observation_size=8 + _CELL_FEATURES * side * side,
            episode_limit=episode_limit,
            time_limit=time_limit,
            device=device,
            seed=seed,
        )
        self.common_reward = reward_type == "global"
        self.sensor_range, self.height, self.width, self.shelves = sensor_range, height, width, shelves
        self.requests, self.max_inactivity, self.reward_type = requests, max_inactivity, reward_type
        self._tables(plan)
        place = self.device
        self.fields = {
            "pose": torch.zeros(envs, agents, dtype=torch.int64, device=place),
            "load": torch.zeros(envs, agents, dtype=torch.int64, device=place),
            "standing": torch.zeros(envs, self._cells, dtype=torch.int64, device=place),
            "marks": torch.zeros(envs, shelves + 1, dtype=torch.uint8, device=place),
            "shown": torch.zeros(envs, self._cells, dtype=torch.uint8, device=place),
            "delivered": torch.zeros(envs, agents, dtype=torch.bool, device=place),
            "inactive": torch.zeros(envs, dtype=torch.int64, device=place),
        }
        self.restart()

    def _tables(self, plan: Sequence[str]) -> None:
        """What depends on the plan alone: moves, highways, goals, window offsets and what observations show."""
        place, reach = self.device, self.sensor_range
        stride = self.width + 2 * reach
        self._stride = stride
        self._cells = stride * (self.height + 2 * reach)
        inside = [(x, y) for y in range(self.height) for x in range(self.width)]
        flat = {(x, y): (y + reach) * stride + x + reach for x, y in inside}
        moves = torch.zeros(self._cells, 4, 5, dtype=torch.int64)
        toggles = torch.zeros(self._cells, 4, 5, dtype=torch.uint8)
        own = torch.zeros(self._cells, 4, 8)
        empty = torch.zeros(self._cells, dtype=torch.int64)
        places: list[int] = []
        goals: list[int] = []
        for x, y in inside:
            cell, kind = flat[x, y], plan[y][x]
            if kind == "x":
                places.append(cell)
                empty[cell] = len(places)
            elif kind == "g":
                goals.append(cell)
            for direction, (dx, dy) in enumerate(_STEPS):
                turn = _CLOCKWISE.index(direction)
                moves[cell, direction] = cell * 4 + direction
                moves[cell, direction, FORWARD] = flat.get((x + dx, y + dy), cell) * 4 + direction
                moves[cell, direction, TURN_LEFT] = cell * 4 + _CLOCKWISE[turn - 1]
                moves[cell, direction, TURN_RIGHT] = cell * 4 + _CLOCKWISE[(turn + 1) % 4]
                own[cell, direction, :2] = torch.tensor([x, y])
                own[cell, direction, 3 + direction] = 1.0
                own[cell, direction, 7] = float(kind != "x")
            # 1: only an empty robot can toggle here; 2: a loaded one as well
            toggles[cell, :, TOGGLE] = 2 if kind == "x" else 1
        features = torch.zeros(5, _MARKS, _CELL_FEATURES)  # robot: none, or 1 + direction
        features[0, :, 1] = 1.0
        for direction in range(4):
            features[1 + direction, :, 0] = 1.0
            features[1 + direction, :, 1 + direction] = 1.0
        features[:, 1:, 5] = 1.0
        features[:, 2, 6] = 1.0
        spread = range(-reach, reach + 1)
        self._moves = moves.flatten().to(place)
        self._toggles = toggles.flatten().to(place)
        self._own = own.flatten(0, 1).to(place)
        self._empty = empty.to(place)
        self._places = torch.tensor(places, device=place)
        self._goals = torch.tensor(goals, device=place)
        self._is_goal = torch.zeros(self._cells, dtype=torch.bool, device=place).index_fill_(0, self._goals, True)
        self._inside = torch.tensor([flat[at] for at in inside], device=place)
        self._features = features.flatten(0, 1).to(place)
        self._window = torch.tensor([dy * stride + dx for dy in spread for dx in spread], device=place)
        rows = torch.arange(self.envs, device=place).unsqueeze(1)
        self._cell_rows, self._mark_rows = rows * self._cells, rows * (self.shelves + 1)
        numbers = torch.arange(self.num_agents, device=place)
        self._numbers = numbers
        self._others = numbers.unsqueeze(1) != numbers
        self._earlier = numbers.unsqueeze(1) > numbers

    # -- random draws -------------------------------------------------------------------------------------------------
    def _draw(self, rows: Tensor) -> None:
        fields, place, draws = self.fields, self.device, self.generator
        count, agents = len(rows), self.num_agents
        spots = torch.rand(count, len(self._inside), device=place, generator=draws).topk(agents).indices
        directions = torch.randint(4, (count, agents), device=place, generator=draws)
        asked = torch.rand(count, self.shelves, device=place, generator=draws).topk(self.requests).indices
        marks = torch.ones(count, self.shelves + 1, dtype=torch.uint8, device=place)
        marks[:, 0] = 0
        fields["pose"][rows] = self._inside[spots] * 4 + directions
        fields["load"][rows] = 0
        fields["standing"][rows] = self._empty
        fields["marks"][rows] = marks.scatter_(1, asked + 1, 2)
        fields["delivered"][rows] = False
        fields["inactive"][rows] = 0
        self._show(rows)

    def _draw_request(self, rows: Tensor) -> Tensor:
        """Numbers ``[R]`` of shelves that take the place of a delivered one: uniform among those not requested."""
        chance = torch.rand(len(rows), self.shelves + 1, device=self.device, generator=self.generator)
        return chance.masked_fill_(self.fields["marks"][rows] != 1, -1.0).argmax(1)

    def _show(self, rows: Tensor) -> None:
        """Bring ``shown`` of ``rows`` up to date."""
        pose, load, standing, marks = (self.fields[name][rows] for name in ("pose", "load", "standing", "marks"))
        cell = pose >> 2
        shelf = load + standing.gather(1, cell)
        shown = marks.gather(1, standing)
        robots = (((pose & 3) + 1) * _MARKS).to(torch.uint8) + marks.gather(1, shelf)
        self.fields["shown"][rows] = shown.scatter_(1, cell, robots)

    # -- stepping -----------------------------------------------------------------------------------------------------
    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        fields = self.fields
        pose, load = fields["pose"], fields["load"]
        standing, marks, shown = (fields[name].view(-1) for name in ("standing", "marks", "shown"))
        choice = pose * 5 + actions
        wanted = self._moves[choice]
        cell, target = pose >> 2, wanted >> 2
        blocked = (standing[target + self._cell_rows] > 0) & (load > 0)
        target = torch.where(blocked, cell, target)
        if self.num_agents > 1:
            blocked |= self._collisions(cell, target)
        after = torch.where(blocked, pose, wanted)

        here = cell + self._cell_rows
        under = standing[here]
        swaps = self._toggles[choice] > (load > 0)  # either robot or cell has no shelf, so that a toggle is a swap
        lifted = torch.where(swaps, under, load)
        left = torch.where(swaps, load, under)
        standing[here] = left
        there = (after >> 2) + self._cell_rows
        mark = marks[lifted + standing[there] + self._mark_rows]
        shown[here] = marks[left + self._mark_rows]
        shown[there] = (((after & 3) + 1) * _MARKS).to(torch.uint8) + mark
        fields["pose"], fields["load"] = after, lifted

        reward = torch.zeros(self.envs, self.num_agents, device=self.device)
        if self.reward_type == "two_stage":
            dropped = swaps & (load > 0)
            reward += 0.5 * (dropped & fields["delivered"])
            fields["delivered"] &= ~dropped
        fields["inactive"] += 1
        arrived = (mark == 2) & self._is_goal[after >> 2]
        if bool(arrived.any()):
            self._deliver(arrived.any(1).nonzero().squeeze(1), reward)
        if self.max_inactivity is None:
            return reward, torch.zeros(self.envs, dtype=torch.bool, device=self.device)
        return reward, fields["inactive"] >= self.max_inactivity

    def _deliver(self, rows: Tensor, reward: Tensor) -> None:
        """Pay deliveries in ``rows`` ``[R]`` and replace the requests, goal after goal as the package does: a shelf
        that waits on a later goal can be requested, and so delivered, in the same step."""
        fields = self.fields
        cells = fields["pose"][rows] >> 2
        for goal in self._goals:
            here = cells == goal
            shelf = (here * fields["load"][rows]).sum(1)
            hit = (fields["marks"][rows, shelf] == 2).nonzero().squeeze(1)
            paid, chosen = rows[hit], here[hit]
            fresh = self._draw_request(paid)
            fields["marks"][paid, shelf[hit]] = 1
            fields["marks"][paid, fresh] = 2
            fields["inactive"][paid] = 0
            if self.reward_type == "global":
                reward[paid] += 1.0
            else:
                reward[paid] += chosen * (0.5 if self.reward_type == "two_stage" else 1.0)
            if self.reward_type == "two_stage":
                fields["delivered"][paid] |= chosen
        self._show(rows)

    def _collisions(self, cell: Tensor, target: Tensor) -> Tensor:
        """Robots ``[envs, agents]`` that other robots keep from moving from ``cell`` to ``target``."""
        ahead = target.unsqueeze(2)
        meets = ((ahead == cell.unsqueeze(1)) | (ahead == target.unsqueeze(1))) & self._others
        rows = meets.flatten(1).any(1).nonzero().squeeze(1)
        fails = torch.zeros_like(cell, dtype=torch.bool)
        if len(rows):
            fails[rows] = self._resolve(cell[rows], target[rows])
        return fails

    def _resolve(self, cell: Tensor, target: Tensor) -> Tensor:
        """As :meth:`_collisions`, for ``[R, agents]``, by walking the graph robot -> robot on its target cell."""
        agents, numbers = self.num_agents, self._numbers
        heads = target.unsqueeze(2) == cell.unsqueeze(1)  # [R, i, j]: i heads for the cell of j
        ahead = torch.where(heads, numbers, agents).amin(2)  # `agents` stands for a free cell
        ahead = torch.nn.functional.pad(ahead, (0, 1), value=agents)
        at = ahead.gather(1, ahead[:, :-1])
        short = at == numbers  # stays, or swaps
        cycles = torch.zeros_like(short)
        for _ in range(3, agents + 1):
            at = ahead.gather(1, at)
            cycles |= at == numbers
        cycles &= ~short
        free = at == agents

        # length of the longest chain behind each robot
        behind = heads & free.unsqueeze(2)
        chain = torch.zeros_like(cell)
        for _ in range(agents - 1):
            longer = ((chain + 1).unsqueeze(2) * behind).amax(1)
            if torch.equal(longer, chain):
                break
            chain = longer
        rivals = (target.unsqueeze(2) == target.unsqueeze(1)) & self._others & free.unsqueeze(2)
        equal = rivals & (chain.unsqueeze(2) == chain.unsqueeze(1))
        # cells become nodes in the order start 0, target 0, start 1, ...
        order = torch.where(heads, 2 * numbers.unsqueeze(1) + 1, 2 * agents).amin(1).minimum(2 * numbers)
        if agents > 3:
            order = self._set_order(cell, target, order, equal, ahead[:, :-1])
        first = order.unsqueeze(2) > order.unsqueeze(1)
        beaten = (rivals & (chain.unsqueeze(2) < chain.unsqueeze(1))) | (equal & first)
        wins = free & ~beaten.any(2)
        goes = wins
        for _ in range(agents - 1):
            padded = torch.nn.functional.pad(goes, (0, 1), value=True)
            onward = wins & padded.gather(1, ahead[:, :-1])
            if torch.equal(onward, goes):
                break
            goes = onward
        return (target != cell) & ~(goes | cycles)

    def _set_order(self, cell: Tensor, target: Tensor, order: Tensor, equal: Tensor, ahead: Tensor) -> Tensor:
        """``order`` with small components of the graph as :func:`_set_ranks` has them, where a tie needs it.

        A component with a tie has three cells or more, so that this happens from seven cells (four robots) on. Ties in
        components of less than half of the cells are rare, which is why a loop over them is good enough.
        """
        rows = equal.flatten(1).any(1)
        new = (ahead == self.num_agents) & ~((target.unsqueeze(2) == target.unsqueeze(1)) & self._earlier).any(2)
        rows &= new.sum(1) + self.num_agents > 6
        stride, reach = self._stride, self.sensor_range
        for row in rows.nonzero().squeeze(1).tolist():
            starts = [(c % stride - reach, c // stride - reach) for c in cell[row].tolist()]
            targets = [(c % stride - reach, c // stride - reach) for c in target[row].tolist()]
            ranks = _set_ranks(starts, targets)
            own = order[row].tolist()
            order[row] = torch.tensor([o if r is None else r for o, r in zip(own, ranks, strict=True)]).to(order)
        return order

    def _observe(self, rows: Tensor | None = None) -> Tensor:
        pose, load = self.fields["pose"], self.fields["load"]
        base = self._cell_rows
        if rows is not None:
            pose, load, base = pose[rows], load[rows], base[rows]
        count = len(pose)
        own = self._own[pose]
        own[..., 2] = load > 0
        at = ((pose >> 2) + base).unsqueeze(2) + self._window
        shown = self.fields["shown"].view(-1)[at.flatten()]
        window = self._features.index_select(0, shown.to(torch.int32))
        return torch.cat((own, window.view(count, self.num_agents, -1)), 2)

    # -- whole state in plain numbers ---------------------------------------------------------------------------------
    def read_state(self) -> dict[str, Tensor]:
        """State of all copies, without the border.

        Returns:
            ``agents`` ``[envs, agents, 4]``: x, y, direction (up, down, left, right), number of the carried shelf or
            0; ``shelves`` ``[envs, shelves, 2]``: x, y of shelf 1, 2, ...; ``requested`` ``[envs, shelves]`` bool;
            ``delivered`` ``[envs, agents]`` bool; ``elapsed`` and ``inactive`` ``[envs]``: steps.
        """
        pose, load = self.fields["pose"], self.fields["load"]
        cell = pose >> 2
        x, y = cell % self._stride - self.sensor_range, cell // self._stride - self.sensor_range
        at = torch.zeros(self.envs, self.shelves + 1, dtype=torch.int64, device=self.device)
        cells = torch.arange(self._cells, device=self.device).expand(self.envs, -1)
        at.scatter_(1, self.fields["standing"], cells)
        at.scatter_(1, load, cell)
        at = at[:, 1:]
        shelves = torch.stack((at % self._stride - self.sensor_range, at // self._stride - self.sensor_range), 2)
        return {
            "agents": torch.stack((x, y, pose & 3, load), 2),
            "shelves": shelves,
            "requested": self.fields["marks"][:, 1:] == 2,
            "delivered": self.fields["delivered"].clone(),
            "elapsed": self.elapsed.clone(),
            "inactive": self.fields["inactive"].clone(),
        }

    def write_state(self, state: Mapping[str, Tensor], rows: Tensor | None = None) -> None:
        """Put what :meth:`read_state` returns into all copies, or into ``rows`` ``[R]``.

        Raises:
            ValueError: a shape that does not fit, something off the grid, two robots or two shelves in a cell, a
                carried shelf that is not where its robot is, or another number of requests.
        """
        place = self.device
        rows = torch.arange(self.envs, device=place) if rows is None else rows
        count = len(rows)
        state = {name: value.to(place) for name, value in state.items()}
        for name, now in self.read_state().items():
            shape = (count, *now.shape[1:])
            if name not in state or state[name].shape != shape:
                got = list(state[name].shape) if name in state else "nothing"
                raise ValueError(f"Warehouse: state: '{name}' must be {list(shape)}, got {got}")
        x, y, direction, load = state["agents"].unbind(2)
        for name, values, end in (
            ("x of agents", x, self.width),
            ("y of agents", y, self.height),
            ("direction", direction, 4),
            ("carried shelf", load, self.shelves + 1),
            ("x of shelves", state["shelves"][..., 0], self.width),
            ("y of shelves", state["shelves"][..., 1], self.height),
        ):
            if bool(((values < 0) | (values >= end)).any()):
                raise ValueError(
                    f"Warehouse: state: {name} must be in [0, {end}), got [{int(values.min())}, {int(values.max())}]"
                )
        cell = (y + self.sensor_range) * self._stride + x + self.sensor_range
        at = (state["shelves"][..., 1] + self.sensor_range) * self._stride + state["shelves"][..., 0]
        at = torch.nn.functional.pad(at + self.sensor_range, (1, 0))
        for name, cells in (("robots", cell), ("shelves", at)):
            ordered = cells.sort(1).values
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise ValueError(f"Warehouse: state: two {name} in one cell")
        if bool(((load > 0) & (at.gather(1, load) != cell)).any()):
            raise ValueError("Warehouse: state: a carried shelf must be where its robot is")
        if bool((state["requested"].sum(1) != self.requests).any()):
            raise ValueError(f"Warehouse: state: 'requested' must mark {self.requests} shelves")
        standing = torch.zeros(count, self._cells, dtype=torch.int64, device=place)
        standing.scatter_(1, at, torch.arange(self.shelves + 1, device=place).expand(count, -1))
        standing.scatter_(1, torch.where(load > 0, cell, 0), 0)
        self.fields["pose"][rows] = cell * 4 + direction
        self.fields["load"][rows] = load
        self.fields["standing"][rows] = standing
        self.fields["marks"][rows] = torch.nn.functional.pad(state["requested"].to(torch.uint8) + 1, (1, 0))
        self.fields["delivered"][rows] = state["delivered"]
        self.fields["inactive"][rows] = state["inactive"]
        self.elapsed[rows] = state["elapsed"]
        self._show(rows)


def _plan_from_sizes(columns: int, column_height: int, rows: int) -> list[str]:
    """Rows of ``x``, ``.`` and ``g``, top first, as the package lays them out."""
    if columns < 1 or columns % 2 == 0 or column_height < 1 or rows < 1:
        raise ValueError(
            "Warehouse: shelf_columns must be odd, column_height and shelf_rows must be >= 1, got "
            f"{columns}, {column_height} and {rows}"
        )
    height, width = (column_height + 1) * rows + 2, 3 * columns + 1
    middle = (width // 2 - 1, width // 2)

    def kind(x: int, y: int) -> str:
        if y == height - 1:
            return "g" if x in middle else "."
        queue = x in middle and y > height - (column_height + 3)
        return "." if x % 3 == 0 or y % (column_height + 1) == 0 or queue else "x"

    return ["".join(kind(x, y) for x in range(width)) for y in range(height)]


def _plan_from_layout(layout: str) -> list[str]:
    plan = layout.strip().replace(" ", "").lower().split("\n")
    if len({len(line) for line in plan}) != 1 or not set("".join(plan)) <= set("gx."):
        raise ValueError("Warehouse: layout: needs lines of equal length made of 'x', '.' and 'g'")
    if not any("g" in line for line in plan):
        raise ValueError("Warehouse: layout: needs a goal 'g'")
    return plan
