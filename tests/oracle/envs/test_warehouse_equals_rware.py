"""The tensor warehouse against rware 2.0.0, step by step from the same states with the same actions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.envs.tasks import make_env
from datamodules.envs.warehouse import DOWN, FORWARD, LEFT, NOOP, RIGHT, TOGGLE, TURN_LEFT, TURN_RIGHT, UP, Warehouse

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra 'marl'")
rware = pytest.importorskip("rware.warehouse", reason="needs the extra 'marl'")

STEP = {UP: (0, -1), DOWN: (0, 1), LEFT: (-1, 0), RIGHT: (1, 0)}
CLOCKWISE = [UP, RIGHT, DOWN, LEFT]
Place = tuple[int, int]


class RecordedWarehouse(Warehouse):
    """Notes the requests it draws, so that the package can be given the same."""

    def __init__(self, envs: int, **options: Any) -> None:
        super().__init__(envs, **options)
        self.drawn: dict[int, list[int]] = {}
        self.forced: list[int] = []

    def _draw_request(self, rows: Tensor) -> Tensor:
        numbers = super()._draw_request(rows)
        if self.forced and len(rows):
            numbers = torch.full_like(numbers, self.forced.pop(0))
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            self.drawn.setdefault(row, []).append(number)
        return numbers


class SameDraws:
    """Stands in for the package's generator during a step: gives the requests that the tensors drew."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)

    def choice(self, candidates: Sequence[Any]) -> Any:
        number = self.numbers.pop(0)
        return next(shelf for shelf in candidates if shelf.id == number)  # fails if it is not up for request


def state_of(packages: Sequence[Any]) -> dict[str, Tensor]:
    """The whole state of package environments, as ``Warehouse.write_state`` takes it."""

    def agent(one: Any) -> list[int]:
        return [int(one.x), int(one.y), one.dir.value, one.carrying_shelf.id if one.carrying_shelf else 0]

    requested = torch.zeros(len(packages), len(packages[0].shelfs), dtype=torch.bool)
    for row, package in enumerate(packages):
        requested[row, [shelf.id - 1 for shelf in package.request_queue]] = True
    return {
        "agents": torch.tensor([[agent(one) for one in package.agents] for package in packages]),
        "shelves": torch.tensor([[[int(s.x), int(s.y)] for s in package.shelfs] for package in packages]),
        "requested": requested,
        "delivered": torch.tensor([[one.has_delivered for one in package.agents] for package in packages]),
        "elapsed": torch.tensor([package._cur_steps for package in packages]),
        "inactive": torch.tensor([package._cur_inactive_steps for package in packages]),
    }


def put(package: Any, agents: Sequence[tuple[int, int, int, int]], requests: Sequence[int] | None = None) -> None:
    """Place the package's agents (x, y, direction, carried shelf or 0) with all other shelves at home."""
    package.reset(seed=0)
    for one, (x, y, direction, load) in zip(package.agents, agents, strict=True):
        one.x, one.y, one.dir = x, y, rware.Direction(direction)
        if load:
            one.carrying_shelf = package.shelfs[load - 1]
            one.carrying_shelf.x, one.carrying_shelf.y = x, y
    if requests is not None:
        package.request_queue = [package.shelfs[number - 1] for number in requests]
    package._recalc_grid()


