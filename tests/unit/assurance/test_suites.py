"""Running a suite: looks, ranks, purity, exhausted sources; on a probe and a subject made for it."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from modules.assurance import probes, suites
from modules.assurance.figures import Measure, worst_mean
from modules.assurance.probe import Probe
from modules.assurance.subject import AssuranceError, CardFacts, DataSource, Subject, state_digest
from modules.assurance.suites import Ranks, SuiteSettings, run_suite
from modules.assurance.verdict import Limit

SHARE = Measure("u.coin", "heads", "up", "proportion")
WORST = Measure("r.coin", "worse coin", "up", "bootstrap", statistic=worst_mean)
SIZE = Measure("c.size", "sides", "up", "exact")


def _toss(subject: Subject, block):
    chance: Mapping[str, float] = subject["coins"]
    noise = torch.rand(block.count, generator=block.generator())
    left = max(0, subject.capabilities.get("most", 10**9) - block.start) if block.split == "fresh" else 10**9
    heads = {name: (noise < rate).double()[:left] for name, rate in chance.items()}
    found = {"u.coin": heads["fair"], "r.coin": heads}
    return found | ({"c.size": np.array([2.0])} if block.index == 0 else {})


@pytest.fixture
def coins(monkeypatch):
    """Makes subjects whose suite is one probe that tosses coins."""
    probe = Probe("coins", (SHARE, WORST, SIZE), needs=("coins",), run=_toss, block=20)
    other = Probe("dice", (Measure("e.dice", "sixes", "down", "proportion"),), needs=("dice",), run=_toss)
    monkeypatch.setattr(suites, "all_probes", lambda: {"coins": probe, "dice": other})
    known = {"coins": "name -> chance", "dice": "chance", "most": "units of a finite source"}
    monkeypatch.setattr(probes, "known_capabilities", lambda: known)

    def make(model: nn.Module | None = None, **capabilities) -> Subject:
        capabilities.setdefault("coins", {"fair": 0.5, "bent": 0.3})
        return Subject("coins", model or nn.Linear(2, 2), capabilities)

    return make


def _settings(**changed) -> SuiteSettings:
    return SuiteSettings(**({"n0": 20, "n_max": 80} | changed))


def test_one_look_without_gates(coins):
    found = run_suite(coins(), _settings())
    assert (found.verdict, found.looks, found.figure("u.coin").n, found.figure("u.coin", "anchor").n) == (
        "unjudged",
        1,
        20,
        20,  # whole blocks
    )
    assert found.figure("c.size").value == 2.0
    assert (found.figure("e.dice").status, found.figure("e.dice").reason) == ("not_applicable", "needs dice")
    bent = found.figure("r.coin")
    assert bent.value == min(bent.conditions.values()) == bent.conditions["bent"]


def test_units_double_while_a_gate_is_uncertain(coins):
    found = run_suite(coins(), _settings(), [Limit("u.coin", 0.48)])
    assert (found.looks, found.figure("u.coin").n, found.verdict) == (3, 80, "inconclusive")
    sure = run_suite(coins(coins={"fair": 1.0}), _settings(), [Limit("u.coin", 0.1)])
    assert (sure.looks, sure.verdict) == (1, "pass")


def test_more_units_keep_those_that_were_measured(coins):
    few = run_suite(coins(), _settings()).samples["u.coin", "fresh"].values
    many = run_suite(coins(), _settings(n0=80)).samples["u.coin", "fresh"].values
    assert np.array_equal(few, many[:20])


def test_fresh_units_change_with_the_round_and_anchor_units_never_do(coins):
    first, second = (run_suite(coins(), _settings(round=number)).samples for number in (0, 1))
    assert not np.array_equal(first["u.coin", "fresh"].values, second["u.coin", "fresh"].values)
    assert np.array_equal(first["u.coin", "anchor"].values, second["u.coin", "anchor"].values)


def test_an_exhausted_source_ends_the_looks(coins):
    found = run_suite(coins(most=30), _settings(), [Limit("u.coin", 0.48)])
    assert (found.figure("u.coin").n, found.verdict) == (30, "inconclusive")


def test_any_number_of_ranks_gives_the_same(coins):
    alone = run_suite(coins(), _settings(), [Limit("u.coin", 0.48)])
    for world in (2, 3):
        several = _on_ranks(lambda ranks: run_suite(coins(), _settings(), [Limit("u.coin", 0.48)], ranks), world)
        for found in several:
            assert found.figures == alone.figures
            assert found.judgements == alone.judgements


def test_a_probe_that_fails_on_one_rank_stops_all_of_them(coins):
    def run(ranks):
        subject = coins(coins={"fair": 0.5} if ranks.rank == 0 else {"unfair": 0.5})
        with pytest.raises((KeyError, AssuranceError)) as caught:
            run_suite(subject, _settings(n0=40), (), ranks)
        return str(caught.value)

    said = _on_ranks(run, 2)
    assert "probe coins failed on another rank: KeyError: 'fair'" in said[0]


def _on_ranks(run, world):
    """``run(ranks)`` on threads that exchange what they gather."""
    import threading

    board: list[object] = [None] * world
    barrier = threading.Barrier(world)
    results: list[object] = [None] * world

    def body(rank):
        def gather(mine):
            board[rank] = mine
            barrier.wait(timeout=20)
            found = list(board)
            barrier.wait(timeout=20)
            return found

        results[rank] = run(Ranks(rank, world, gather))

    # threads share torch's thread-local modes but not each other's models, which is all that ranks share
    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_the_suite_leaves_no_trace(coins):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    model[0].weight.grad = torch.ones(2, 2)
    model[2].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    keys = np.random.get_state()[1].copy()  # noqa: NPY002
    before = (state_digest(model), torch.get_rng_state(), random.getstate(), keys)
    run_suite(coins(model), _settings())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones(2, 2))
    assert not model[2].weight.requires_grad
    assert model[0].weight.requires_grad
    assert state_digest(model) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]
    assert np.array_equal(np.random.get_state()[1], before[3])  # noqa: NPY002


def test_a_probe_that_changes_the_model_is_found(coins, monkeypatch):
    subject = coins()

    def meddle(subject, block):
        subject.model.bias.data += 1.0
        return _toss(subject, block)

    probe = Probe("coins", (SHARE, WORST, SIZE), needs=("coins",), run=meddle)
    monkeypatch.setattr(suites, "all_probes", lambda: {"coins": probe})
    with pytest.raises(AssuranceError, match="changed the model's state"):
        run_suite(subject, _settings())


def test_a_reason_in_place_of_values_is_undefined_and_no_pass(coins, monkeypatch):
    def undefined(subject, block):
        return _toss(subject, block) | {"u.coin": "the reference return equals the random one"}

    probe = Probe("coins", (SHARE, WORST, SIZE), needs=("coins",), run=undefined)
    monkeypatch.setattr(suites, "all_probes", lambda: {"coins": probe})
    found = run_suite(coins(), _settings(), [Limit("u.coin", 0.0)])
    assert found.figure("u.coin").status == "undefined"
    assert found.figure("u.coin").reason == "the reference return equals the random one"
    assert found.verdict == "inconclusive"


def test_what_does_not_fit_is_refused_before_anything_is_measured(coins):
    subject = coins()
    with pytest.raises(AssuranceError, match=r"limit on e\.dice: it needs dice, which the coins module does not offer"):
        run_suite(subject, _settings(), [Limit("e.dice", 0.1)])
    with pytest.raises(AssuranceError, match="unknown probe 'coin'; nearest: coins"):
        run_suite(subject, SuiteSettings(suite="custom", probes=("coin",)))
    with pytest.raises(AssuranceError, match="no probe of suite 'custom' applies"):
        run_suite(subject, SuiteSettings(suite="custom", probes=("dice",)))
    with pytest.raises(AssuranceError, match="unknown capability 'coin'; did you mean 'coins'"):
        Subject("coins", nn.Linear(1, 1), {"coin": 1})
    with pytest.raises(AssuranceError, match="does not offer 'dice'; it offers coins"):
        subject["dice"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"suite": "quik"}, "suite must be one of quick, rice, deep, custom"),
        ({"suite": "custom"}, "belong together"),
        ({"n0": 1}, "n0 must be at least 2"),
        ({"n0": 100, "n_max": 50}, "must not be larger"),
        ({"alpha": 1.0}, "alpha must be in"),
        ({"anchor_share": 0.0}, "anchor_share must be in"),
        ({"effort": {"steps": 3}}, "effort takes attack_steps and restarts"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(AssuranceError, match=message):
        SuiteSettings(**wrong)


def test_shared_probes():
    class Model(nn.Linear):
        pass

    model = Model(3, 2)
    subject = Subject(
        "toy",
        model,
        {"outputs": lambda: model(torch.ones(1, 3)), "seed_values": lambda: [0.1, 0.2, 0.3, 0.4]},
        CardFacts(title="toy", licence="MIT", data=(DataSource("a", "CC0-1.0", 3.0), DataSource("b", "unknown", 1.0))),
    )
    before = state_digest(model)
    found = run_suite(subject, SuiteSettings(suite="custom", probes=("rollback", "card", "seeds")))
    assert state_digest(model) == before
    assert found.figure("c.rollback").value == 1.0
    assert found.figure("i.card").value == pytest.approx(3 / 7)
    assert found.figure("e.provenance").value == pytest.approx(0.75)
    assert found.figure("r.seed").value == pytest.approx(0.25)
    assert found.figure("r.seed").n == 4
    forgetful = Subject("toy", model, {"outputs": lambda: torch.zeros(1)})
    undefined = run_suite(forgetful, SuiteSettings(suite="custom", probes=("rollback",))).figure("c.rollback")
    assert (undefined.status, "do not depend on the model" in undefined.reason) == ("undefined", True)
