"""Any routing problem as a TorchRL environment; the same rules as the tensors that solvers decode on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from datamodules.routing.distributions import make_distribution, uniform_noise
from datamodules.routing.problem import Problem

Coordinates = Callable[[Tensor, torch.Generator], Tensor]
"""Makes coordinates ``[count, N, 2]`` of uniform noise of that shape and a generator for what else it draws."""

_MEASURED = ("original", "rounded")
"""Fields of instances that decide costs only."""
_HIDDEN = ("real_prize",)
"""Fields that policies must not see: real prizes show in the context once they are collected."""


class RoutingEnv(EnvBase):
    """``envs`` instances of a routing problem, one route of each, stepped as one.

    TorchRL keys, batch size ``[envs]``:

    - the instance: ``locs`` ``[envs, N, 2]`` and the problem's other fields, the same at every step of an episode,
      without real prizes, which show in the context once they are collected;
    - ``current_node`` ``[envs]`` int64, 0 before the first step; ``first_node`` likewise where routes are closed;
    - ``action_mask`` ``[envs, N]`` bool: nodes that may come next, at least one;
    - ``context`` ``[envs, context_features]`` float32, where the problem has some;
    - ``action`` ``[envs]`` int64: the next node;
    - ``reward`` ``[envs, 1]`` float32: minus the route's cost at the step that finishes it, else 0;
    - ``done``, ``terminated`` ``[envs, 1]`` bool. A finished route waits for its reset: steps change nothing, and its
      mask leaves the depot, or its last node where there is no depot.

    :meth:`reset` takes the instances from the tensordict that it is given, if there are ``locs`` in it, with
    ``original`` and ``rounded`` as in files where costs are to be measured so. Otherwise, and at the end of an episode
    within a rollout, instances are drawn from the environment's own generator.

    Args:
        problem: the rules.
        envs: instances in the batch.
        size: customers of each.
        distribution: of drawn coordinates: a name, a mapping of names to weights
            (:func:`~datamodules.routing.distributions.make_distribution`), or what makes coordinates of noise.
        device: where instances live and are stepped.
        seed: of the generator.

    Raises:
        ValueError: a count below 1, an unknown distribution, a size without a rule; from :meth:`reset`, instances that
            are not of this problem, batch or size; from :meth:`step`, an action that is not allowed, naming the
            instance.
    """

    def __init__(
        self,
        problem: Problem,
        envs: int,
        size: int = 20,
        distribution: str | dict[str, float] | Coordinates = "uniform",
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        for field, value in (("envs", envs), ("size", size)):
            if value < 1:
                raise ValueError(f"RoutingEnv: {field} must be >= 1, got {value}")
        super().__init__(device=torch.device(device), batch_size=(envs,))
        self.problem, self.envs, self.size = problem, envs, size
        self.nodes = problem.nodes(size)
        known = isinstance(distribution, str | dict)
        self.distribution: Coordinates = make_distribution(distribution) if known else distribution
        self.generator = torch.Generator(device=self.device)
        sample = self._drawn(1, self.generator.manual_seed(0))
        self.instance_keys = tuple(sorted(map(str, sample.keys())))
        self.visible_keys = tuple(key for key in self.instance_keys if key not in _HIDDEN)
        self.generator.manual_seed(seed)
        self._make_specs(sample)
        rows = torch.arange(envs, device=self.device)
        self.instances = sample.expand(envs).clone()
        self.state: dict[str, Tensor] = problem.begin(self.instances, 1)
        self._taken = torch.zeros(envs, problem.max_steps(self.nodes), dtype=torch.int64, device=self.device)
        self._elapsed = torch.zeros_like(rows)
        self._first = torch.zeros_like(rows)
        self._finished = torch.zeros_like(rows, dtype=torch.bool)

    def _make_specs(self, sample: TensorDict) -> None:
        each, place = torch.Size([self.envs]), self.device
        node = Categorical(self.nodes, each, dtype=torch.int64, device=place)
        seen: dict[str, TensorSpec] = {
            key: Unbounded(torch.Size([*each, *sample[key].shape[1:]]), dtype=sample[key].dtype, device=place)
            for key in self.visible_keys
        }
        seen["current_node"] = node.clone()
        if self.problem.spec.closed:
            seen["first_node"] = node.clone()
        if self.problem.spec.context_features:
            shape = torch.Size([*each, self.problem.spec.context_features])
            seen["context"] = Unbounded(shape, dtype=torch.float32, device=place)
        seen["action_mask"] = Binary(self.nodes, torch.Size([*each, self.nodes]), dtype=torch.bool, device=place)
        single = torch.Size([self.envs, 1])
        flag = Categorical(2, single, dtype=torch.bool, device=place)
        self.observation_spec = Composite(seen, shape=each)
        self.action_spec = Composite(action=node, shape=each)
        self.reward_spec = Composite(reward=Unbounded(single, dtype=torch.float32, device=place), shape=each)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), shape=each)

    # -- instances ----------------------------------------------------------------------------------------------------
    def _drawn(self, count: int, generator: torch.Generator) -> TensorDict:
        locs = self.distribution(uniform_noise(count, self.nodes, generator), generator)
        if locs.shape != (count, self.nodes, 2):
            raise ValueError(
                f"RoutingEnv: distribution must make coordinates [{count}, {self.nodes}, 2], got {list(locs.shape)}"
            )
        return self.problem.generate(locs, generator)

    def _given(self, tensordict: TensorDictBase) -> TensorDict:
        """The instances in ``tensordict``, checked."""
        keys = [*self.instance_keys, *(key for key in _MEASURED if key in tensordict)]
        missing = [key for key in self.instance_keys if key not in tensordict]
        if missing:
            raise ValueError(
                f"RoutingEnv: {self.problem.name}: given instances lack {', '.join(missing)}: they need "
                f"{', '.join(self.instance_keys)}"
            )
        shape = (self.envs, self.nodes, 2)
        if tensordict["locs"].shape != shape:
            raise ValueError(f"RoutingEnv: given locs must be {list(shape)}, got {list(tensordict['locs'].shape)}")
        given = TensorDict({key: tensordict[key] for key in keys}, [self.envs]).to(self.device)
        self.problem.check_instances(given)
        return given

    def _redraw(self, rows: Tensor) -> None:
        """New instances and routes at ``rows`` ``[R]`` int64; the others are left alone."""
        fresh = self._drawn(len(rows), self.generator)
        if "original" in self.instances:  # of instances given before; these are measured as they are seen
            fresh["original"] = fresh["locs"].to(self.instances["original"].dtype)
        if "rounded" in self.instances:
            fresh["rounded"] = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        self.instances = TensorDict(
            {key: _replaced(value, rows, fresh[key]) for key, value in self.instances.items()}, [self.envs]
        )
        state = self.problem.begin(fresh, 1)
        self.state = {key: _replaced(value, rows, state[key]) for key, value in self.state.items()}
        for value in (self._taken, self._elapsed, self._first, self._finished):
            value[rows] = 0

    # -- stepping -----------------------------------------------------------------------------------------------------
    @property
    def routes(self) -> Tensor:
        """``[envs, max_steps]``: the actions so far, then zeros."""
        return self._taken

    def action_mask(self) -> Tensor:
        """``[envs, N]`` bool: nodes that may come next."""
        current = self.state["current"][:, 0]
        rest = torch.zeros_like(current) if self.problem.spec.depot else current
        waiting = torch.nn.functional.one_hot(rest, self.nodes).bool()
        return torch.where(self._finished.unsqueeze(-1), waiting, self.state["allowed"][:, 0])

    def check_actions(self, action: Tensor, moving: Tensor) -> None:
        """Raises: ValueError for actions of another shape or type, or not allowed where ``moving`` ``[envs]``."""
        if action.shape != (self.envs,) or action.dtype != torch.int64:
            raise ValueError(f"RoutingEnv: action must be int64 [{self.envs}], got {action.dtype} {list(action.shape)}")
        inside = (action >= 0) & (action < self.nodes)
        legal = self.action_mask().gather(1, action.clamp(0, self.nodes - 1).unsqueeze(1)).squeeze(1)
        wrong = moving & ~(inside & legal)
        if bool(wrong.any()):
            instance = int(wrong.nonzero()[0])
            raise ValueError(
                f"RoutingEnv: {self.problem.name}: instance {instance}: action {int(action[instance])} is not allowed "
                f"at node {int(self.state['current'][instance, 0])}: take one where action_mask is true"
            )

    def _advance(self, action: Tensor, moving: Tensor) -> Tensor:
        """Move the routes marked in ``moving`` ``[envs]`` on; rewards ``[envs]``."""
        if bool(moving.all()):
            self.problem.step(self.state, action.unsqueeze(1))
        else:
            rows = moving.nonzero().squeeze(1)
            part = {key: value[rows] for key, value in self.state.items()}
            self.problem.step(part, action[rows].unsqueeze(1))
            self.state = {key: _replaced(value, rows, part[key]) for key, value in self.state.items()}
        at = self._elapsed.clamp(max=self._taken.shape[1] - 1).unsqueeze(1)
        kept = self._taken.gather(1, at).squeeze(1)
        self._taken.scatter_(1, at, torch.where(moving, action, kept).unsqueeze(1))
        self._first = torch.where(moving & (self._elapsed == 0), action, self._first)
        self._elapsed = self._elapsed + moving.long()
        now = moving & self.problem.finished(self.state)[:, 0]
        self._finished = self._finished | now
        reward = torch.zeros(self.envs, device=self.device)
        if bool(now.any()):
            rows = now.nonzero().squeeze(1)
            cost = self.problem.cost(_rows(self.instances, rows), self._taken[rows].unsqueeze(1))
            reward[rows] = -cost[:, 0].float()
        return reward

    # -- exact position -----------------------------------------------------------------------------------------------
    def snapshot(self) -> dict[str, Tensor]:
        """Everything that decides how the batch goes on; loadable by ``torch.load(weights_only=True)``."""
        return {
            **{f"instances.{key}": value.clone() for key, value in self.instances.items()},
            **{f"state.{key}": value.clone() for key, value in self.state.items()},
            "taken": self._taken.clone(),
            "elapsed": self._elapsed.clone(),
            "first": self._first.clone(),
            "finished": self._finished.clone(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where :meth:`snapshot` was taken.

        Raises:
            ValueError: a snapshot of another problem, size or batch.
        """
        mine = self.snapshot()
        optional = {f"instances.{key}" for key in _MEASURED} | {"state.scale", "state.rounded"}
        for key, value in mine.items():
            if key in optional:
                continue
            if key not in state or state[key].shape != value.shape:
                got = list(state[key].shape) if key in state else "nothing"
                raise ValueError(
                    f"RoutingEnv: snapshot: '{key}' must be {list(value.shape)}, got {got}: it is of another problem, "
                    "size or number of environments"
                )
        here = {key: value.to(self.device, copy=True) for key, value in state.items() if key != "generator"}
        fields = {key.removeprefix("instances."): v for key, v in here.items() if key.startswith("instances.")}
        self.instances = TensorDict(fields, [self.envs], device=self.device)
        self.state = {key.removeprefix("state."): v for key, v in here.items() if key.startswith("state.")}
        self._taken, self._elapsed = here["taken"], here["elapsed"]
        self._first, self._finished = here["first"], here["finished"]
        self.generator.set_state(state["generator"].cpu())

    # -- TorchRL ------------------------------------------------------------------------------------------------------
    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        chosen = tensordict.get("_reset", None) if tensordict is not None else None
        if chosen is not None:
            rows = chosen.reshape(self.envs).nonzero().squeeze(1)
            if len(rows):
                self._redraw(rows)
            return self._seen()
        given = tensordict is not None and "locs" in tensordict
        self.instances = self._given(tensordict) if given else self._drawn(self.envs, self.generator)
        self.state = self.problem.begin(self.instances, 1)
        for value in (self._taken, self._elapsed, self._first, self._finished):
            value.zero_()
        return self._seen()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action, chosen = tensordict["action"], tensordict.get("_step", None)
        moving = torch.ones_like(self._finished) if chosen is None else chosen.reshape(self.envs)
        self.check_actions(action, moving)
        reward = self._advance(action, moving & ~self._finished)
        return self._seen().set("reward", reward.unsqueeze(-1))

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Uniformly drawn among the nodes that may come next."""
        mask = self.action_mask() if tensordict is None else tensordict["action_mask"]
        if tensordict is None:
            tensordict = TensorDict({}, [self.envs], device=self.device)
        return tensordict.set("action", mask.float().multinomial(1).squeeze(1))

    def _seen(self) -> TensorDict:
        fields = {key: self.instances[key].to(self.observation_spec[key].dtype) for key in self.visible_keys}
        fields["current_node"] = self.state["current"][:, 0].clone()
        if self.problem.spec.closed:
            fields["first_node"] = self._first.clone()
        context = self.problem.context(self.state)
        if context is not None:
            fields["context"] = context[:, 0].float()
        done = self._finished.unsqueeze(-1)
        fields |= {"action_mask": self.action_mask(), "done": done.clone(), "terminated": done.clone()}
        return TensorDict(fields, [self.envs], device=self.device)


def _replaced(value: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return value.index_copy(0, rows, new.to(value.dtype))


def _rows(instances: TensorDict, rows: Tensor) -> TensorDict:
    return instances[rows]  # pyright: ignore[reportReturnType]
