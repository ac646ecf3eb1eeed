"""Boulder-Push, batched in tensors by the rules of Christianos et al.'s environment (Pareto Actor-Critic, 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv

STEPS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
"""Row and column offsets of the actions none, north, south, west, east."""
DIRECTIONS = 4
"""North, south, west, east, in the order of the actions."""


class BoulderPush(MultiAgentEnv):
    """Agents push a boulder as wide as they are many to the board's edge, which takes all of them at once.

    ``N`` agents live on a board of ``height`` rows and ``width`` columns, numbered from the north-west corner. The
    boulder fills ``N`` cells side by side, across its direction: a row of cells if it has to go north or south, a
    column if west or east. It has reached its goal when it lies along the edge of the board that it heads for.

    Actions: 0 none, 1 north, 2 south, 3 west, 4 east. Without ``noop``, the original's four: 0 north, 1 south,
    2 west, 3 east.

    A step:

    1. *Push.* If all agents choose the boulder's direction and each stands right behind one of its cells (on the
       side away from its goal), the boulder and all agents move one cell in that direction. All agents get
       ``push_reward``, and ``goal_reward`` on top if the boulder is now at its goal, which terminates the episode.
       A boulder at its goal moves no more.
    2. *Otherwise* the boulder stays, and agents move one after another, in an order drawn uniformly at random in each
       step. An agent whose way leads off the board, onto another agent (where that one stands at this moment) or onto
       the boulder stays. An agent that ran into the boulder, from any side, gets ``-penalty``.

    So rewards for pushes and the goal are common and the penalty is individual. Agents never share a cell or stand on
    the boulder; they follow each other if the order allows it and never swap.

    Start: the direction is uniform over the four. The boulder's place is uniform over those on the board that
    touch neither the edge it heads for nor the opposite one: there is room to push and at least one step to go. Agents
    are in cells drawn uniformly without replacement among those off the boulder. All of them have to be behind the
    boulder to move it, so none can stand in its way when it moves.

    Observation of an agent:

    - ``sight=None``: own row and column, row and column of the boulder's first (most northern or western) cell,
      direction one-hot (north, south, west, east), row and column of the other agents in index order. Rows are
      divided by ``height - 1`` and columns by ``width - 1``.
    - ``sight=s``, as in the original (where registered tasks have 4): direction one-hot, then two windows of
      ``(2 s + 1)^2`` cells around the agent in row-major order: 1 where an agent is (itself in the middle), then 1
      where the boulder is. Cells off the board are 0. An agent is not told where on the board it is.

    The original has no ``none`` action, reads height and width in turns (so only square boards work), and leaves the
    time limit to a wrapper; the rest is as there.

    Args:
        envs: boards side by side.
        height, width: of the board, at least 3 and at least ``agents``.
        agents: how many push, and the boulder's width.
        push_reward, goal_reward: to each agent for a push and for the push that reaches the goal.
        penalty: of running into the boulder.
        sight: ``None`` for coordinates, else the reach of the windows, in cells.
        noop: whether agents may stand still.
        episode_limit, time_limit: as in :class:`MultiAgentEnv`.
        device, seed: as in :class:`MultiAgentEnv`.

    Raises:
        ValueError: a board below 3 by 3 or narrower than the boulder, a negative penalty, a sight below 1, or a count
            below 1.
    """

    name = "boulder_push"

    def __init__(
        self,
        envs: int,
        *,
        height: int = 8,
        width: int = 8,
        agents: int = 2,
        push_reward: float = 0.1,
        goal_reward: float = 1.0,
        penalty: float = 0.01,
        sight: int | None = None,
        noop: bool = True,
        episode_limit: int = 50,
        time_limit: Literal["terminated", "truncated"] = "truncated",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if min(height, width) < 3:
            raise ValueError(f"BoulderPush: height, width: must be >= 3 (room to push), got {height}, {width}")
        if agents > min(height, width):
            raise ValueError(
                f"BoulderPush: agents: the boulder is as wide, at most {min(height, width)} fit, got {agents}"
            )
        if penalty < 0:
            raise ValueError(f"BoulderPush: penalty: must be >= 0 (it is subtracted), got {penalty}")
        if sight is not None and sight < 1:
            raise ValueError(f"BoulderPush: sight: must be >= 1, got {sight}")
        self._window = 0 if sight is None else (2 * sight + 1) ** 2
        super().__init__(
            envs,
            num_agents=agents,
            num_actions=len(STEPS) if noop else DIRECTIONS,
            observation_size=DIRECTIONS + (2 * (agents + 1) if sight is None else 2 * self._window),
            episode_limit=episode_limit,
            time_limit=time_limit,
            device=device,
            seed=seed,
        )
        self.height, self.width, self.sight, self.noop = height, width, sight, noop
        self.idle_action = 0 if noop else None
        self.push_reward, self.goal_reward, self.penalty = push_reward, goal_reward, penalty
        self._cells = height * width
        self._make_tables()
        # Strides put the environments last, where PyTorch's kernels vectorise. Cells are row * width + column.
        place = self.device
        self.fields = {
            "position": torch.zeros(agents, envs, dtype=torch.int64, device=place).t(),
            "boulder": torch.zeros(agents, envs, dtype=torch.int64, device=place).t(),  # its cells, ascending
            "direction": torch.zeros(envs, dtype=torch.int64, device=place),  # 0 north, 1 south, 2 west, 3 east
        }

    def _make_tables(self) -> None:
        height, width, cells, agents, place = self.height, self.width, self._cells, self.num_agents, self.device
        cell = torch.arange(cells)
        row, column = cell // width, cell % width
        step = torch.tensor(STEPS)
        to_row, to_column = row[:, None] + step[:, 0], column[:, None] + step[:, 1]
        inside = (to_row >= 0) & (to_row < height) & (to_column >= 0) & (to_column < width)
        # [cells * 5]: where an action leads, walls considered
        self._moves = torch.where(inside, to_row * width + to_column, cell[:, None]).flatten().to(place)
        self._first_action = 0 if self.noop else 1
        starts, at_goal = [], []
        for direction in range(DIRECTIONS):
            along = range(1, height - 1) if direction < 2 else range(1, width - 1)
            across = range(width - agents + 1) if direction < 2 else range(height - agents + 1)
            places = [(a, b) if direction < 2 else (b, a) for a in along for b in across]
            starts.append(torch.tensor([r * width + c for r, c in places]))
            at_goal.append((row == 0, row == height - 1, column == 0, column == width - 1)[direction])
        # how many places of the boulder each direction has, and its first cell in each
        self._places = torch.tensor([len(s) for s in starts], device=place)
        self._starts = torch.nn.utils.rnn.pad_sequence(starts, batch_first=True).to(place)
        self._at_goal = torch.cat(at_goal).to(place)  # [4 * cells]
        stride = torch.tensor([1, 1, width, width])
        self._spread = (stride[:, None] * torch.arange(agents)).to(place)  # [4, agents]: cells from the first one
        self._one_hot = torch.eye(DIRECTIONS, device=place)
        scaled = torch.stack([row / (height - 1), column / (width - 1)], -1)
        self._scaled = scaled.float().to(place)  # [cells, 2]
        self._row, self._column = row.to(place), column.to(place)
        self._layers = torch.tensor([[DIRECTIONS], [DIRECTIONS + self._window]], device=place)  # where windows start
        # what each agent lists of: direction, boulder, agents
        order = []
        for i in range(agents):
            others = [j for j in range(agents) if j != i]
            order += [6 + 2 * i, 7 + 2 * i, 4, 5, 0, 1, 2, 3]
            order += [6 + 2 * j + k for j in others for k in range(2)]
        self._order = torch.tensor(order, device=place)

    # -- start --------------------------------------------------------------------------------------------------------
    def _draw(self, rows: Tensor) -> None:
        count, agents, place = len(rows), self.num_agents, self.device
        direction = torch.randint(DIRECTIONS, (count,), generator=self.generator, device=place)
        places = self._places[direction]
        unit = torch.rand(count, generator=self.generator, device=place, dtype=torch.float64)
        first = self._starts[direction, (unit * places).long()]
        boulder = first.unsqueeze(1) + self._spread[direction]
        # the free cells with the most noise are a uniform draw without replacement
        noise = torch.rand(count, self._cells, generator=self.generator, device=place)
        position = noise.scatter_(1, boulder, -1.0).topk(agents).indices
        self._put(rows, position=position, boulder=boulder, direction=direction)

    def _put(self, rows: Tensor, **values: Tensor) -> None:
        for name, value in values.items():
            self.fields[name][rows] = value

    def inject(
        self,
        position: Tensor,
        boulder: Tensor,
        direction: Tensor,
        rows: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
    ) -> None:
        """Put given states into all boards, or into ``rows`` ``[R]``.

        Args:
            position: row and column of agents, int64 ``[R, agents, 2]``.
            boulder: row and column of the boulder's first (most northern or western) cell, int64 ``[R, 2]``.
            direction: 0 north, 1 south, 2 west, 3 east, int64 ``[R]``.
            elapsed: steps since the start of the episode, ``[R]``; 0 if not given.

        Raises:
            ValueError: wrong shapes, a boulder or agents off the board, a direction out of range, or agents on the
                boulder or on each other.
        """
        place = self.device
        rows = torch.arange(self.envs, device=place) if rows is None else rows.to(place)
        count = len(rows)
        position, boulder, direction = position.to(place), boulder.to(place), direction.to(place)
        for what, value, shape in (
            ("position", position, (count, self.num_agents, 2)),
            ("boulder", boulder, (count, 2)),
            ("direction", direction, (count,)),
        ):
            if value.shape != shape or value.dtype != torch.int64:
                raise ValueError(
                    f"BoulderPush: {what}: must be int64 {list(shape)}, got {value.dtype} {list(value.shape)}"
                )
        if bool(((direction < 0) | (direction >= DIRECTIONS)).any()):
            raise ValueError(f"BoulderPush: direction: must be in [0, {DIRECTIONS})")
        size = torch.tensor([self.height, self.width], device=place)
        upright = (direction >= 2).unsqueeze(1)
        reach = torch.where(upright, torch.tensor([1, 0], device=place), torch.tensor([0, 1], device=place))
        last = boulder + reach * (self.num_agents - 1)
        if bool(((position < 0) | (position >= size)).any() | ((boulder < 0) | (last >= size)).any()):
            raise ValueError(f"BoulderPush: position, boulder: must be on the {self.height} by {self.width} board")
        cell = position[..., 0] * self.width + position[..., 1]
        stone = (boulder[:, 0] * self.width + boulder[:, 1]).unsqueeze(1) + self._spread[direction]
        held = torch.zeros(count, self._cells, device=place)
        held.scatter_add_(1, torch.cat([cell, stone], 1), torch.ones(count, 2 * self.num_agents, device=place))
        if bool((held > 1).any()):
            raise ValueError("BoulderPush: position: agents must not be on the boulder or on each other")
        self._put(rows, position=cell, boulder=stone, direction=direction)
        self.elapsed[rows] = 0 if elapsed is None else elapsed.to(place)

    def positions(self) -> Tensor:
        """Row and column of every agent, ``[envs, agents, 2]`` int64."""
        cell = self.fields["position"]
        return torch.stack([cell // self.width, cell % self.width], -1)

    def boulders(self) -> Tensor:
        """Row and column of every cell of the boulder, ``[envs, agents, 2]`` int64."""
        cell = self.fields["boulder"]
        return torch.stack([cell // self.width, cell % self.width], -1)

    # -- step ---------------------------------------------------------------------------------------------------------
    def _turns(self) -> Tensor:
        """The order in which agents move this step, ``[agents, envs]``: who is first, second, ..."""
        noise = torch.rand(self.envs, self.num_agents, generator=self.generator, device=self.device)
        return noise.argsort(1).t().contiguous()

    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        here, boulder = self.fields["position"].t(), self.fields["boulder"].t()
        direction = self.fields["direction"]
        chosen = actions.t() + self._first_action  # 0 none, 1 + direction
        heading = direction + 1
        target = self._moves.take(torch.add(chosen, here, alpha=len(STEPS)))
        into = (target.unsqueeze(1) == boulder).any(1)  # runs into the boulder

        # Agents stand on different cells, so if all of them run into the boulder its way they are right behind it.
        ahead = self._moves.take(torch.add(heading, boulder, alpha=len(STEPS)))
        pushed = (into & (chosen == heading)).all(0) & (ahead[0] != boulder[0])
        after = torch.where(pushed, ahead, boulder)
        goal = pushed & self._at_goal.take(torch.add(after[0], direction, alpha=self._cells))

        # In a push all move to what they ran into; otherwise they move in turns, and who ran into the boulder stays.
        apart = torch.where(into, here, target)
        now = here.clone()
        for agent in self._turns().unsqueeze(1).unbind(0):
            to = apart.gather(0, agent)
            free = (now != to).all(0)
            now.scatter_(0, agent, torch.where(free, to, now.gather(0, agent)))
        torch.where(pushed, target, now, out=now)

        here.copy_(now)
        boulder.copy_(after)
        common = pushed * self.push_reward + goal * self.goal_reward
        reward = common - (into & ~pushed) * self.penalty
        return reward.t().contiguous(), goal

    # -- observation --------------------------------------------------------------------------------------------------
    def _observe(self, rows: Tensor | None = None) -> Tensor:
        position, boulder, direction = (self.fields[name] for name in ("position", "boulder", "direction"))
        if rows is not None:
            position, boulder, direction = position[rows], boulder[rows], direction[rows]
        one_hot = self._one_hot.index_select(0, direction)
        if self.sight is not None:
            return self._observe_near(position, boulder, one_hot)
        places = torch.cat([boulder[:, :1], position], 1)
        count = len(places)
        coordinates = self._scaled.index_select(0, places.reshape(-1)).view(count, -1)
        listed = torch.cat([one_hot, coordinates], 1)
        return listed.index_select(1, self._order).view(count, self.num_agents, -1)

    def _observe_near(self, position: Tensor, boulder: Tensor, one_hot: Tensor) -> Tensor:
        """Observations with windows, of ``position`` and ``boulder`` cells ``[envs, agents]``."""
        assert self.sight is not None
        sight, side, window = self.sight, 2 * self.sight + 1, self._window
        count, agents = position.shape
        things = torch.stack([position, boulder], 1).unsqueeze(1)  # [envs, 1, 2, agents]
        own = position.view(count, agents, 1, 1)
        down = self._row.take(things) - self._row.take(own) + sight
        across = self._column.take(things) - self._column.take(own) + sight
        seen = (down >= 0) & (down < side) & (across >= 0) & (across < side)
        size = DIRECTIONS + 2 * window
        slot = torch.where(seen, down * side + across + self._layers, size).flatten(2)
        observation = torch.zeros(count, agents, size + 1, device=self.device)  # the last one takes what is not seen
        observation.scatter_(2, slot, 1.0)
        observation[..., :DIRECTIONS] = one_hot.unsqueeze(1)
        return observation[..., :size].contiguous()
