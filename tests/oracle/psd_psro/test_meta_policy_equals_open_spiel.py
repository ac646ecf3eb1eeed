"""The meta-strategies' behaviour policy and NashConv against OpenSpiel's policy aggregator and exploitability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from population_runs import iterations, population
from torch import Tensor

from datamodules.games.open_spiel_games import open_spiel_tree
from datamodules.games.sequence_form import SequenceFormGame
from modules.population.exploitability import meta_nash_conv, mixture_plans

pyspiel = pytest.importorskip("pyspiel")


def _tabular(game: SequenceFormGame, tables: list[Tensor], theirs: Any) -> Any:
    """OpenSpiel's Python policy of one table per player."""
    from open_spiel.python.policy import TabularPolicy

    assert game.tree.labels is not None
    policy = TabularPolicy(theirs)
    for player, labels in enumerate(game.tree.labels):
        for label, row in zip(labels, tables[player], strict=True):
            policy.action_probability_array[policy.state_lookup[label]] = row.numpy()
    return policy


def _nash_conv(theirs: Any, policy: Any) -> float:
    from open_spiel.python.algorithms.exploitability import nash_conv

    found: Any = nash_conv(theirs, policy)
    return float(found)


@pytest.mark.parametrize(("name", "config", "count"), [("kuhn_poker", "kuhn", 4), ("leduc_poker", "leduc", 2)])
def test_meta_policy_of_a_run_equals_open_spiel_aggregator(
    cli: Callable[..., int], tmp_path, name: str, config: str, count: int
) -> None:
    """Members as a run leaves them, under its meta-strategies and under weights that all members share."""
    from open_spiel.python.algorithms.policy_aggregator import PolicyAggregator

    flags = ["--model.init_args.init=random", "--model.init_args.initial_members=2", "--trainer.callbacks=null"]
    steps = [f"--trainer.max_epochs={count}", "--trainer.enable_progress_bar=false"]
    assert cli("fit", "-c", f"psd_psro/{config}", *flags, *steps, "--experiment=run") == 0
    folder = tmp_path / "runs" / "run" / "run-001"
    saved = population(folder)
    tables = [members["members"]["strategy"] for members in saved["members"]]
    theirs, game = pyspiel.load_game(name), SequenceFormGame(open_spiel_tree(name))
    assert game.tree.labels is not None
    ours = _in_their_order(game, config, tables)
    plans = [game.plans(player, ours[player]) for player in range(2)]
    pool = [[_tabular(game, [own, ours[1 - p][0]][:: 1 - 2 * p], theirs) for own in ours[p]] for p in range(2)]
    size = len(ours[0])
    shared = torch.arange(1, size + 1, dtype=torch.float64) / (size * (size + 1) / 2)
    for sigmas, logged in ((saved["meta_strategies"], iterations(folder)[-1]), ([shared, shared.flip(0)], None)):
        merged = PolicyAggregator(theirs).aggregate([0, 1], pool, [sigma.tolist() for sigma in sigmas])
        found = _nash_conv(theirs, merged)
        assert float(meta_nash_conv(game, plans, sigmas)[0]) == pytest.approx(found, abs=1e-9)
        if logged is not None:
            assert logged == pytest.approx(found, abs=1e-9)
            continue
        mixed = [game.strategy_of(player, plan) for player, plan in enumerate(mixture_plans(plans, sigmas))]
        assert _nash_conv(theirs, _tabular(game, mixed, theirs)) == pytest.approx(found, abs=1e-9)
        naive = [torch.einsum("k,ksa->sa", sigma, table) for sigma, table in zip(sigmas, ours, strict=True)]
        assert abs(_nash_conv(theirs, _tabular(game, naive, theirs)) - found) > 1e-3


def _in_their_order(game: SequenceFormGame, config: str, tables: list[Tensor]) -> list[Tensor]:
    """Tables of our rules, their states in the order of OpenSpiel's; the observations are the same tensors."""
    from datamodules.games import KuhnPoker, LeducPoker
    from datamodules.games.expand import expand

    rules = expand({"kuhn": KuhnPoker, "leduc": LeducPoker}[config]())
    found = []
    for player, table in enumerate(tables):
        mine = {tuple(row): state for state, row in enumerate(rules.observations[player].tolist())}
        order = [mine[tuple(row)] for row in game.tree.observations[player].tolist()]
        assert sorted(order) == list(range(table.shape[1]))
        found.append(table[:, order])
    return found
