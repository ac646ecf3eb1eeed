"""Members that are networks alone: they act on observations, and nothing is tabulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional

from modules.contracts import RulesGame
from modules.networks.stacked_mlp import StackedMLP
from modules.objectives.ppo import masked_log_softmax
from modules.population.neural import PPOResponse

_CHUNK = 1 << 27  # bytes of hidden activations at a time


class ActorNetworks:
    """The policy of an actor's weights on observations: the softmax over legal actions, as PPOResponse trains it.

    Args:
        game: whose observations are seen. Where one population plays both seats the seat is added to them, one-hot.
        response: widths and activation of the actor.
    """

    def __init__(self, game: RulesGame, response: PPOResponse) -> None:
        self.seats = game.num_players if game.symmetric else 0
        self.inputs = game.observation_size + self.seats
        self.actions = game.num_actions
        self.mlp = StackedMLP(self.inputs, response.hidden, game.num_actions, response.activation)

    def features(self, observation: Tensor, player: Tensor) -> Tensor:
        """``[rows, inputs]``: ``observation`` ``[rows, features]`` and, where needed, the mover's seat."""
        if not self.seats:
            return observation
        return torch.cat([observation, functional.one_hot(player, self.seats).to(observation.dtype)], dim=1)

    @staticmethod
    def weights(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The actors' parameters ``[members, ...]`` among those of PPOResponse, ``actor.weight_0`` and so on."""
        return {
            name.removeprefix("actor."): value.detach() for name, value in params.items() if name.startswith("actor.")
        }

    def log_policies(self, actors: Mapping[str, Tensor], features: Tensor, legal: Tensor) -> Tensor:
        """``[members, rows, actions]``: log-probabilities of each member's policy in every row."""
        return masked_log_softmax(self.mlp.apply(actors, features), legal)

    @torch.no_grad()
    def log_likelihoods(
        self,
        actors: Mapping[str, Tensor],
        features: Tensor,
        legal: Tensor,
        action: Tensor,
        episode: Tensor,
        episodes: int,
    ) -> Tensor:
        """Log-probability of an episode's own actions under each member, ``[members, episodes]`` float64.

        Args:
            actors: ``[members, ...]``.
            features, legal, action: ``[rows, ...]``, the decisions of all episodes.
            episode: ``[rows]`` int64, which episode a decision belongs to.
            episodes: how many there are; one without decisions has 0.
        """
        members = len(actors["weight_0"])
        chunk = max(1, _CHUNK // (8 * max(self.mlp.widths) * max(1, len(features))))
        parts = []
        for first in range(0, members, chunk):
            part = {name: value[first : first + chunk] for name, value in actors.items()}
            policies = self.log_policies(part, features, legal)
            taken = policies.gather(2, action.expand(len(policies), -1).unsqueeze(2)).squeeze(2).double()
            parts.append(taken.new_zeros(len(taken), episodes).index_add_(1, episode, taken))
        return torch.cat(parts)


class SeatedPolicies:
    """Plays all populations' members: a policy for :class:`~modules.contracts.PlayRequest`.

    Rows are sorted by member, and each member that is present runs once.

    Args:
        networks: the members' architecture.
        populations: per population, the actors' parameters ``[members, ...]``; a single one plays all seats.
    """

    def __init__(self, networks: ActorNetworks, populations: Sequence[Mapping[str, Tensor]]) -> None:
        self.networks = networks
        self.populations = list(populations)
        sizes = [len(actors["weight_0"]) for actors in self.populations]
        self.first = [sum(sizes[:number]) for number in range(len(sizes))]
        self.home = [(number, member) for number, size in enumerate(sizes) for member in range(size)]

    @torch.no_grad()
    def __call__(self, observation: Tensor, legal: Tensor, player: Tensor, seat: Tensor) -> Tensor:
        """Probabilities ``[rows, actions]`` float32; ``seat`` ``[rows]`` int64 is the member of its population."""
        features = self.networks.features(observation, player)
        first = torch.tensor(self.first if len(self.first) > 1 else self.first * (int(self.networks.seats) or 1))
        member = first.to(seat.device)[player] + seat
        order = member.argsort(stable=True)
        counts = torch.bincount(member, minlength=len(self.home)).tolist()
        features, legal = features[order], legal[order]
        outputs, done = [], 0
        for (population, number), count in zip(self.home, counts, strict=True):
            if count:
                own = {name: value[number : number + 1] for name, value in self.populations[population].items()}
                outputs.append(self.networks.mlp.apply(own, features[done : done + count])[0])
                done += count
        probabilities = masked_log_softmax(torch.cat(outputs), legal).exp()
        return torch.empty_like(probabilities).index_copy_(0, order, probabilities)


@dataclass(frozen=True)
class OwnDecisions:
    """What one policy decided in a batch of games, ``[rows]`` each, games and moves in order.

    ``episode``: row of the batch; ``features`` ``[rows, inputs]``; ``legal`` ``[rows, actions]``; ``action``;
    ``probability``, with which it was taken.
    """

    episode: Tensor
    features: Tensor
    legal: Tensor
    action: Tensor
    probability: Tensor


def own_decisions(networks: ActorNetworks, batch: TensorDict, seats: Tensor) -> OwnDecisions:
    """The decisions in ``seats`` ``[games]``, one seat of each game of ``batch`` ``[games]``."""
    episode, move = (batch["player"] == seats.unsqueeze(1)).nonzero(as_tuple=True)
    rows = {key: batch[key][episode, move] for key in ("observation", "legal", "action", "probability", "player")}
    features = networks.features(rows["observation"], rows["player"])
    return OwnDecisions(episode, features, rows["legal"], rows["action"], rows["probability"])


def learn(learner: PPOResponse, own: OwnDecisions, returns: Tensor, seed: int) -> dict[str, Tensor]:
    """One PPO update of ``learner`` from its decisions; ``returns`` ``[games]``, paid at the end of each."""
    count = len(own.episode)
    state = torch.arange(count, device=own.episode.device)
    follows = torch.zeros_like(state, dtype=torch.bool)
    follows[:-1] = own.episode[1:] == own.episode[:-1]
    columns = {
        "state": state,  # the visited rows are what the learner tabulates
        "action": own.action,
        "probability": own.probability,
        "episode_return": returns[own.episode].float(),
        "next_state": torch.where(follows, state + 1, -1),
        "valid": torch.ones_like(follows),
    }
    learner.start(own.features, own.legal, 1, torch.Generator(), keep=True)
    decisions = TensorDict({key: value.unsqueeze(0) for key, value in columns.items()}, [1, count])
    return learner.update(decisions, seed)