class Walker:
    """Scripted play that makes deliveries happen: fetch the nearest request, deliver, put it back."""

    def __init__(self, package: Any) -> None:
        self.package = package

    def action(self, one: Any) -> int:
        package = self.package
        height, width = package.grid_size
        shelves = package.grid[1]
        if one.carrying_shelf is None:
            carried = {id(other.carrying_shelf) for other in package.agents}
            wanted = {(int(s.x), int(s.y)) for s in package.request_queue if id(s) not in carried}
        elif one.carrying_shelf in package.request_queue:
            wanted = {(int(x), int(y)) for x, y in package.goals}
        else:
            wanted = {(x, y) for y in range(height) for x in range(width) if not package.highways[y, x]}
            wanted -= {(x, y) for x, y in wanted if shelves[y, x] and (x, y) != (int(one.x), int(one.y))}
        start = (int(one.x), int(one.y))
        if start in wanted:
            return NOOP if one.carrying_shelf in package.request_queue else TOGGLE
        came: dict[Place, Place] = {start: start}
        queue = deque([start])
        while queue:
            x, y = place = queue.popleft()
            if place in wanted:
                break
            for dx, dy in STEP.values():
                ahead = (x + dx, y + dy)
                inside = 0 <= ahead[0] < width and 0 <= ahead[1] < height
                if not inside or ahead in came or (one.carrying_shelf and shelves[ahead[1], ahead[0]]):
                    continue
                came[ahead] = place
                queue.append(ahead)
        else:
            return NOOP
        while came[place] != start:
            place = came[place]
        heading = next(d for d, (dx, dy) in STEP.items() if (start[0] + dx, start[1] + dy) == place)
        turns = (CLOCKWISE.index(heading) - CLOCKWISE.index(one.dir.value)) % 4
        return FORWARD if turns == 0 else TURN_LEFT if turns == 3 else TURN_RIGHT


def events(
    before: dict[str, Tensor], after: dict[str, Tensor], actions: Tensor, shape: tuple[int, int]
) -> Counter[str]:
    """What happened in one environment's step; all tensors are of this environment alone."""
    count: Counter[str] = Counter()
    height, width = shape
    old = [tuple(a) for a in before["agents"].tolist()]
    new = [tuple(a) for a in after["agents"].tolist()]
    at = {a[:2]: i for i, a in enumerate(old)}
    carried = {a[3] for a in old if a[3]}
    standing = {tuple(p) for i, p in enumerate(before["shelves"].tolist()) if i + 1 not in carried}
    target: list[Place] = []
    for (x, y, direction, load), action in zip(old, actions.tolist(), strict=True):
        dx, dy = STEP[direction] if action == FORWARD else (0, 0)
        place = (min(max(x + dx, 0), width - 1), min(max(y + dy, 0), height - 1))
        if load and place != (x, y) and place in standing:
            count["blocked by a shelf"] += 1
            place = (x, y)
        target.append(place)
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        moved = a[:2] != b[:2]
        other = at.get(target[i])
        count["follow"] += moved and other is not None
        count["bump"] += not moved and target[i] != a[:2] and other is not None
        if other is not None and other > i and target[other] == a[:2]:
            count["swap"] += 1
        rivals = [j for j in range(len(old)) if j != i and target[j] == target[i]]
        if moved and rivals and other is None:
            count["contention"] += 1
        seen, j = 0, i
        while moved and seen <= len(old) and new[j][:2] in at:
            j, seen = at[new[j][:2]], seen + 1
            if j == i:
                count["circle"] += 1
                break
        count["lift"] += not a[3] and b[3] > 0
        count["set down"] += a[3] > 0 and not b[3]
        count["toggle in vain"] += actions[i].item() == TOGGLE and a[3] == b[3]
        count["loaded move"] += moved and a[3] > 0
    return count


