"""Level-Based Foraging, batched in tensors by the rules of lbforaging 2.0.0 (Papoudakis et al. 2021)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv

STEPS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
"""Row and column offsets of the actions none, north, south, west, east, load."""
LOAD = 5
ACTIONS = len(STEPS)


class Foraging(MultiAgentEnv):
    """Players with levels gather food that only players with enough level in sum can load.

    The actions are 0 none, 1 north, 2 south, 3 west, 4 east, 5 load. A step, as in lbforaging 2.0.0:

    1. A move off the board or onto food, and a load with no food beside the player, count as none.
    2. All players name the cell they want to be in (their own if they do not move). A player moves if and only if
       nobody else named its cell. So players may swap cells and follow each other, and, where there are three or
       more, one can end up on the cell of another whose own move failed.
    3. Food is loaded if the levels of the players that load beside it sum to its level or more. Each of them then gets
       ``level * food_level / (sum of their levels * sum of all food levels at the start)``, so all rewards of an
       episode sum to at most 1. If the levels do not suffice, each of them gets ``-penalty``.
    4. The episode terminates when no food is left.

    Start: players in cells drawn uniformly without replacement, levels uniform in ``[min_agent_level,
    max_agent_level]``. Food lies off the border, never on a player, in the eight cells around other food, or two cells
    straight from it; where no cell is left there is less food than ``food``. Food levels are uniform in
    ``[1, m]``, where ``m`` is the sum of the (up to three) lowest player levels, or ``max_food_level``; with ``coop``
    they are all ``m``.

    Observation of an agent, not scaled: ``(row, column, level)`` of the food it sees, in row-major order, then of
    itself, then of the other players it sees, in index order; ``(-1, -1, 0)`` pads both lists. With ``sight`` below
    the board's size, coordinates count from the corner of the window that is cut off at the board's edge; food is seen
    up to ``sight`` cells away in each direction, but players anywhere in the ``2 * sight + 1`` rows and columns
    that start at that corner, which is farther near the top and left edges (so in the package).

    Args:
        envs: boards side by side.
        rows, columns: of the board, at least 3 each.
        agents: players.
        food: pieces of food.
        sight: how far a player sees, in cells; ``None``: the whole board.
        coop: whether all food is of the highest level.
        min_agent_level, max_agent_level: bounds of player levels.
        max_food_level: of every piece of food, instead of the sum of the lowest player levels.
        penalty: of a failed load.
        normalise_reward: divide rewards as in 3; otherwise a loader gets ``level * food_level``.
        remember_positions: repeat what the package does from its second episode on: no player starts where it or a
            player with a higher index ended the episode before. Off, episodes are independent.
        episode_limit, time_limit: as in :class:`MultiAgentEnv`; the package reports the limit as termination.
        device, seed: as in :class:`MultiAgentEnv`.

    Raises:
        ValueError: a board too small for its players or below 3 by 3, a level below 1 or bounds in the wrong order, a
            sight below 1, a negative penalty, or a count below 1.
    """

    name = "foraging"
    idle_action = 0

    def __init__(
        self,
        envs: int,
        *,
        rows: int = 8,
        columns: int = 8,
        agents: int = 2,
        food: int = 2,
        sight: int | None = None,
        coop: bool = False,
        min_agent_level: int = 1,
        max_agent_level: int = 2,
        max_food_level: int | None = None,
        penalty: float = 0.0,
        normalise_reward: bool = True,
        remember_positions: bool = False,
        episode_limit: int = 50,
        time_limit: Literal["terminated", "truncated"] = "terminated",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if min(rows, columns) < 3:
            raise ValueError(f"Foraging: rows, columns: must be >= 3 (food lies inside), got {rows}, {columns}")
        if food < 1:
            raise ValueError(f"Foraging: food: must be >= 1, got {food}")
        if agents > rows * columns:
            raise ValueError(f"Foraging: agents: at most {rows * columns} fit on the board, got {agents}")
        if not 1 <= min_agent_level <= max_agent_level:
            raise ValueError(
                "Foraging: agent levels: need 1 <= min_agent_level <= max_agent_level, "
                f"got {min_agent_level}, {max_agent_level}"
            )
        if max_food_level is not None and max_food_level < 1:
            raise ValueError(f"Foraging: max_food_level: must be >= 1, got {max_food_level}")
        if sight is not None and sight < 1:
            raise ValueError(f"Foraging: sight: must be >= 1, got {sight}")
        if penalty < 0:
            raise ValueError(f"Foraging: penalty: must be >= 0 (it is subtracted), got {penalty}")
        super().__init__(
            envs,
            num_agents=agents,
            num_actions=ACTIONS,
            observation_size=3 * (food + agents),
            episode_limit=episode_limit,
            time_limit=time_limit,
            device=device,
            seed=seed,
        )
        self.rows, self.columns, self.food = rows, columns, food
        self.sight = None if sight is None or sight >= max(rows, columns) - 1 else sight
        self.coop, self.penalty, self.normalise_reward = coop, penalty, normalise_reward
        self.best_return = 1.0 if normalise_reward else None
        self.min_agent_level, self.max_agent_level = min_agent_level, max_agent_level
        self.max_food_level, self.remember_positions = max_food_level, remember_positions
        self._cells = rows * columns
        top = max_food_level or max_agent_level * min(3, agents)
        # Food and players are coded as cell * levels + level, food that is gone as the largest code, so that sorting
        # codes gives row-major order with the gaps last and one look-up gives what agents observe.
        self._levels = max(top, max_agent_level) + 1
        self._gone = self._cells * self._levels
        self._make_tables()

        # Strides put the environments last, where PyTorch's kernels vectorise.
        place, cells = self.device, self._cells
        self.fields = {
            # row * columns + column; `cells` before the first episode
            "position": torch.full((agents, envs), cells, dtype=torch.int64, device=place).t(),
            "level": torch.ones(agents, envs, dtype=torch.int64, device=place).t(),
            # codes, ascending
            "food": torch.full((food, envs), self._gone, dtype=torch.int64, device=place).t(),
            # sum of the food levels at the start
            "spawned": torch.zeros(envs, dtype=torch.int64, device=place),
        }

    def _make_tables(self) -> None:
        rows, columns, cells, levels = self.rows, self.columns, self._cells, self._levels
        place = self.device
        cell = torch.arange(cells)
        row, column = cell // columns, cell % columns
        step = torch.tensor(STEPS)
        to_row, to_column = row[:, None] + step[:, 0], column[:, None] + step[:, 1]
        inside = (to_row >= 0) & (to_row < rows) & (to_column >= 0) & (to_column < columns)
        # [cells * actions]: where an action leads, walls considered
        self._moves = torch.where(inside, to_row * columns + to_column, cell[:, None]).flatten().to(place)
        # [cells * actions]: the player's cell if it loads, else `cells`
        loader = torch.full((cells, ACTIONS), cells)
        loader[:, LOAD] = cell
        self._loaders = loader.flatten().to(place)
        down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()
        beside = torch.zeros(cells + 1, cells + 1)
        beside[:cells, :cells] = (down + across == 1).float()
        self._beside = beside.flatten().to(place)  # [(cells + 1)^2]: 1 where two cells share a side
        near = ((down <= 1) & (across <= 1)) | ((down == 0) & (across <= 2)) | ((across == 0) & (down <= 2))
        self._near = near.float().to(place)  # [cells, cells]: whether food in both would be too near
        border = (row == 0) | (row == rows - 1) | (column == 0) | (column == columns - 1)
        self._border = border.float().to(place)
        self._cell_of = (torch.arange(self._gone + 1) // levels).to(place)
        level_of = torch.arange(self._gone + 1) % levels
        self._level_of = level_of.to(place)
        need = level_of.float()
        need[-1] = torch.inf
        self._need_of = need.to(place)  # [codes]: levels that load it
        seen = torch.stack([row.repeat_interleave(levels), column.repeat_interleave(levels), level_of[:-1]], -1)
        self._seen_as = torch.cat([seen, torch.tensor([[-1, -1, 0]])]).float().to(place)  # [codes, 3]
        agents, food = self.num_agents, self.food
        order = [[*range(food), food + i, *(food + j for j in range(agents) if j != i)] for i in range(agents)]
        self._order = torch.tensor(order, device=place).flatten()  # [agents * (food + agents)]: what each lists

    # -- start --------------------------------------------------------------------------------------------------------
    def _draw(self, rows: Tensor) -> None:
        count, agents, cells = len(rows), self.num_agents, self._cells
        # The free cell with the largest noise is uniform among the free cells: the law of the package's retries.
        noise = torch.rand(count, 1 + self.food, cells, generator=self.generator, device=self.device)
        if self.remember_positions:
            position = self._draw_around(self.fields["position"][rows])
        else:
            position = noise[:, 0].topk(agents).indices
        level = self._integers(self.min_agent_level, self.max_agent_level, (count, agents))
        if self.max_food_level is not None:
            top = torch.full((count, 1), self.max_food_level, device=self.device)
        else:
            lowest = level if agents <= 3 else level.sort(1).values[:, :3]
            top = lowest.sum(1, keepdim=True)
        if self.coop:
            food_level = top.expand(count, self.food)
        else:
            unit = torch.rand(count, self.food, generator=self.generator, device=self.device)
            food_level = (unit * top).long() + 1
        taken = self._border.expand(count, cells).scatter(1, position, 1.0)
        best, cell = (noise[:, 1] - taken).max(1)
        pieces = [(best, cell)]
        for piece in range(2, 1 + self.food):
            taken = taken + self._near.index_select(0, cell)
            best, cell = (noise[:, piece] - taken).max(1)
            pieces.append((best, cell))
        best, cell = (torch.stack(part, 1) for part in zip(*pieces, strict=True))
        # below 0 no cell is free, nor is one for the pieces after it
        food = torch.where(best >= 0, torch.add(food_level, cell, alpha=self._levels), self._gone).sort(1).values
        self._put(rows, position=position, level=level, food=food, spawned=self._level_of.take(food).sum(1))

    def _put(self, rows: Tensor, **values: Tensor) -> None:
        for name, value in values.items():
            self.fields[name][rows] = value

    def _draw_around(self, position: Tensor) -> Tensor:
        """Place players one by one off the cells that any player holds, ``position`` ``[R, agents]`` being the old
        ones until they are replaced."""
        count = len(position)
        for agent in range(self.num_agents):
            noise = torch.rand(count, self._cells, generator=self.generator, device=self.device)
            taken = torch.zeros(count, self._cells + 1, device=self.device).scatter_(1, position, 1.0)
            position[:, agent] = (noise - taken[:, :-1]).argmax(1)
        return position

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self.device)

    def inject(
        self,
        position: Tensor,
        level: Tensor,
        field: Tensor,
        rows: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
        spawned: Tensor | None = None,
    ) -> None:
        """Put given states into all boards, or into ``rows`` ``[R]``.

        Args:
            position: row and column of players, int64 ``[R, agents, 2]``.
            level: of players, int64 ``[R, agents]``.
            field: level of the food in each cell, 0 where there is none, int64 ``[R, rows, columns]``.
            elapsed: steps since the start of the episode, ``[R]``; 0 if not given.
            spawned: sum of the food levels at the start of the episode, ``[R]``; what ``field`` holds if not given.

        Raises:
            ValueError: wrong shapes, players off the board or on food, a level out of range, more food than ``food``,
                food on the border, or pieces so near to each other that one player could touch both.
        """
        place = self.device
        rows = torch.arange(self.envs, device=place) if rows is None else rows.to(place)
        count = len(rows)
        position, level, field = position.to(place), level.to(place), field.to(place)
        for what, value, shape in (
            ("position", position, (count, self.num_agents, 2)),
            ("level", level, (count, self.num_agents)),
            ("field", field, (count, self.rows, self.columns)),
        ):
            if value.shape != shape or value.dtype != torch.int64:
                raise ValueError(
                    f"Foraging: {what}: must be int64 {list(shape)}, got {value.dtype} {list(value.shape)}"
                )
        size = torch.tensor([self.rows, self.columns], device=place)
        if bool(((position < 0) | (position >= size)).any()):
            raise ValueError(f"Foraging: position: must be on the {self.rows} by {self.columns} board")
        cell = position[..., 0] * self.columns + position[..., 1]
        flat = field.reshape(count, self._cells)
        if bool(((level < 1) | (level >= self._levels)).any() | ((flat < 0) | (flat >= self._levels)).any()):
            raise ValueError(f"Foraging: levels: must be in [1, {self._levels - 1}] (food also 0)")
        there = (flat > 0).float()
        if bool((there * self._border).any() | (there.gather(1, cell) > 0).any()):
            raise ValueError("Foraging: field: food must lie off the border and not under players")
        if bool((there.sum(1) > self.food).any() | ((there @ self._near) * there > 1).any()):
            raise ValueError(f"Foraging: field: at most {self.food} pieces, not near each other")
        codes = torch.arange(self._cells, device=place) * self._levels + flat
        codes = torch.where(flat > 0, codes, self._gone).sort(1).values[:, : self.food]
        if codes.shape[1] < self.food:  # more food asked for than the board has cells
            codes = torch.nn.functional.pad(codes, (0, self.food - codes.shape[1]), value=self._gone)
        spawned = flat.sum(1) if spawned is None else spawned.to(place)
        self._put(rows, position=cell, level=level, food=codes, spawned=spawned)
        self.elapsed[rows] = 0 if elapsed is None else elapsed.to(place)

    def field(self) -> Tensor:
        """Level of the food in each cell, ``[envs, rows, columns]`` int64, 0 where there is none."""
        board = torch.zeros(self.envs, self._cells + 1, dtype=torch.int64, device=self.device)
        food = self.fields["food"]
        board.scatter_(1, self._cell_of.take(food), self._level_of.take(food))
        return board[:, :-1].reshape(self.envs, self.rows, self.columns)

    def positions(self) -> Tensor:
        """Row and column of every player, ``[envs, agents, 2]`` int64."""
        cell = self.fields["position"]
        return torch.stack([cell // self.columns, cell % self.columns], -1)

    # -- step ---------------------------------------------------------------------------------------------------------
    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        here, level, food = (self.fields[name].t() for name in ("position", "level", "food"))
        agents, envs = self.num_agents, self.envs
        choice = torch.add(actions.t(), here, alpha=ACTIONS)
        food_cell, need = self._cell_of.take(food), self._need_of.take(food)

        # moves: nobody moves onto food or to a cell that another player named
        target = self._moves.take(choice)
        blocked = (target.unsqueeze(1) == food_cell).any(1)
        wanted = torch.where(blocked, here, target)
        # what the others want, [agents, agents - 1, envs]: a window that slides over the list written twice
        others = torch.cat([wanted, wanted]).as_strided((agents, agents - 1, envs), (envs, envs, 1), envs)
        contested = (wanted.unsqueeze(1) == others).any(1)

        # loads, [agents, food, envs]: who loads does not move, so the cells before the move serve. Levels are small
        # integers, exact in float32.
        pair = torch.add(food_cell, self._loaders.take(choice).unsqueeze(1), alpha=self._cells + 1)
        share = self._beside.take(pair) * level.float().unsqueeze(1)
        power = share.sum(0)
        eaten = power >= need
        gain = share * torch.where(eaten, need, 0.0)
        if self.normalise_reward:
            gain = gain / (power * self.fields["spawned"]).clamp_(min=1.0)
        # a player touches one piece of food at most, so this sum has one term and is rounded once, as in the package
        reward = gain.sum(1)
        if self.penalty:
            reward -= ((share > 0) & ~eaten).any(1) * self.penalty

        here.copy_(torch.where(contested, here, wanted))
        self._close_gaps(food.masked_fill_(eaten, self._gone))
        return reward.t().contiguous(), food[0] == self._gone

    def _close_gaps(self, food: Tensor) -> None:
        """Sort codes ``[food, envs]`` in place: exchange neighbours, even and odd ones in turn. A call of ``sort``
        costs several times as much for so few."""
        for turn in range(self.food):
            low, high = food[turn % 2 : self.food - 1 : 2], food[turn % 2 + 1 :: 2]
            least = torch.minimum(low, high)
            torch.maximum(low, high, out=high)
            low.copy_(least)

    # -- observation --------------------------------------------------------------------------------------------------
    def _observe(self, rows: Tensor | None = None) -> Tensor:
        position, level, food = (self.fields[name].t() for name in ("position", "level", "food"))
        things = torch.cat([food, torch.add(level, position, alpha=self._levels)])
        if rows is not None:
            things = things.index_select(1, rows)
        agents, slots = self.num_agents, self.food + self.num_agents
        listed = things.index_select(0, self._order)
        if self.sight is not None:
            return self._observe_near(listed.view(agents, slots, -1).permute(1, 0, 2))
        return self._seen_as.index_select(0, listed.t().reshape(-1)).view(-1, agents, 3 * slots)

    def _observe_near(self, listed: Tensor) -> Tensor:
        """Observations with limited sight of ``listed`` codes ``[food + agents, agents, envs]``."""
        assert self.sight is not None
        place = self._seen_as[:, :2].index_select(0, listed.reshape(-1)).view(*listed.shape, 2)
        own = place[self.food]
        origin = (own - self.sight).clamp(min=0)
        offset = place - origin
        seen_food = ((place[: self.food] - own).abs() <= self.sight).all(-1)
        seen_players = ((offset[self.food :] >= 0) & (offset[self.food :] <= 2 * self.sight)).all(-1)
        seen = torch.cat([seen_food & (listed[: self.food] < self._gone), seen_players])
        # what is seen comes first, in the order of the list; oneself is always seen
        unseen = (~seen).to(torch.uint8)
        order = torch.cat(
            [
                unseen[: self.food].sort(dim=0, stable=True).indices,
                unseen[self.food :].sort(dim=0, stable=True).indices + self.food,
            ]
        )
        codes = torch.where(seen, listed, self._gone).gather(0, order).permute(2, 1, 0)  # [envs, agents, slots]
        shape = codes.shape
        observation = self._seen_as.index_select(0, codes.reshape(-1)).view(*shape, 3)
        shift = origin.permute(1, 0, 2).unsqueeze(2) * (codes < self._gone).unsqueeze(-1)
        observation[..., :2] -= shift
        return observation.view(shape[0], shape[1], 3 * shape[2])
