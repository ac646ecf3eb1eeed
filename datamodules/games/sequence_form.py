"""Exact play of finite games in plan space: the sequence form (von Stengel 1996, "Efficient computation of behavior
strategies", GEB 14; Koller, Megiddo, von Stengel 1996).

A player's *sequence* is the list of its own moves on a path; under perfect recall it is named by its last information
state and action, and sequence 0 is the empty one. Terminal histories with the same sequences of all players are one
*entry*, so that expected payoffs are multilinear in the plans with one coefficient an entry. Sequences are numbered by
own depth, so that every recursion over a player's tree is a handful of gathers, one for each own depth.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from datamodules.games.sequences import (
    Bilinear,
    bilinear_forms,
    collect_entries,
    descend,
    moved_to,
    nodes_by_depth,
    own_sequences,
)
from datamodules.games.tree import GameTree

_MAX_ELEMENTS = 2**24  # float64 elements (128 MB) that a table of payoffs may take beside its result
_SMALLEST = 1e-290  # a plan below this is never reached: quotients of subnormal numbers mean nothing


class SequenceFormGame:
    """A :class:`~modules.contracts.TabularGame` for a finite game tree with perfect recall, any number of players.

    Strategies are behaviour tables ``[states, actions]``, plans are realisation plans ``[sequences]``; both float64.
    Payoffs, reach and plans are differentiable, several times over. Tensors stay on the device of the tree; see
    :meth:`to`. ``symmetric`` is always False: the seats of a tree see different information states
    (:class:`~datamodules.games.symmetrized.SymmetrizedGame` makes one population of two seats).

    Args:
        tree: the game.

    Raises:
        ValueError: the tree contradicts itself, or a player forgets what it did or knew (imperfect recall).
    """

    symmetric = False

    def __init__(self, tree: GameTree) -> None:
        depths = nodes_by_depth(tree)
        self.tree = tree
        self.name = tree.name
        self.num_players = tree.num_players
        self.num_actions = tree.num_actions
        self.zero_sum = tree.zero_sum
        last, chance = descend(tree, depths)
        self._own = tuple(own_sequences(tree, last[player], player) for player in range(tree.num_players))
        self._entries = collect_entries(
            tree, [own.of_move(seq) for own, seq in zip(self._own, last, strict=True)], chance
        )
        self._pair = bilinear_forms(self._entries, self._own, tree.zero_sum) if tree.num_players == 2 else None
        self._digest: dict[str, str] | None = None

    def to(self, device: torch.device | str) -> SequenceFormGame:
        """This game with its tensors on ``device``."""
        moved = copy.copy(self)
        moved.tree = moved_to(self.tree, device)
        moved._own = tuple(moved_to(own, device) for own in self._own)
        moved._entries = moved_to(self._entries, device)
        moved._pair = None if self._pair is None else {key: moved_to(form, device) for key, form in self._pair.items()}
        return moved

    @property
    def device(self) -> torch.device:
        return self.tree.parent.device

    @property
    def num_entries(self) -> int:
        """Combinations of all players' sequences that end the game."""
        return self._entries.weight.shape[0]

    def num_states(self, player: int) -> int:
        return self._own[player].legal.shape[0]

    def num_sequences(self, player: int) -> int:
        """Own sequences, the empty one (number 0) included."""
        return 1 + self._own[player].flat.shape[0]

    def sequence_moves(self, player: int) -> tuple[Tensor, Tensor]:
        """Information state and action ``[sequences]`` that each sequence ends with; -1 for the empty sequence."""
        flat = torch.cat([torch.full((1,), -1, device=self.device), self._own[player].flat])
        state = torch.div(flat, self.num_actions, rounding_mode="floor")
        return state, torch.where(flat < 0, -1, flat % self.num_actions)

    def sequence_of(self, player: int, state: Tensor, action: Tensor) -> Tensor:
        """Number ``[...]`` of the sequence after ``action`` in ``state``; 0, the empty one, where ``state`` is -1."""
        return self._own[player].of_move(torch.where(state < 0, -1, state * self.num_actions + action))

    def seats(self, population: int) -> list[tuple[int, int]]:
        """The (player, first state) pairs that a population's tables cover: its own player's."""
        return [(population, 0)]

    def strategy_shape(self, player: int) -> tuple[int, ...]:
        """``(states, actions)``."""
        return (self.num_states(player), self.num_actions)

    def legal(self, player: int) -> Tensor:
        """``[states, actions]`` bool."""
        return self._own[player].legal

    def observations(self, player: int) -> Tensor:
        """``[states, features]`` float32."""
        return self.tree.observations[player]

    def uniform_strategy(self, player: int) -> Tensor:
        """``[states, actions]``: every legal action alike."""
        legal = self.legal(player).double()
        return legal / legal.sum(1, keepdim=True)

    def random_strategies(self, player: int, count: int, generator: torch.Generator) -> Tensor:
        """``[count, states, actions]``, each row uniform on the simplex of its legal actions (Dirichlet(1))."""
        shape = (count, *self.strategy_shape(player))
        draws = torch.empty(shape, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
        draws = draws.clamp_min(torch.finfo(torch.float64).tiny).to(self.device) * self.legal(player)
        return draws / draws.sum(-1, keepdim=True)

    def plans(self, player: int, strategies: Tensor) -> Tensor:
        """``[..., states, actions] -> [..., sequences]``, differentiable; entries at illegal actions are ignored.

        Raises:
            ValueError: the last two dimensions are not ``(states, actions)``.
        """
        own, shape = self._own[player], self.strategy_shape(player)
        self._expect("strategies", strategies, shape)
        lead = strategies.shape[:-2]
        # Sequences go first and members last in memory: the gathers up the levels then copy whole rows.
        moves = _front(strategies.flatten(-2).index_select(-1, own.flat), lead)
        plan = moves.new_ones(1, *moves.shape[1:])
        pieces = [plan]
        for level in own.levels:
            plan = moves[level.sequences] * plan.index_select(0, own.above[level.sequences])
            pieces.append(plan)
        return _back(torch.cat(pieces), lead)

    def strategy_of(self, player: int, plan: Tensor) -> Tensor:
        """``[..., sequences] -> [..., states, actions]``; uniform over legal actions where the plan never comes.

        The plan of the result is ``plan``, also for a mixture of plans (the realisation-equivalent behaviour strategy
        of Kuhn's theorem, policy aggregation in PSRO).
        """
        own = self._own[player]
        self._expect("plan", plan, (self.num_sequences(player),))
        lead = plan.shape[:-1]
        weights = _front(plan, lead)[1:]
        total = _sum_into(own.owner, weights, self.num_states(player)).index_select(0, own.owner)
        comes = total > _SMALLEST
        alike = (1 / own.counts).index_select(0, own.owner)
        alike = alike.view(-1, *[1] * (weights.dim() - 1))
        return self._tables(player, torch.where(comes, weights / torch.where(comes, total, 1.0), alike), lead)

    def payoff_vector(self, player: int, plans: Sequence[Tensor]) -> Tensor:
        """``[..., sequences]`` such that ``plan @ vector`` is ``player``'s payoff; ``plans[j]`` ``[..., sequences_j]``.

        The leading dimensions are those of the others' plans, which must agree; the own plan is ignored.
        """
        others, lead = self._others(player, plans)
        if self._pair is not None:
            sign = -1.0 if self.zero_sum and player == 1 else 1.0
            form = self._pair["utility" if self.zero_sum else f"utility_{player}"]
            return _back(sign * form.times(others[1 - player], transposed=player == 1), lead)
        return _back(self._contract(player, others, self._entries.utility[:, player]), lead)

    def reach(self, player: int, plans: Sequence[Tensor] | None = None) -> Tensor:
        """Probability ``[..., sequences]`` that chance and the others lead to a terminal history of each own sequence.

        ``sum(reach * plan) = 1`` for every plan. ``plans``: the others' ``[..., sequences_j]`` (own ignored); ``None``:
        uniformly random legal play.
        """
        if plans is None:
            plans = [self.plans(other, self.uniform_strategy(other)) for other in range(self.num_players)]
        others, lead = self._others(player, plans)
        if self._pair is not None:
            return _back(self._pair["weight"].times(others[1 - player], transposed=player == 1), lead)
        return _back(self._contract(player, others, self._entries.weight), lead)

    def payoffs(self, plans: Sequence[Tensor]) -> Tensor:
        """``plans[i]`` ``[members_i, sequences_i]`` -> payoffs of all profiles ``[players, members_0, ...]``.

        Work is cut into pieces, so that a factor beside the result takes about 128 MB at most.
        """
        if len(plans) != self.num_players:
            raise ValueError(f"SequenceFormGame: plans: one for each of {self.num_players} players, got {len(plans)}")
        for player, plan in enumerate(plans):
            if plan.dim() != 2 or plan.shape[1] != self.num_sequences(player):
                wanted = f"shape [members, {self.num_sequences(player)}]"
                raise ValueError(f"SequenceFormGame: plans[{player}]: {wanted}, got {list(plan.shape)}")
        if self._pair is None:
            return self._all_profiles(plans)
        if self.zero_sum:
            first = self._bilinear(self._pair["utility"], plans[0], plans[1])
            return torch.stack([first, -first])
        return torch.stack([self._bilinear(self._pair[f"utility_{p}"], plans[0], plans[1]) for p in range(2)])

    def best_response(self, player: int, payoff_vector: Tensor) -> tuple[Tensor, Tensor]:
        """A deterministic table ``[states, actions]`` that maximises ``plan @ payoff_vector``, and the maximum.

        Backward induction over own depth. Exactly equal actions go to the first legal one, so also where nothing
        depends on the choice. No gradient flows.

        Raises:
            ValueError: a vector of another shape, or one with NaN or infinite entries.
        """
        own = self._own[player]
        if payoff_vector.shape != (self.num_sequences(player),):
            wanted = f"shape [{self.num_sequences(player)}] for player {player}"
            raise ValueError(f"SequenceFormGame: payoff_vector: {wanted}, got {list(payoff_vector.shape)}")
        values = payoff_vector.detach().clone()
        best = values.new_full((self.num_states(player),), -math.inf)  # in the order of the levels
        moves = values[1:]
        for level in reversed(own.levels):
            states = best[level.states]
            states.scatter_reduce_(0, own.local[level.sequences], moves[level.sequences], "amax")
            values.index_add_(0, own.parent[level.states], states)
        if not bool(torch.isfinite(values[0])):
            raise ValueError(f"SequenceFormGame: payoff_vector: must be finite, got a best value of {float(values[0])}")
        count = moves.shape[0]
        hit = moves >= best.index_select(0, own.rank)
        first = torch.where(hit, torch.arange(count, device=values.device), count)
        choice = torch.full_like(own.parent, count).scatter_reduce_(0, own.rank, first, "amin")
        table = values.new_zeros(self.strategy_shape(player))
        table.view(-1)[own.flat.index_select(0, choice)] = 1.0
        return table, values[0]

    def counterfactual_values(self, player: int, table: Tensor, payoff_vector: Tensor) -> Tensor:
        """``[..., states, actions]``: an action's own payoff entry plus the value, under ``table``, of what follows.

        The counterfactual action values of Zinkevich et al. 2007 (eq. 4 ff.), as used by CFR+ (Tammelin 2014): own
        probability of coming to the state left out. 0 at illegal actions. Differentiable.

        Args:
            player: whose.
            table: ``[..., states, actions]``.
            payoff_vector: ``[..., sequences]``, the same leading dimensions.
        """
        own = self._own[player]
        self._expect("table", table, self.strategy_shape(player))
        self._expect("payoff_vector", payoff_vector, (self.num_sequences(player),))
        lead = table.shape[:-2]
        if payoff_vector.shape[:-1] != lead:
            raise ValueError(
                f"SequenceFormGame: payoff_vector: leading dimensions of table {tuple(lead)}, "
                f"got {tuple(payoff_vector.shape[:-1])}"
            )
        probability = _front(table.flatten(-2).index_select(-1, own.flat), lead)
        moves = _front(payoff_vector, lead)[1:]
        pieces: list[Tensor] = []
        below: tuple[Tensor, Tensor] | None = None  # the sequences above the deeper level's states, and their values
        for level in reversed(own.levels):
            values = moves[level.sequences]
            if below is not None:
                values = values.index_add(0, below[0] - 1 - level.sequences.start, below[1])
            pieces.append(values)
            size = level.states.stop - level.states.start
            weighted = probability[level.sequences] * values
            below = own.parent[level.states], _sum_into(own.local[level.sequences], weighted, size)
        return self._tables(player, torch.cat(pieces[::-1]) if pieces else moves, lead)

    def digest(self) -> Mapping[str, str]:
        """Name and sha256 of the tree's structure, chances and payoffs (observations left out)."""
        if self._digest is None:
            tree, total = self.tree, hashlib.sha256()
            for part in (tree.parent, tree.action, tree.player, tree.probability, tree.info_state, tree.utility):
                total.update(part.detach().cpu().contiguous().numpy().tobytes())
            for mask in tree.legal:
                total.update(mask.detach().cpu().contiguous().numpy().tobytes())
            self._digest = {"game": tree.name, "tree": total.hexdigest()}
        return dict(self._digest)

    def _tables(self, player: int, moves: Tensor, lead: torch.Size) -> Tensor:
        """Values of all moves ``[sequences - 1, ...]`` laid out as ``[..., states, actions]``, 0 where illegal."""
        states, actions = self.strategy_shape(player)
        table = moves.new_zeros(*lead, states * actions).index_copy(-1, self._own[player].flat, _back(moves, lead))
        return table.unflatten(-1, (states, actions))

    def _others(self, player: int, plans: Sequence[Tensor]) -> tuple[list[Tensor], torch.Size]:
        """All plans, sequences first (the own one left as it is), and the others' leading dimensions."""
        if len(plans) != self.num_players:
            raise ValueError(f"SequenceFormGame: plans: one for each of {self.num_players} players, got {len(plans)}")
        lead = torch.Size()
        result = list(plans)
        others = [other for other in range(self.num_players) if other != player]
        for position, other in enumerate(others):
            self._expect(f"plans[{other}]", plans[other], (self.num_sequences(other),))
            if position == 0:
                lead = plans[other].shape[:-1]
            if plans[other].shape[:-1] != lead:
                raise ValueError(
                    f"SequenceFormGame: plans[{other}]: leading dimensions {tuple(lead)} like the others', "
                    f"got {tuple(plans[other].shape[:-1])}"
                )
            result[other] = _front(plans[other], lead)
        return result, lead

    def _contract(self, player: int, plans: Sequence[Tensor], coefficient: Tensor) -> Tensor:
        """Sum over entries of ``coefficient`` times the others' plans, onto own sequences."""
        entries = self._entries
        others = [other for other in range(self.num_players) if other != player]
        members = plans[others[0]].shape[1:] if others else ()
        term = coefficient.view(-1, *[1] * len(members))
        for other in others:
            term = term * plans[other].index_select(0, entries.sequences[other])
        return _sum_into(entries.sequences[player], term, self.num_sequences(player))

    def _bilinear(self, form: Bilinear, rows: Tensor, columns: Tensor) -> Tensor:
        """``rows @ form @ columns.T``; the sparse product goes over the side with fewer members."""
        if rows.shape[0] < columns.shape[0]:
            return self._bilinear(form.flipped(), columns, rows).mT
        step = max(1, _MAX_ELEMENTS // rows.shape[1])
        return torch.cat([rows @ form.times(part.mT, transposed=False) for part in columns.split(step)], dim=1)

    def _all_profiles(self, plans: Sequence[Tensor]) -> Tensor:
        entries, counts = self._entries, [plan.shape[0] for plan in plans]
        rest = math.prod(counts[1:])
        step = max(1, _MAX_ELEMENTS // max(1, rest, counts[0]))
        total: Tensor | None = None
        for start in range(0, self.num_entries, step):
            part = slice(start, start + step)
            gathered = [plan.index_select(1, seq[part]) for plan, seq in zip(plans, entries.sequences, strict=True)]
            others = torch.ones_like(entries.weight[part]).unsqueeze(0)
            for factor in gathered[1:]:
                others = (others.unsqueeze(1) * factor).flatten(0, 1)
            rows = gathered[0] * entries.utility[part].mT.unsqueeze(1)
            term = rows @ others.mT
            total = term if total is None else total + term
        assert total is not None  # a tree has at least one terminal node
        return total.reshape(self.num_players, *counts)

    def _expect(self, field: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape[value.dim() - len(shape) :]) != shape or value.dim() < len(shape):
            wanted = ", ".join(["...", *map(str, shape)])
            raise ValueError(f"SequenceFormGame: {field}: shape [{wanted}], got {list(value.shape)}")


def _front(values: Tensor, lead: torch.Size) -> Tensor:
    """``[..., n] -> [n]`` without, ``[n, members]`` with leading dimensions."""
    return values.reshape(-1, values.shape[-1]).mT.contiguous() if lead else values.contiguous()


def _back(values: Tensor, lead: torch.Size) -> Tensor:
    return values.mT.unflatten(0, lead) if lead else values


def _sum_into(index: Tensor, values: Tensor, size: int) -> Tensor:
    zeros = values.new_zeros(size, *values.shape[1:])
    # One-dimensional scatter_add is several times faster on a CPU than index_add, which takes whole rows.
    return zeros.scatter_add(0, index, values) if values.dim() == 1 else zeros.index_add(0, index, values)
