"""Speed of games against OpenSpiel on one thread: exact NashConv, sampled games, and PSRO with exact responses.

Both sides run in this process, interleaved round by round on the same policies, and agree before anything is timed:
NashConv to 1e-9, mean returns of sampled games within five standard errors of the exact value. See README.md beside
this file.

    python benchmarks/game_speed.py
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("MKL_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from loops.open_spiel_agents import as_module, make_games  # noqa: E402
from torch import Tensor  # noqa: E402
from train_tokens import _own_versions, machine  # noqa: E402

from datamodules.games import Goofspiel, KuhnPoker, LeducPoker, LiarsDice  # noqa: E402
from datamodules.games.expand import expand  # noqa: E402
from datamodules.games.play import play  # noqa: E402
from datamodules.games.rules import Rules  # noqa: E402
from datamodules.games.sequence_form import SequenceFormGame  # noqa: E402
from datamodules.games.simulate import TreeSimulator  # noqa: E402
from datamodules.games.tree import GameTree  # noqa: E402
from modules.files import atomic_write  # noqa: E402
from modules.networks.stacked_mlp import StackedMLP  # noqa: E402
from modules.objectives.ppo import masked_log_softmax  # noqa: E402
from modules.optional import require  # noqa: E402
from modules.population.exploitability import nash_conv  # noqa: E402

GOOFSPIEL = "turn_based_simultaneous_game(game=goofspiel(imp_info=True,num_cards=5,points_order=descending))"
GAMES: dict[str, tuple[Callable[[], Rules], str]] = {
    "kuhn": (KuhnPoker, "kuhn_poker"),
    "leduc": (LeducPoker, "leduc_poker"),
    "goofspiel_5": (Goofspiel, GOOFSPIEL),
    "liars_dice_5": (functools.partial(LiarsDice, 1, 5), "liars_dice(numdice=1,dice_sides=5)"),
    "liars_dice_6": (functools.partial(LiarsDice, 1, 6), "liars_dice(numdice=1,dice_sides=6)"),
}
SAMPLED = ("kuhn", "leduc", "liars_dice_6")
PYTHON_EXACT = ("kuhn", "leduc")
"""Games small enough for OpenSpiel's Python NashConv."""
BATCH, HIDDEN = 131_072, (256, 256)
ITERATIONS = 60

Work = Callable[[], int]
"""Does some work and says how many units it was."""


