"""Members that are networks alone: they act on observations, and nothing is tabulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
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