class Pair:
    """A tensor environment and as many package environments, stepped together and compared in everything."""

    def __init__(self, packages: Sequence[Any], tensors: RecordedWarehouse, seed: int = 0) -> None:
        self.packages, self.tensors = packages, tensors
        self.walkers = [Walker(package) for package in packages]
        self.random = np.random.default_rng(seed)
        self.count: Counter[str] = Counter()
        for row, package in enumerate(packages):
            package.reset(seed=seed * 1000 + row)
        self.copy_states()

    def copy_states(self) -> None:
        self.tensors.write_state(state_of(self.packages))

    def actions(self, scripted: float) -> Tensor:
        """Walkers' actions, or (else, an agent at a time) random ones, mostly forward."""
        agents = self.tensors.num_agents
        play = self.random.choice(5, size=(len(self.packages), agents), p=[0.05, 0.55, 0.15, 0.15, 0.1])
        walk = self.random.random(play.shape) < scripted
        for row, index in zip(*walk.nonzero(), strict=True):
            play[row, index] = self.walkers[row].action(self.packages[row].agents[index])
        return torch.from_numpy(play)

    def step(self, actions: Tensor) -> None:
        tensors, packages = self.tensors, self.packages
        before = state_of(packages)
        tensors.drawn.clear()
        reward, terminated, truncated = tensors.advance(actions)
        observation, legal, state = tensors.observe()
        results = []
        for row, package in enumerate(packages):
            own, package._np_random = package._np_random, SameDraws(tensors.drawn.get(row, []))
            results.append(package.step(actions[row].tolist()))
            assert not package._np_random.numbers, "the tensors drew a request that the package did not"
            package._np_random = own
        theirs = torch.from_numpy(np.stack([np.stack(result[0]) for result in results]))
        assert observation.dtype == theirs.dtype == torch.float32
        assert torch.equal(observation, theirs)
        assert torch.equal(state, theirs.flatten(1))
        assert bool(legal.all())
        assert torch.equal(reward.double(), torch.tensor(np.stack([result[1] for result in results])))
        assert torch.equal(terminated, torch.tensor([result[2] for result in results]))
        assert not bool(truncated.any())
        assert not any(result[3] for result in results)
        after = state_of(packages)
        for name, value in tensors.read_state().items():
            assert torch.equal(value, after[name]), name
        self.count["steps"] += len(packages)
        for row, package in enumerate(packages):
            old, new = ({name: value[row] for name, value in state.items()} for state in (before, after))
            self.count.update(events(old, new, actions[row], package.grid_size))
            self.count["delivery"] += len(tensors.drawn.get(row, []))
            if results[row][2]:
                self.count["episode"] += 1
                package.reset()
        if bool(terminated.any()):
            rows = terminated.nonzero().squeeze(1)
            tensors.write_state(state_of([packages[row] for row in rows.tolist()]), rows)


def package_of(task: str) -> Any:
    return gymnasium.make(f"rware-{task}-v2", disable_env_checker=True).unwrapped


def pair_of(task: str, envs: int, seed: int) -> Pair:
    packages = [package_of(task) for _ in range(envs)]
    height, width = packages[0].grid_size
    tensors = RecordedWarehouse(
        envs,
        shelf_columns=(width - 1) // 3,
        shelf_rows=(height - 2) // 9,
        agents=packages[0].n_agents,
        request_queue_size=packages[0].request_queue_size,
        seed=seed,
    )
    return Pair(packages, tensors, seed)


@pytest.mark.parametrize("task", ["tiny-2ag", "small-4ag-easy", "medium-6ag-hard", "large-19ag"])
def test_registered_tasks_equal_rware(task: str) -> None:
    package, tensors = package_of(task), make_env(f"rware/{task}", 1)
    assert isinstance(tensors, Warehouse)
    package.reset(seed=0)
    tensors.write_state(state_of([package]))
    assert (tensors.height, tensors.width) == package.grid_size
    assert (tensors.num_agents, tensors.requests) == (package.n_agents, package.request_queue_size)
    assert (tensors.episode_limit, tensors.max_inactivity) == (package.max_steps, package.max_inactivity_steps)
    observation = tensors.observe()[0]
    assert observation.shape == (1, package.n_agents, 71)
    assert torch.equal(observation[0], torch.from_numpy(np.stack([package._make_obs(a) for a in package.agents])))


ALWAYS = ("bump", "contention", "blocked by a shelf", "lift", "set down", "toggle in vain", "loaded move", "delivery")