# -- measuring --
def measure(works: Mapping[str, Work], rounds: int, budget: float) -> dict[str, list[dict[str, float]]]:
    """Seconds per unit of each work, round by round: A B C A B C ...

    Args:
        works: by name.
        rounds: how often each is measured.
        budget: wall seconds that a work is repeated for in a round; it runs at least once.

    Returns:
        name -> per round ``wall_s`` and ``cpu_s``, of one unit.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for work in works.values():  # caches fill
        work()
    for _ in range(rounds):
        for name, work in works.items():
            units, wall, cpu = 0, time.perf_counter(), time.process_time()
            while not units or time.perf_counter() - wall < budget:
                units += work()
            spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            found[name].append({clock: seconds / units for clock, seconds in spent.items()})
    return found


def summarise(
    rounds: Mapping[str, Sequence[Mapping[str, float]]], reference: str, rate: bool = False
) -> dict[str, Any]:
    """Median seconds per unit (or units per second) of each work, and how many times faster than another it is.

    Args:
        rounds: of :func:`measure`.
        reference: the work that speed-ups are counted from, within each round, in CPU time.
        rate: give units per second.
    """
    table: dict[str, Any] = {}
    for name, rows in rounds.items():
        wall, cpu = (statistics.median(row[clock] for row in rows) for clock in ("wall_s", "cpu_s"))
        ratios = [theirs["cpu_s"] / mine["cpu_s"] for mine, theirs in zip(rows, rounds[reference], strict=True)]
        row = {"per_wall_s": _round(1 / wall), "per_cpu_s": _round(1 / cpu)} if rate else {}
        row |= {} if rate else {"wall_ms": _round(1e3 * wall), "cpu_ms": _round(1e3 * cpu)}
        extremes = {"min": _round(min(ratios)), "max": _round(max(ratios))}
        table[name] = {**row, "speedup": _round(statistics.median(ratios)), "speedup_range": extremes}
    return table


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _once(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return result, {clock: _round(seconds) for clock, seconds in spent.items()}


# -- both sides' policies --
def labels(tree: GameTree, spiel: Any) -> list[list[str]]:
    """OpenSpiel's string of every information state, found by playing the moves to the state's first node.

    Raises:
        ValueError: a string comes twice, so that the two do not tell the same states apart.
    """
    parent, action = tree.parent.tolist(), tree.action.tolist()
    names: list[list[str]] = []
    for player, legal in enumerate(tree.legal):
        nodes = (tree.player == player).nonzero().squeeze(1)
        first = torch.full((len(legal),), len(tree)).scatter_reduce(0, tree.info_state[nodes], nodes, "amin")
        names.append([])
        for node in first.tolist():
            moves = []
            while parent[node] >= 0:
                moves.append(action[node])
                node = parent[node]
            state = spiel.new_initial_state()
            for move in reversed(moves):
                state.apply_action(move)
            names[-1].append(state.information_state_string(player))
        if len(set(names[-1])) != len(legal):
            raise ValueError(f"game_speed: {tree.name}: player {player}: information states differ from OpenSpiel's")
    return names


def their_policy(tree: GameTree, names: Sequence[Sequence[str]], tables: Sequence[Tensor]) -> Any:
    """The tables as OpenSpiel's C++ tabular policy."""
    rows = {}
    for player, table in enumerate(tables):
        for label, legal, row in zip(names[player], tree.legal[player].tolist(), table.tolist(), strict=True):
            rows[label] = [(move, row[move]) for move, allowed in enumerate(legal) if allowed]
    return require("pyspiel", extra="games").TabularPolicy(rows)


# -- a: exact NashConv --
def exact_game(name: str, rounds: int, budget: float) -> dict[str, Any]:
    """NashConv of random policies, from behaviour tables, against OpenSpiel in C++ (two ways) and in Python.

    OpenSpiel's own function builds its best-response trees at each call; ``open_spiel_cpp_trees_kept`` is the same sum
    with the trees built beforehand. Its policies are C++ tables, made from ours beforehand.
    """
    pyspiel = require("pyspiel", extra="games")
    make, title = GAMES[name]
    game, build = _once(lambda: SequenceFormGame(expand(make())))
    tree, spiel = game.tree, pyspiel.load_game(title)
    generator = torch.Generator().manual_seed(0)
    tables = [game.random_strategies(player, 1, generator)[0] for player in range(2)]
    policy = their_policy(tree, labels(tree, spiel), tables)
    responses = [pyspiel.TabularBestResponse(spiel, player, policy) for player in range(2)]

    def ours() -> float:
        return float(nash_conv(game, [game.plans(player, table) for player, table in enumerate(tables)])[0])

    def kept() -> float:
        root, total = spiel.new_initial_state(), 0.0
        returns = pyspiel.expected_returns(root, policy, -1, True)
        for player, response in enumerate(responses):
            response.set_policy(policy)
            total += response.value(root.history_str()) - returns[player]
        return total

    ways: dict[str, Callable[[], float]] = {
        "ours": ours,
        "open_spiel_cpp": functools.partial(pyspiel.nash_conv, spiel, policy),
        "open_spiel_cpp_trees_kept": kept,
    }
    if name in PYTHON_EXACT:
        exploitability = require("open_spiel.python.algorithms.exploitability", extra="games")
        ways["open_spiel_python"] = functools.partial(exploitability.nash_conv, spiel, python_policy(spiel, policy))
    values = {way: float(work()) for way, work in ways.items()}
    difference = max(values.values()) - min(values.values())
    if difference > 1e-9:
        raise ValueError(f"game_speed: {name}: NashConv differs: {values}")
    measured = measure({way: functools.partial(_one_unit, work) for way, work in ways.items()}, rounds, budget)
    section = {
        "nodes": len(tree),
        "information_states": sum(len(legal) for legal in tree.legal),
        "nashconv": values["ours"],
        "largest_difference": difference,
        "our_build_once": build,
        **summarise(measured, "open_spiel_cpp"),
    }
    _show(f"NashConv, {name} ({len(tree):,} nodes), built in {build['cpu_s']:.2f} CPU s", section, "cpu_ms")
    return section


