"""MiniWoB++ in a real browser as a TorchRL environment, batched over live pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from torchrl.data import Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase

from datamodules.envs.browser.pool import MiniWoBPool
from modules.contracts.browsing import EpisodeSpec, PageView
from modules.seeds import stream_seed

_TEXTS = ("utterance", "html", "page", "status", "task", "seed")


class MiniWoBEnv(EnvBase):
    """Live pages as one environment of batch size ``[slots]``: all act at once, over all browsers of the pool.

    Texts are NonTensor entries, one per page: ``utterance``, ``html``, ``page`` (compact), ``status`` (of the last
    action), ``task``, ``seed``. ``action`` is an instruction's text; what is no instruction changes nothing and shows
    in ``status``. ``reward`` float32 ``[slots, 1]``: the raw reward when the episode ends, else 0. ``done`` =
    ``terminated``. The n-th episode of a slot is a pure function of the seed, the slot and n; a reset TensorDict that
    holds ``task`` and ``seed`` chooses its episodes itself.

    Args:
        pool: the pages; closed with the environment.
        tasks: names, taken in turn.
        seed: of the episodes.

    Raises:
        ValueError: no task, or an unknown one.
    """

    def __init__(self, pool: MiniWoBPool, tasks: Sequence[str], seed: int = 0) -> None:
        if not tasks:
            raise ValueError("MiniWoBEnv: tasks is empty")
        pool.tasks.check(tasks)
        super().__init__(device=torch.device("cpu"), batch_size=torch.Size([pool.slots]))
        self.is_closed = False  # or nobody would close it
        self.pool, self.tasks = pool, list(tasks)
        self._seed_value = seed
        self._episodes = [0] * pool.slots
        self._views: list[PageView] = []
        self._specs: list[EpisodeSpec] = []
        shape = torch.Size([pool.slots])
        texts = {name: NonTensor(shape, example_data="") for name in _TEXTS}
        self.observation_spec = Composite(texts, shape=shape)
        self.action_spec = NonTensor(shape, example_data="press enter")
        self.reward_spec = Unbounded(torch.Size([*shape, 1]), dtype=torch.float32)
        self.done_spec = Composite(
            {name: Categorical(2, shape=torch.Size([*shape, 1]), dtype=torch.bool) for name in ("done", "terminated")},
            shape=shape,
        )

    def _next(self, slot: int) -> EpisodeSpec:
        number = self._episodes[slot]
        self._episodes[slot] += 1
        task = self.tasks[(slot + number * self.pool.slots) % len(self.tasks)]
        return EpisodeSpec(task, str(stream_seed(self._seed_value, slot, number) % 10**12))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        slots = list(range(self.pool.slots))
        given: list[EpisodeSpec] | None = None
        if tensordict is not None:
            if "_reset" in tensordict:
                slots = torch.nonzero(tensordict.get("_reset").flatten()).flatten().tolist()
            elif "task" in tensordict and "seed" in tensordict:
                pairs = zip(_strings(tensordict, "task"), _strings(tensordict, "seed"), strict=True)
                given = [EpisodeSpec(task, seed) for task, seed in pairs]
        if not self._views:
            slots = list(range(self.pool.slots))
            self._views = [PageView("", "", "")] * self.pool.slots
            self._specs = [EpisodeSpec("", "")] * self.pool.slots
        for slot in slots:
            self._specs[slot] = given[slot] if given is not None else self._next(slot)
        for slot, view in self.pool.reset_pages({slot: self._specs[slot] for slot in slots}).items():
            self._views[slot] = view
        return self._observed(reset=True)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = _strings(tensordict, "action")
        for slot, view in self.pool.step_pages(dict(enumerate(actions))).items():
            self._views[slot] = view
        return self._observed(reset=False)

    def _observed(self, reset: bool) -> TensorDict:
        views, specs = self._views, self._specs
        done = torch.tensor([[view.done] for view in views])
        texts = {name: [getattr(view, name) for view in views] for name in ("utterance", "html", "page", "status")}
        texts |= {"task": [spec.task for spec in specs], "seed": [spec.seed for spec in specs]}
        stack: Any = NonTensorStack
        values: dict[str, Any] = {name: stack(*column) for name, column in texts.items()}
        values |= {"done": done, "terminated": done.clone()}
        if not reset:
            values["reward"] = torch.tensor([[view.reward if view.done else 0.0] for view in views])
        return TensorDict(values, batch_size=self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        self._seed_value = 0 if seed is None else seed
        self._episodes = [0] * self.pool.slots

    def close(self, *, raise_if_closed: bool = True) -> None:
        self.pool.close()
        super().close(raise_if_closed=raise_if_closed)

    def __del__(self) -> None:
        """Nothing: collected in whatever thread, perhaps the pool's own. The pool itself ends with the process."""


def _strings(tensordict: TensorDictBase, key: str) -> list[str]:
    value = tensordict.get(key)
    listed = value.tolist() if hasattr(value, "tolist") else value
    return [str(text) for text in listed] if isinstance(listed, list) else [str(listed)]