@pytest.mark.parametrize(
    ("task", "envs", "steps", "wanted"),
    [
        ("tiny-2ag", 8, 100, ("lift", "set down", "loaded move", "delivery", "blocked by a shelf")),
        ("tiny-4ag", 8, 100, ALWAYS),
        ("small-4ag-easy", 8, 100, ("lift", "set down", "loaded move", "blocked by a shelf")),
        ("tiny-12ag-hard", 6, 100, (*ALWAYS, "swap", "follow")),
    ],
)
def test_play_equals_rware(task: str, envs: int, steps: int, wanted: tuple[str, ...]) -> None:
    pair = pair_of(task, envs, seed=1)
    for _ in range(steps):
        pair.step(pair.actions(scripted=0.85))
    assert all(pair.count[name] for name in wanted), pair.count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "steps"),
    [("tiny-2ag", 2500), ("tiny-4ag", 2200), ("small-4ag", 1500), ("tiny-10ag", 500)],
)
def test_long_play_equals_rware(task: str, steps: int) -> None:
    """107,200 steps of the package in all four cases: 16 environments each."""
    pair = pair_of(task, 16, seed=2)
    for t in range(steps):
        pair.step(pair.actions(scripted=0.9 if t % 500 < 250 else 0.3))
    assert all(pair.count[name] for name in (*ALWAYS, "swap", "follow", "episode")), pair.count


LAYOUT = """
.x.xx.
.x..x.
......
.x.gx.
.xg...
"""


@pytest.mark.parametrize("reward_type", ["individual", "global", "two_stage"])
def test_options_equal_rware(reward_type: str) -> None:
    """Layout as text, wider windows, a limit on inactivity, and every kind of reward."""
    options: dict[str, Any] = {"sensor_range": 2, "request_queue_size": 3, "layout": LAYOUT}
    packages = [
        rware.Warehouse(
            shelf_columns=0,
            column_height=0,
            shelf_rows=0,
            n_agents=3,
            msg_bits=0,
            max_inactivity_steps=30,
            max_steps=60,
            reward_type=rware.RewardType[reward_type.upper()],
            **options,
        )
        for _ in range(6)
    ]
    tensors = RecordedWarehouse(
        6, agents=3, max_inactivity=30, reward_type=reward_type, episode_limit=60, seed=3, **options
    )
    assert tensors.common_reward == (reward_type == "global")
    pair = Pair(packages, tensors, seed=3)
    for _ in range(150):
        pair.step(pair.actions(scripted=0.9))
    assert min(pair.count[name] for name in ("delivery", "set down", "episode")) > 10, pair.count


def scene(task: str, agents: Sequence[tuple[int, int, int, int]], requests: Sequence[int] | None = None) -> Pair:
    pair = pair_of(task, 1, seed=0)
    put(pair.packages[0], agents, requests)
    pair.copy_states()
    return pair


def positions(pair: Pair) -> list[Place]:
    return [(int(one.x), int(one.y)) for one in pair.packages[0].agents]


def test_swap_stays_and_so_does_its_follower() -> None:
    pair = scene("tiny-3ag", [(0, 4, DOWN, 0), (0, 5, UP, 0), (0, 3, DOWN, 0)])
    pair.step(torch.full((1, 3), FORWARD))
    assert positions(pair) == [(0, 4), (0, 5), (0, 3)]
    assert pair.count["swap"] == 1


def test_circle_moves_and_its_follower_stays() -> None:
    """Four robots on the queue's two columns turn as one; a fifth that heads into the circle does not."""
    circle = [(4, 4, RIGHT, 0), (5, 4, DOWN, 0), (5, 5, LEFT, 0), (4, 5, UP, 0), (3, 4, RIGHT, 0)]
    pair = scene("tiny-5ag", circle)
    pair.step(torch.full((1, 5), FORWARD))
    assert positions(pair) == [(5, 4), (5, 5), (4, 5), (4, 4), (3, 4)]
    assert pair.count["circle"] == 4