def _one_unit(work: Callable[[], Any]) -> int:
    work()
    return 1


def python_policy(spiel: Any, policy: Any) -> Any:
    """The C++ table as a table of OpenSpiel's Python code."""
    return require("open_spiel.python.policy", extra="games").tabular_policy_from_callable(
        spiel, lambda state: dict(policy.get_state_policy(state.information_state_string()))
    )


# -- b: sampled games --
def network_policy(inputs: int, actions: int) -> tuple[StackedMLP, dict[str, Tensor]]:
    """The same network for both seats, as in self-play."""
    network = StackedMLP(inputs, HIDDEN, actions)
    return network, network.init(1, torch.Generator().manual_seed(0))


def open_spiel_games(spiel: Any, choose: Callable[[Any], int], games: int, draws: random.Random) -> np.ndarray:
    """Returns ``[games, players]`` of OpenSpiel's usual Python loop, one game after another."""
    returns = []
    for _ in range(games):
        state = spiel.new_initial_state()
        while not state.is_terminal():
            if state.is_chance_node():
                outcomes, weights = zip(*state.chance_outcomes(), strict=True)
                state.apply_action(draws.choices(outcomes, weights)[0])
            else:
                state.apply_action(choose(state))
        returns.append(state.returns())
    return np.array(returns)


@torch.no_grad()
def sampled_game(name: str, rounds: int, budget: float) -> dict[str, Any]:
    """Games a second, a network or random play in both seats.

    Ours plays batches: on the tree, with the network evaluated once a batch on all information states (included in the
    time), and by the rules alone, with one network call a move for all games. OpenSpiel: a bare Python loop over
    states, and its ``rl_environment`` with an agent a seat, as its own algorithms play; a network call a move.
    """
    pyspiel = require("pyspiel", extra="games")
    make, title = GAMES[name]
    rules, spiel = make(), pyspiel.load_game(title)
    tree, actions = expand(rules), rules.num_actions
    game, simulator = SequenceFormGame(tree), TreeSimulator(tree)
    network, params = network_policy(rules.observation_size, actions)
    size = spiel.information_state_tensor_size()
    same_features = size == rules.observation_size
    module = as_module(*((network, params) if same_features else network_policy(size, actions)))
    generator, draws = torch.Generator().manual_seed(0), random.Random(0)
    seats = torch.zeros(BATCH, 2, dtype=torch.int64)

    def tabulate() -> list[Tensor]:
        return [
            masked_log_softmax(network.apply(params, seen)[0], legal).exp()[None]
            for seen, legal in zip(tree.observations, tree.legal, strict=True)
        ]

    def per_move(seen: Tensor, legal: Tensor, player: Tensor, seat: Tensor) -> Tensor:
        return masked_log_softmax(network.apply(params, seen)[0], legal).exp()

    def even(seen: Tensor, legal: Tensor, player: Tensor, seat: Tensor) -> Tensor:
        return legal / legal.sum(1, keepdim=True)

    def by_network(state: Any) -> int:
        seen = torch.tensor(state.information_state_tensor(), dtype=torch.float32)
        legal = torch.tensor(state.legal_actions_mask(), dtype=torch.bool)
        chances = torch.softmax(torch.where(legal, module(seen), -1e9), -1)
        return draws.choices(range(actions), chances.tolist())[0]

    def at_random(state: Any) -> int:
        return draws.choice(state.legal_actions())

    uniform = [game.uniform_strategy(player) for player in range(2)]
    prepared = simulator.prepare([table[None].float() for table in uniform])
    ours: dict[str, dict[str, Callable[[], Tensor]]] = {
        "network": {
            "tabulated": lambda: simulator.play(tabulate(), seats, generator, returns_only=True),
            "tabulated_moves_recorded": lambda: simulator.play(tabulate(), seats, generator)["returns"],
            "rules_engine": lambda: play(rules, per_move, seats, generator)["returns"],
        },
        "random": {
            "tabulated": lambda: simulator.play(prepared, seats, generator, returns_only=True),
            "rules_engine": lambda: play(rules, even, seats, generator)["returns"],
        },
    }
    agents = make_games(title, module)
    theirs = {
        "network": functools.partial(open_spiel_games, spiel, by_network, 50, draws),
        "random": functools.partial(open_spiel_games, spiel, at_random, 500, draws),
    }
    exact = {
        "network": exact_value(game, [table[0].double() for table in tabulate()]),
        "random": exact_value(game, uniform),
    }
    section: dict[str, Any] = {"batch": BATCH}
    for kind, ways in ours.items():
        for way, work in ways.items():
            check_mean(f"{name}, {way}", work().numpy(), exact[kind])
        if kind == "random" or same_features:  # else their network sees other features: another policy
            check_mean(f"{name}, open_spiel", np.concatenate([theirs[kind]() for _ in range(4)]), exact[kind])
        works = {
            way: functools.partial(_games_of, work) for way, work in {**ways, "open_spiel_loop": theirs[kind]}.items()
        }
        if kind == "network":
            works["open_spiel_agents"] = lambda: len(agents(50))
        section[kind] = summarise(measure(works, rounds, budget), "open_spiel_loop", rate=True)
        _show(f"games/s, {name}, {kind}", section[kind], "per_cpu_s")
    return section


