"""Batched rules as a TorchRL environment."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from datamodules.games.rules import TERMINAL, Rules, checked_int, resolve_chance, sample_rows


class RulesEnv(EnvBase):
    """``envs`` games of ``rules`` side by side; each step is one decision in every game, chance moves are drawn inside.

    Stateless but for its generator: the games' states travel in the TensorDict. ``set_seed`` makes resets and steps
    deterministic. Keys, batch size ``[envs]``:

    - ``state`` ``[envs, fields]`` int64: the rules' states;
    - ``observation`` ``[envs, features]`` float32: the mover's; 0 when the game is over;
    - ``action_mask`` ``[envs, actions]`` bool: the mover's legal actions; all True when the game is over, so that
      masked distributions stay defined;
    - ``player`` ``[envs, 1]`` int64: who moves; ``TERMINAL`` when the game is over;
    - ``action`` ``[envs]`` int64;
    - ``reward`` ``[envs, players]`` float32: every player's payoff, at the end of the game, else 0;
    - ``done``, ``terminated`` ``[envs, 1]`` bool.

    Stepping a finished game changes nothing and gives no reward. ``rand_action`` draws uniformly from the legal
    actions, from the environment's own generator.

    Args:
        rules: the game.
        envs: games in the batch.
        device: where states live and are stepped.
        check_actions: refuse illegal actions (on an accelerator this waits for the device at every step).
        seed: as for ``set_seed``.

    Raises:
        ValueError: if ``envs`` is not a positive integer; from ``step``, if an action is illegal.
    """

    def __init__(
        self,
        rules: Rules,
        envs: int,
        device: torch.device | str = "cpu",
        check_actions: bool = True,
        seed: int = 0,
    ) -> None:
        envs = checked_int("RulesEnv", "envs", envs, 1)
        super().__init__(device=torch.device(device), batch_size=(envs,))
        self.rules = rules
        self.check_actions = check_actions
        self.generator = torch.Generator(device=self.device)
        self._set_seed(seed)
        place, size, players, actions = self.device, torch.Size, rules.num_players, rules.num_actions
        self.observation_spec = Composite(
            state=Unbounded(size((envs, rules.initial(1).shape[1])), dtype=torch.int64, device=place),
            observation=Unbounded(size((envs, rules.observation_size)), dtype=torch.float32, device=place),
            action_mask=Binary(actions, size((envs, actions)), dtype=torch.bool, device=place),
            player=Bounded(TERMINAL, players - 1, size((envs, 1)), dtype=torch.int64, device=place),
            shape=size((envs,)),
        )
        self.action_spec = Categorical(actions, size((envs,)), dtype=torch.int64, device=place)
        self.reward_spec = Unbounded(size((envs, players)), dtype=torch.float32, device=place)
        self.done_spec = Categorical(2, size((envs, 1)), dtype=torch.bool, device=place)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """``tensordict`` with an ``action`` drawn uniformly from its ``action_mask``.

        Raises:
            ValueError: if there is no TensorDict with a mask to draw from.
        """
        if tensordict is None or tensordict.get("action_mask", None) is None:
            raise ValueError(
                "RulesEnv: rand_action: tensordict must hold 'action_mask', got none: pass what reset gave"
            )
        return tensordict.set("action", sample_rows(tensordict["action_mask"], self.generator))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        envs = self.batch_size[0]
        state = self.rules.initial(envs, self.device)
        chosen = tensordict.get("_reset", None) if tensordict is not None else None
        if chosen is None:
            state, mover = resolve_chance(self.rules, state, self.generator)
        else:  # TorchRL keeps the other rows as they were: draw nothing for them
            rows = chosen.reshape(envs).nonzero().squeeze(1)
            mover = torch.full((envs,), TERMINAL, dtype=torch.int64, device=self.device)
            state[rows], mover[rows] = resolve_chance(self.rules, state[rows], self.generator)
        return self._seen(state, mover)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        state, action = tensordict["state"], tensordict["action"]
        before = self.rules.mover(state)
        running = before != TERMINAL
        if self.check_actions:
            self._check(state, action, running)
        state = torch.where(running.unsqueeze(1), self.rules.step(state, action), state)
        state, mover = resolve_chance(self.rules, state, self.generator)
        reward = self.rules.returns(state) * (running & (mover == TERMINAL)).unsqueeze(1)
        return self._seen(state, mover).set("reward", reward.to(torch.float32))

    def _seen(self, state: Tensor, mover: Tensor) -> TensorDict:
        over = (mover == TERMINAL).unsqueeze(1)
        return TensorDict(
            {
                "state": state,
                "observation": self.rules.observation(state, mover),
                "action_mask": self.rules.legal(state) | over,
                "player": mover.unsqueeze(1),
                "done": over,
                "terminated": over.clone(),
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _check(self, state: Tensor, action: Tensor, running: Tensor) -> None:
        inside = (action >= 0) & (action < self.rules.num_actions)
        chosen = self.rules.legal(state).gather(1, action.clamp(0, self.rules.num_actions - 1).unsqueeze(1)).squeeze(1)
        bad = (running & ~(inside & chosen)).nonzero()
        if len(bad):
            row = int(bad[0])
            legal = self.rules.legal(state[row : row + 1])[0].nonzero().squeeze(1).tolist()
            raise ValueError(f"RulesEnv: action: must be one of {legal} in row {row}, got {int(action[row])}")