def test_long_circle_moves() -> None:
    path = [(3, 3), (4, 3), (5, 3), (5, 4), (4, 4), (3, 4)]
    headings = [RIGHT, RIGHT, DOWN, LEFT, LEFT, UP]
    pair = scene("tiny-6ag", [(x, y, d, 0) for (x, y), d in zip(path, headings, strict=True)])
    pair.step(torch.full((1, 6), FORWARD))
    assert positions(pair) == path[1:] + path[:1]


def test_chain_follows_and_longest_chain_wins() -> None:
    """Robot 0 alone and robots 1, 2, 3 in a row want the same cell: the row gets it."""
    pair = scene("tiny-4ag", [(0, 2, DOWN, 0), (0, 4, UP, 0), (0, 5, UP, 0), (0, 6, UP, 0)])
    pair.step(torch.full((1, 4), FORWARD))
    assert positions(pair) == [(0, 2), (0, 3), (0, 4), (0, 5)]
    assert pair.count["follow"] == 2
    assert pair.count["contention"] == 1


def test_loaded_robot_is_blocked_by_a_shelf_and_follows_a_loaded_robot() -> None:
    number = 1  # its home is (1, 1)
    pair = scene("tiny-2ag", [(0, 2, RIGHT, number), (9, 0, UP, 0)])
    pair.step(torch.tensor([[FORWARD, NOOP]]))
    assert positions(pair)[0] == (0, 2)
    assert pair.count["blocked by a shelf"] == 1
    pair = scene("tiny-2ag", [(0, 5, UP, 1), (0, 4, UP, 2)])
    pair.step(torch.full((1, 2), FORWARD))
    assert positions(pair) == [(0, 4), (0, 3)]
    assert pair.count["follow"] == 1


def test_unloaded_robot_passes_below_shelves() -> None:
    pair = scene("tiny-2ag", [(0, 2, RIGHT, 0), (9, 0, UP, 0)])
    for _ in range(3):
        pair.step(torch.tensor([[FORWARD, NOOP]]))
    assert positions(pair)[0] == (3, 2)


def test_lift_carry_and_set_down() -> None:
    pair = scene("tiny-2ag", [(1, 1, UP, 0), (9, 5, UP, 0)])
    for action in (TOGGLE, FORWARD, TOGGLE, TURN_LEFT, TURN_LEFT, FORWARD, TOGGLE, TOGGLE):
        pair.step(torch.tensor([[action, NOOP]]))
    assert pair.count["lift"] == 2
    assert pair.count["set down"] == 1  # the toggle on the highway did nothing
    assert pair.count["toggle in vain"] == 1


def test_both_goals_in_one_step_and_a_request_fulfilled_as_it_is_drawn() -> None:
    """Shelf 2 waits on the second goal; drawn in place of shelf 1 on the first, it is delivered in the same step."""
    pair = scene("tiny-2ag", [(4, 9, DOWN, 1), (5, 10, DOWN, 2)], requests=[1, 9])
    pair.tensors.forced = [2, 7]
    pair.step(torch.tensor([[FORWARD, NOOP]]))
    assert pair.count["delivery"] == 2
    assert sorted(shelf.id for shelf in pair.packages[0].request_queue) == [7, 9]
    pair = scene("tiny-2ag", [(4, 9, DOWN, 1), (5, 9, DOWN, 2)], requests=[1, 2])
    pair.step(torch.full((1, 2), FORWARD))
    assert pair.count["delivery"] == 2


class InsertionOrder(Warehouse):
    """Breaks ties as if networkx always listed cells as they were added."""

    def _set_order(self, cell: Tensor, target: Tensor, order: Tensor, equal: Tensor, ahead: Tensor) -> Tensor:
        return order


def crowd(
    layout: str, states: Sequence[Sequence[tuple[int, int, int]]], kind: type[Warehouse]
) -> tuple[Any, Warehouse]:
    agents = len(states[0])
    package = rware.Warehouse(0, 0, 0, agents, 0, 1, 1, None, 500, rware.RewardType.INDIVIDUAL, layout=layout)
    package.reset(seed=0)
    tensors = kind(len(states), agents=agents, layout=layout, request_queue_size=1)
    whole = {name: value.expand(len(states), *value.shape[1:]).clone() for name, value in state_of([package]).items()}
    whole["agents"] = torch.nn.functional.pad(torch.tensor(states), (0, 1))
    tensors.write_state(whole)
    return package, tensors