def _games_of(work: Callable[[], Any]) -> int:
    return len(work())


def exact_value(game: SequenceFormGame, tables: Sequence[Tensor]) -> float:
    plans = [game.plans(player, table) for player, table in enumerate(tables)]
    return float(plans[0] @ game.payoff_vector(0, plans))


def check_mean(what: str, returns: np.ndarray, exact: float) -> None:
    """Raises: ValueError if player 0's mean return is more than five standard errors off."""
    error = float(returns[:, 0].std(ddof=1)) / math.sqrt(len(returns))
    if abs(float(returns[:, 0].mean()) - exact) > 5 * error:
        raise ValueError(
            f"game_speed: {what}: mean return {returns[:, 0].mean():.4f} +- {error:.4f}, exact {exact:.4f}"
        )


# -- c: PSRO with exact responses --
def psro_section(rounds: int, budget: float) -> dict[str, Any]:
    """Double oracle on Leduc: our whole program, and what OpenSpiel's functions take for the same work.

    OpenSpiel's own PSRO example needs jax and estimates payoffs from games, so the peer is the sum of its parts: with
    ``k`` members a side, iteration ``k`` needs two best responses and ``2 k + 1`` new payoff cells. Its meta-solver,
    mixing of policies and bookkeeping are left out, to its advantage.
    """
    pyspiel = require("pyspiel", extra="games")
    make, title = GAMES["leduc"]
    tree, spiel = expand(make()), pyspiel.load_game(title)
    game = SequenceFormGame(tree)
    generator = torch.Generator().manual_seed(0)
    tables = [game.random_strategies(player, 1, generator)[0] for player in range(2)]
    policy = their_policy(tree, labels(tree, spiel), tables)
    root = spiel.new_initial_state()
    responses = [pyspiel.TabularBestResponse(spiel, player, policy) for player in range(2)]
    python_response = require("open_spiel.python.algorithms.best_response", extra="games").BestResponsePolicy
    policy_value = require("open_spiel.python.algorithms.expected_game_score", extra="games").policy_value
    their_table = python_policy(spiel, policy)

    def cpp_responses() -> int:
        for response in responses:
            response.set_policy(policy)
            response.get_best_response_policy()
        return 1

    def python_responses() -> int:
        for player in range(2):
            python_response(spiel, player, their_table).value(root)
        return 1

    works: dict[str, Work] = {
        "cpp_two_responses": cpp_responses,
        "cpp_cell": lambda: len(pyspiel.expected_returns(root, policy, -1, True)) - 1,
        "python_two_responses": python_responses,
        "python_cell": lambda: len(policy_value(root, [their_table, their_table])) - 1,
    }
    unit = {
        name: statistics.median(row["cpu_s"] for row in rows) for name, rows in measure(works, rounds, budget).items()
    }
    cells = sum(2 * members + 1 for members in range(1, ITERATIONS + 1))
    peers = {
        f"open_spiel_{kind}_parts_cpu_s": _round(
            ITERATIONS * unit[f"{kind}_two_responses"] + cells * unit[f"{kind}_cell"]
        )
        for kind in ("cpp", "python")
    }
    runs = [_train_leduc(ITERATIONS) for _ in range(2)]
    starts = [_train_leduc(1) for _ in range(2)]
    ours = {clock: min(run[clock] for run in runs) for clock in ("wall_s", "cpu_s")}
    start = {clock: min(run[clock] for run in starts) for clock in ("wall_s", "cpu_s")}
    section = {
        "iterations": ITERATIONS,
        "new_cells": cells,
        "ours": {clock: _round(seconds) for clock, seconds in ours.items()},
        "ours_one_iteration_only": {clock: _round(seconds) for clock, seconds in start.items()},
        "ours_59_further_iterations_cpu_s": _round(ours["cpu_s"] - start["cpu_s"]),
        "ours_nashconv": runs[0]["nashconv"],
        "open_spiel_unit_cpu_ms": {name: _round(1e3 * seconds) for name, seconds in unit.items()},
        **peers,
    }
    print(f"\nPSRO on Leduc, {ITERATIONS} iterations: {json.dumps(section, indent=1)}", flush=True)
    return section


