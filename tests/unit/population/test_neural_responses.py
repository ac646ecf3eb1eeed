"""Neural responses: what they learn, and that stacking, resuming and sharing out change nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.games.expand import expand
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.sequence_form import SequenceFormGame
from datamodules.games.simulate import TreeSimulator
from modules.population.neural import DQNResponse, NeuralResponse, PPOResponse

CONTEXTS, ACTIONS = 3, 3
# A game of two own decisions: contexts 0 to 2 are drawn evenly; an action in one leads to a state of its own, where
# the second action ends the episode. Action 1 is illegal in context 0 and whenever the first action was 2.
OBSERVATIONS = torch.eye(CONTEXTS * (1 + ACTIONS))
PAYOFF = torch.randn(CONTEXTS, ACTIONS, ACTIONS, generator=torch.Generator().manual_seed(11))
LEGAL = torch.ones(len(OBSERVATIONS), ACTIONS, dtype=torch.bool)
LEGAL[0, 1] = False
LEGAL[[CONTEXTS + context * ACTIONS + 2 for context in range(CONTEXTS)], 1] = False

MAKERS: dict[str, Callable[[], NeuralResponse]] = {
    "ppo": lambda: PPOResponse(hidden=(16,), learning_rate=1e-2),
    "dqn": lambda: DQNResponse(hidden=(16,), learning_rate=1e-2, capacity=700, batch_size=128, anneal_steps=60),
    "greedy": lambda: DQNResponse(hidden=(16,), learning_rate=1e-2, policy="epsilon_greedy", epsilon=0.2),
}
EVERY = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


def _draw(table: Tensor, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = table.gather(1, state.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
    action = torch.multinomial(rows.flatten(0, 1), 1, generator=generator).view_as(state)
    return action, rows.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def _episodes(table: Tensor, count: int, generator: torch.Generator) -> TensorDict:
    """Decisions ``[L, 2 * count + 1]`` of ``count`` episodes in order, and one row of padding."""
    learners = len(table)
    context = torch.randint(CONTEXTS, (learners, count), generator=generator)
    first, p_first = _draw(table, context, generator)
    state = CONTEXTS + context * ACTIONS + first
    second, p_second = _draw(table, state, generator)
    reward = PAYOFF[context, first, second]
    pairs = {
        "state": (context, state, -1),
        "action": (first, second, -1),
        "probability": (p_first, p_second, 0.0),
        "episode_return": (reward, reward, float("nan")),
        "next_state": (state, torch.full_like(state, -1), -1),
        "valid": (torch.ones_like(state, dtype=torch.bool), torch.ones_like(state, dtype=torch.bool), False),
    }
    rows = {}
    for key, (one, two, padding) in pairs.items():
        filler = torch.full((learners, 1), padding, dtype=one.dtype)
        rows[key] = torch.cat([torch.stack([one, two], -1).flatten(1), filler], 1)
    return TensorDict(rows, batch_size=[learners, 2 * count + 1])


def _value(table: Tensor) -> Tensor:
    first = table[:, :CONTEXTS]
    second = table[:, CONTEXTS:].view(-1, CONTEXTS, ACTIONS, ACTIONS)
    return (first * (second * PAYOFF).sum(-1)).sum(-1).mean(-1)


def _best() -> float:
    legal = LEGAL[CONTEXTS:].view(CONTEXTS, ACTIONS, ACTIONS) & LEGAL[:CONTEXTS].unsqueeze(-1)
    return PAYOFF.masked_fill(~legal, -torch.inf).flatten(1).amax(1).mean().item()


def _started(response: NeuralResponse, count: int = 2, seed: int = 0) -> NeuralResponse:
    response.start(OBSERVATIONS, LEGAL, count, torch.Generator().manual_seed(seed))
    return response


def _train(response: NeuralResponse, updates: int, count: int = 256, first: int = 0) -> dict[str, Tensor]:
    metrics = {}
    for update in range(first, first + updates):
        generator = torch.Generator().manual_seed(1000 + update)
        metrics = response.update(_episodes(response.tables(), count, generator), seed=update)
    return metrics


# -- learning ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ppo", "dqn", "greedy"])
def test_learns_the_optimum_of_a_two_step_tree(name):
    response = _started(MAKERS[name]())
    start, best = _value(response.tables()), _best()
    metrics = _train(response, 40)
    found = _value(response.tables())
    floor = 0.97 * best if name != "greedy" else 0.7 * best  # epsilon 0.2 at both decisions costs its share
    assert (start < 0.3 * best).all()
    assert (found > floor).all()
    assert (found < best + 1e-5).all()
    assert all(value.shape == (2,) and value.isfinite().all() for value in metrics.values())


def test_lambda_below_one_learns_too_and_wants_episodes_in_order():
    response = _started(PPOResponse(hidden=(16,), learning_rate=1e-2, lambda_=0.5))
    _train(response, 40)
    assert (_value(response.tables()) > 0.97 * _best()).all()
    batch = _episodes(response.tables(), 8, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="adjacent and in order"):
        response.update(batch[:, torch.arange(16).flip(0)], seed=0)


def test_lambda_returns_equal_the_recursion():
    response = PPOResponse(lambda_=0.25)
    batch = TensorDict(
        {
            "state": torch.tensor([[0, 1, 2, 5, 6]]),
            "next_state": torch.tensor([[1, 2, -1, 6, -1]]),
            "episode_return": torch.tensor([[8.0, 8.0, 8.0, -4.0, -4.0]]),
            "valid": torch.ones(1, 5, dtype=torch.bool),
        },
        batch_size=[1, 5],
    )
    value = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    second = 0.75 * 3 + 0.25 * 8
    expected = [0.75 * 2 + 0.25 * second, second, 8.0, 0.75 * 5 + 0.25 * -4, -4.0]
    assert response._targets(batch, value).tolist() == [pytest.approx(expected)]


def _own_moves(play: TensorDict, player: int, learners: int) -> TensorDict:
    mine = play["player"] == player
    order = (~mine).to(torch.int8).argsort(dim=1, stable=True)[:, : int(mine.sum(1).max())]
    valid = mine.gather(1, order)
    state = torch.where(valid, play["info_state"].gather(1, order), -1)
    rows = {
        "state": state,
        "action": play["action"].gather(1, order),
        "probability": play["probability"].gather(1, order),
        "episode_return": play["returns"][:, player].float().unsqueeze(1).expand_as(state),
        "next_state": torch.cat([state[:, 1:], torch.full_like(state[:, :1], -1)], 1),
        "valid": valid,
    }
    flat = {key: value.reshape(learners, -1) for key, value in rows.items()}
    return TensorDict(flat, batch_size=flat["state"].shape)


@pytest.mark.parametrize("player", [0, 1])
@pytest.mark.parametrize("make", [PPOResponse, lambda: DQNResponse(anneal_steps=100)], ids=["ppo", "dqn"])
def test_kuhn_best_response_to_uniform_play_is_found(make, player):
    tree = expand(KuhnPoker())
    game, simulator, learners, games = SequenceFormGame(tree), TreeSimulator(tree), 2, 512
    response = make()
    generator = torch.Generator().manual_seed(0)
    response.start(game.observations(player), game.legal(player), learners, generator)
    uniform = [game.uniform_strategy(p) for p in range(2)]
    payoff = game.payoff_vector(player, [game.plans(p, uniform[p]) for p in range(2)])
    best = game.best_response(player, payoff)[1]
    seats = torch.zeros(learners * games, 2, dtype=torch.int64)
    seats[:, player] = torch.arange(learners).repeat_interleave(games)
    for update in range(40):
        tables = [table.float().unsqueeze(0) for table in uniform]
        tables[player] = response.tables()
        play = simulator.play(tables, seats, generator)
        response.update(_own_moves(play, player, learners), seed=update)
    value = game.plans(player, response.tables().double()) @ payoff
    assert (value >= 0.95 * best).all()
    assert (value <= best + 1e-6).all()


@EVERY
def test_illegal_actions_have_probability_exactly_zero(make):
    response = _started(make())
    for _ in range(2):
        table = response.tables()
        assert table.dtype == torch.float32
        assert (table[:, ~LEGAL] == 0).all()
        torch.testing.assert_close(table.sum(-1), torch.ones(2, len(OBSERVATIONS)))
        _train(response, 3)


# -- stacking, resuming, sharing out -----------------------------------------------------------------------------------
@EVERY
def test_stacked_learners_equal_separate_ones(make):
    together = _started(make(), 3)
    params = together.params()
    alone = [make() for _ in range(3)]
    for index, response in enumerate(alone):
        own = {key: value[index : index + 1] for key, value in params.items()}
        response.start(OBSERVATIONS, LEGAL, 1, torch.Generator(), own)
    for update in range(4):
        batch = _episodes(together.tables(), 128, torch.Generator().manual_seed(update))
        batch["valid"][1, 200:] = False
        batch["valid"][2] &= torch.tensor(update > 0)  # nothing at all to learn from, at first
        together.update(batch, seed=update)
        for index, response in enumerate(alone):
            response.update(batch[index : index + 1], seed=update)
    for key, value in together.params().items():
        joined = torch.cat([response.params()[key] for response in alone])
        torch.testing.assert_close(value, joined, rtol=1e-3, atol=1e-4)
        assert value.isfinite().all()


@EVERY
def test_resumes_bitwise_from_a_file(make):
    whole = _started(make())
    _train(whole, 3, count=200)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.bind(OBSERVATIONS, LEGAL)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(whole)
    for response in (whole, resumed, copied):
        _train(response, 3, count=200, first=3)
    assert torch.equal(whole.tables(), resumed.tables())
    assert torch.equal(whole.tables(), copied.tables())
    assert all(torch.equal(a, b) for a, b in zip(whole.params().values(), resumed.params().values(), strict=True))


@EVERY
def test_two_halves_reduced_equal_one_whole(make):
    """Two ranks step in turn; the second pass of each reduction knows what the other rank sends."""
    whole = _started(make())
    batch = _episodes(whole.tables(), 100, torch.Generator().manual_seed(0))
    ranks = [batch[:, :60], batch[:, 60:]]  # the second has the padding, and they are of unequal sizes
    numbers = [torch.arange(60), torch.arange(60, 201)]
    if isinstance(whole, DQNResponse):  # each rank draws from a replay of its own, so only the replicas can be equal
        ranks, numbers = [batch, batch], [torch.arange(201)] * 2
    whole.update(batch, seed=7)
    agreed: list[Tensor] = []
    while True:
        sent: list[list[Tensor]] = []
        responses = []
        for part, rows in zip(ranks, numbers, strict=True):
            calls: list[Tensor] = []

            def reduce(flat: Tensor, calls: list[Tensor] = calls) -> Tensor:
                calls.append(flat)
                return agreed[len(calls) - 1] if len(calls) <= len(agreed) else flat

            response = _started(make())
            response.reduce = reduce
            response.update(part, seed=7, rows=rows)
            sent.append(calls)
            responses.append(response)
        assert len(sent[0]) == len(sent[1])
        assert [call.shape for call in sent[0]] == [call.shape for call in sent[1]]
        if len(agreed) == len(sent[0]):
            break
        agreed.append((sent[0][len(agreed)] + sent[1][len(agreed)]) / 2)
    for response in responses:
        for key, value in response.params().items():
            torch.testing.assert_close(value, whole.params()[key], rtol=1e-3, atol=1e-4)


@EVERY
def test_few_rows_and_many_give_the_same_networks(make, monkeypatch):
    """Running networks on rows, or on all states to look rows up, is a matter of speed alone."""
    by_table, by_row = _started(make()), _started(make())
    batch = _episodes(by_table.tables(), 40, torch.Generator().manual_seed(0))
    by_table.update(batch, seed=0)

    def outputs(network, views, state):
        return by_row._stack.networks[network].apply(views[network], OBSERVATIONS[state]), None

    monkeypatch.setattr(by_row, "_outputs", outputs)
    by_row.update(batch, seed=0)
    torch.testing.assert_close(by_table.tables(), by_row.tables(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_extra_loss_moves_the_acting_policy(name):
    """A strong pull towards action 0 everywhere wins over the returns; the log-policy handed over is the acting one."""
    response = _started(MAKERS[name]())
    seen: list[Tensor] = []

    def pull(log_policy: Tensor, batch: TensorDict) -> Tensor:
        seen.append(log_policy.detach())
        assert batch["state"].shape[0] == 2
        return -100.0 * log_policy[:, :, 0].mean(-1)

    before = response.tables()
    response.extra_loss = pull
    _train(response, 1)
    assert torch.equal(seen[0].exp(), before)
    metrics = _train(response, 15, first=1)
    assert "extra_loss" in metrics
    assert (response.tables()[:, :, 0] > 0.9).all()
    other = _started(MAKERS["greedy"]())
    other.extra_loss = pull
    with pytest.raises(ValueError, match="boltzmann"):
        _train(other, 1)


# -- starting again ----------------------------------------------------------------------------------------------------
def test_start_fresh_from_weights_or_keeping_all():
    response = _started(MAKERS["dqn"]())
    fresh = response.tables()
    _train(response, 5)
    params, trained = response.params(), response.tables(response.params())
    state = response.state_dict()
    response.start(OBSERVATIONS, LEGAL, 2, torch.Generator(), keep=True)
    assert torch.equal(response.tables(response.params()), trained)
    assert torch.equal(response.rank_state_dict()["written"], state["rank"]["written"])
    assert response.state_dict()["adam"]
    response.start(OBSERVATIONS, LEGAL, 2, torch.Generator(), params)
    assert torch.equal(response.tables(response.params()), trained)
    assert not response.state_dict()["adam"]
    assert (response.rank_state_dict()["written"] == 0).all()
    assert torch.equal(_started(response).tables(), fresh)
    with pytest.raises(ValueError, match="must stay"):
        response.start(OBSERVATIONS, LEGAL, 3, torch.Generator(), keep=True)
    assert torch.equal(response.tables(), fresh)
    with pytest.raises(ValueError, match="of 3 learners"):
        response.start(OBSERVATIONS, LEGAL, 3, torch.Generator(), params)


def test_tables_of_other_members():
    response = _started(MAKERS["ppo"](), 2)
    members = {key: torch.cat([value, value[:1]]) for key, value in response.params().items()}
    table = response.tables(members)
    assert table.shape == (3, len(OBSERVATIONS), ACTIONS)
    torch.testing.assert_close(table[2], response.tables()[0])


def test_cooling_ends_at_the_frozen_temperature():
    response = _started(DQNResponse(hidden=(16,), temperature=0.1, initial_temperature=2.0, steps=5, anneal_steps=10))
    assert not torch.allclose(response.tables(), response.tables(response.params()))
    _train(response, 2)
    assert torch.equal(response.tables(), response.tables(response.params()))


@pytest.mark.parametrize("double", [False, True])
def test_illegal_actions_never_enter_the_targets(double):
    response = DQNResponse(hidden=(4,), batch_size=4, steps=1, double=double)
    _started(response)
    params = response.params()
    params["q.bias_1"][:, 1] = 1000.0  # the network would swear by action 1, illegal in the next state
    response.start(OBSERVATIONS, LEGAL, 2, torch.Generator(), params)
    batch = _episodes(response.tables(), 2, torch.Generator().manual_seed(0))
    batch["state"][:], batch["action"][:], batch["next_state"][:] = 0, 2, CONTEXTS + 2
    assert not LEGAL[CONTEXTS + 2, 1]
    assert (response.update(batch, seed=0)["target"].abs() < 10).all()


def test_replay_keeps_the_newest_valid_rows_of_each_learner():
    response = _started(DQNResponse(hidden=(4,), capacity=8, batch_size=4, steps=1))
    written: list[list[float]] = [[], []]
    for update, size in enumerate((3, 5, 20, 4)):
        batch = _episodes(response.tables(), size, torch.Generator().manual_seed(update))
        batch["next_state"][:] = -1  # every row is an end, so that rewards mark rows
        batch["episode_return"] = torch.arange(2 * (2 * size + 1)).view(2, -1).float() + 1000 * update
        batch["valid"][1, ::3] = False
        response.update(batch, seed=update)
        for learner in range(2):
            written[learner] += batch["episode_return"][learner][batch["valid"][learner]].tolist()
    state = response.rank_state_dict()
    for learner in range(2):
        assert state["written"][learner] == len(written[learner])
        assert sorted(state["reward"][learner].tolist()) == written[learner][-8:]


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPOResponse(learning_rate=0.0), "PPOResponse: learning_rate: must be above 0, got 0.0"),
        (lambda: PPOResponse(clip=1.5), "clip"),
        (lambda: PPOResponse(minibatches=0), "minibatches: must be at least 1, got 0"),
        (lambda: PPOResponse(lambda_=1.1), "lambda_"),
        (lambda: DQNResponse(temperature=0.0), "DQNResponse: temperature"),
        (lambda: DQNResponse(policy="softmax"), "boltzmann or epsilon_greedy"),  # pyright: ignore[reportArgumentType]
        (lambda: DQNResponse(capacity=0), "capacity: must be at least 1, got 0"),
        (lambda: PPOResponse().state_dict(), "call start"),
        (lambda: PPOResponse().load_state_dict({}), "call bind"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@EVERY
def test_unsound_batches_are_refused(make):
    response = _started(make())
    batch = _episodes(response.tables(), 4, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="needs key 'valid'"):
        response.update(batch.exclude("valid"), seed=0)
    with pytest.raises(ValueError, match=r"\[2, rows\]"):
        response.update(batch[:1], seed=0)
    for key, value in (("action", 1), ("episode_return", float("inf")), ("probability", 0.0)):
        wrong = batch.clone()
        wrong["state"][1, 2] = 0  # action 1 is illegal there
        wrong["action"][1, 2] = 0
        wrong[key][1, 2] = value
        with pytest.raises(ValueError, match=r"learner 1, row 2"):
            response.update(wrong, seed=0)


def test_states_without_legal_actions_are_refused():
    legal = LEGAL.clone()
    legal[3] = False
    with pytest.raises(ValueError, match="needs a legal action"):
        PPOResponse().bind(OBSERVATIONS, legal)