def moves_of_package(package: Any, states: Sequence[Sequence[tuple[int, int, int]]], actions: Tensor) -> Tensor:
    package._make_obs = lambda agent: None  # only the moves matter here
    places = []
    for row, play in zip(states, actions.tolist(), strict=True):
        for one, (x, y, direction) in zip(package.agents, row, strict=True):
            one.x, one.y, one.dir = x, y, rware.Direction(direction)
        package._recalc_grid()
        package.step(play)
        places.append([(one.x, one.y) for one in package.agents])
    return torch.tensor(places)


@pytest.mark.parametrize(("agents", "layout"), [(2, "xx.\n.g.\n..."), (3, "xx.\n.g."), (4, "xx\n.g")])
def test_all_moves_of_few_robots_equal_rware(agents: int, layout: str) -> None:
    """Every placement, with every direction; two robots also with every choice of going forward or not."""
    lines = layout.split("\n")
    cells = [(x, y) for y in range(len(lines)) for x in range(len(lines[0]))]
    plays = list(product((NOOP, FORWARD), repeat=agents)) if agents == 2 else [(FORWARD,) * agents]
    cases = [
        ([(*place, heading) for place, heading in zip(places, headings, strict=True)], play)
        for places in permutations(cells, agents)
        for headings in product(range(4), repeat=agents)
        for play in plays
    ]
    states, actions = [case[0] for case in cases], torch.tensor([case[1] for case in cases])
    package, tensors = crowd(layout, states, Warehouse)
    tensors.advance(actions)
    assert torch.equal(tensors.read_state()["agents"][..., :2], moves_of_package(package, states, actions))


@pytest.mark.parametrize(("agents", "side", "cases"), [(4, 5, 800), (6, 4, 500), (9, 6, 500), (18, 9, 300)])
def test_crowded_moves_equal_rware(agents: int, side: int, cases: int) -> None:
    """Random crowds, mostly going forward, among them ties that only the order of Python's sets decides rightly."""
    random = np.random.default_rng(agents)
    layout = "\n".join(["xx" + "." * (side - 2), *["." * side] * (side - 2), "g" * side])
    states = []
    for case in range(cases):
        spots = random.choice(side * side, agents, replace=False).tolist()
        headings = random.integers(4, size=agents).tolist()
        if case % 5 == 0:  # a circle, which chance makes too seldom
            corner = int(random.integers(side - 1) * side + random.integers(side - 1))
            circle = [corner, corner + 1, corner + side + 1, corner + side]
            spots = circle + [spot for spot in spots if spot not in circle][: agents - 4]
            headings[:4] = [RIGHT, DOWN, LEFT, UP]
        seats = random.permutation(len(spots)).tolist()
        states.append([(spots[i] % side, spots[i] // side, headings[i]) for i in seats])
    actions = torch.from_numpy(random.choice([NOOP, FORWARD], (cases, agents), p=[0.05, 0.95]))
    package, tensors = crowd(layout, states, Warehouse)
    before = tensors.read_state()
    truth = moves_of_package(package, states, actions)
    tensors.advance(actions)
    after = tensors.read_state()
    assert torch.equal(after["agents"][..., :2], truth)
    count: Counter[str] = Counter()
    for row in range(cases):
        old, new = ({name: value[row] for name, value in state.items()} for state in (before, after))
        count.update(events(old, new, actions[row], (side, side)))
    assert all(count[name] for name in ("swap", "follow", "contention", "bump", "circle")), count
    if agents != 6:  # in the fullest crowd no component is less than half of the graph
        _, other = crowd(layout, states, InsertionOrder)
        other.advance(actions)
        assert not torch.equal(other.read_state()["agents"][..., :2], truth)