def _train_leduc(iterations: int) -> dict[str, float]:
    """``python -m train`` as a user runs it, its start-up included; without population exploitability."""
    with tempfile.TemporaryDirectory() as folder:
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        options = ["--trainer.max_epochs", str(iterations), "--trainer.accelerator", "cpu", "--trainer.callbacks", "[]"]
        options += ["--trainer.enable_progress_bar", "false", "--runs", f"{folder}/runs"]
        options += ["--model.init_args.population_exploitability_every", "0", "--checkpoint.every_n_steps", "100000"]
        done = subprocess.run(
            [sys.executable, "-m", "train", "fit", "-c", "psd_psro/leduc", *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - wall
        if done.returncode:
            raise RuntimeError(f"game_speed: train failed:\n{(done.stdout + done.stderr)[-1500:]}")
        (metrics,) = Path(folder).glob("runs/*/run-*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        values = [row["meta/nashconv"] for row in rows if "meta/nashconv" in row]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "nashconv": values[-1]}


# -- the script --
def _show(title: str, table: Mapping[str, Any], column: str) -> None:
    print(f"\n{title}\n{'':<28}{column:>14}{'x faster':>10}{'min':>10}{'max':>10}")
    for name, row in table.items():
        if isinstance(row, Mapping) and "speedup" in row:
            span = row["speedup_range"]
            print(f"{name:<28}{row[column]:>14,.6g}{row['speedup']:>10.4g}{span['min']:>10.4g}{span['max']:>10.4g}")
    sys.stdout.flush()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Speed of games against OpenSpiel, one thread, interleaved.")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds a work is repeated for in a round")
    parser.add_argument(
        "--sections", nargs="+", default=["exact", "sampled", "psro"], choices=("exact", "sampled", "psro")
    )
    parser.add_argument("--games", nargs="+", default=list(GAMES), choices=tuple(GAMES))
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "game_speed.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "benchmark": "game_speed",
        "command": " ".join(["python benchmarks/game_speed.py", *argv]).split(" --out")[0],
        "date": args.date,
        "machine": machine(),
        "versions": {**_own_versions(), "open_spiel": version("open_spiel")},
        "threads": 1,
        "rounds": args.rounds,
    }
    try:
        if "exact" in args.sections:
            record["nashconv"] = {name: exact_game(name, args.rounds, args.budget) for name in args.games}
        if "sampled" in args.sections:
            names = [name for name in SAMPLED if name in args.games]
            record["games"] = {name: sampled_game(name, args.rounds, args.budget) for name in names}
        if "psro" in args.sections:
            record["psro_leduc"] = psro_section(args.rounds, args.budget)
    except (RuntimeError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    with atomic_write(args.out, "w") as stream:
        stream.write(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
