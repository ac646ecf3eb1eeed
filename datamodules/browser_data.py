"""Computer tasks in a real browser: live pages for agents, and demonstrations to train them on."""

from __future__ import annotations

import glob
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.envs.browser.demonstrations import (
    AUGMENTATION,
    Episode,
    Step,
    check_experts,
    expert_move,
    load_drafts,
    load_episodes,
    page_key,
    record,
    summary,
    training_rows,
)
from datamodules.envs.browser.pool import MiniWoBPool
from datamodules.math_data import task_dataloaders
from datamodules.sft_data import SFTDataModule
from datamodules.text.sft import SFTSource
from datamodules.text.specs import as_spec
from datamodules.text.tokenizer import TextTokenizer, train_tokenizer
from modules.contracts.browsing import ActionPrompts, ActionStatus, EpisodeSpec, PageView
from modules.contracts.page_edits import PlantedInstruction, PlantsInstructions
from modules.files import atomic_write, canonical_digest, sha256_file


class BrowserDataModule(LightningDataModule):
    """MiniWoB++ tasks in a Chromium, as episodes to play (``test``) and as demonstrations to learn from (``fit``).

    A test batch is a list of ``{"task", "seed"}``; the module plays them on this datamodule's pages
    (:class:`~modules.contracts.browsing.ProvidesPages`). (task, seed) pairs are shared out over ranks without
    repeating; every rank has browsers of its own. Training batches are those of
    :class:`~datamodules.sft_data.SFTDataModule`. Experts are recorded once, into ``cache_dir``; a killed recording goes
    on where it was.

    Args:
        tasks: names (``paper``: the 55 of the RCI paper, ``experts``: all with a scripted expert).
        episodes: test episodes per task, seeds ``<seed_prefix>0 ..``.
        seed_prefix: of the test seeds; must differ from the demonstrations' ``tr``.
        batch_size: training: rows per optimiser step over all ranks; test: ``episode_batch`` episodes over all ranks.
        episode_batch: see ``batch_size``.
        browsers, pages: browser processes, and live pages in each, on every rank.
        episode_ms, settle_ms, timeout, mode, page_folder, browser, sandbox: see
            :class:`~datamodules.envs.browser.pool.MiniWoBPool`.
        experts: tell agents' logs what the expert would do on every page they come to.
        demonstrations: training episodes per task, seeds ``tr0 ..``.
        drafts: files (patterns) with steps and a model's drafts, from the agent's ``drafts``; trained on as well.
        renamed: renamed copies of each step, so that copying names is learnt and not the names.
        critiques: train critique and improvement turns, on drafts and on corrupted instructions.
        injections: share of the training steps whose page also holds a text that asks for something else, which the
            expert ignores; the module brings the texts (none that it is measured by).
        prompts: the short prompts, the same in training and play.
        tokenizer: folder with tokenizer.json; None: trained on the demonstrations without injections
            (``vocab_size`` entries), so that it does not depend on their share.
        cache_dir: demonstrations, tokenizers and tokenised rows; safe to delete.
        seq_len: tokens per training row; longer examples are dropped and counted.
        packing: several examples per row, hidden from each other.
        holdout_fraction: of the examples, for validation.
        eval_batch_size: held-out rows per batch over all ranks.
        seed: of augmentation and of the order of rows.

    Raises:
        ValueError: an unknown task or one without an expert, a value out of range. ImportError, FileNotFoundError: no
            package, no browser; one line that says what to install.
    """

    task = "browser"

    def __init__(
        self,
        tasks: list[str],
        episodes: int = 50,
        seed_prefix: str = "te",
        batch_size: int = 32,
        episode_batch: int = 64,
        browsers: int = 1,
        pages: int = 8,
        episode_ms: int = 1_000_000,
        settle_ms: int = 500,
        timeout: float = 20.0,
        mode: Literal["train", "test"] = "train",
        page_folder: str | None = None,
        browser: str | None = None,
        sandbox: bool = False,
        experts: bool = False,
        demonstrations: int = 100,
        drafts: list[str] | None = None,
        renamed: int = 8,
        critiques: bool = True,
        injections: float = 0.0,
        prompts: ActionPrompts | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 768,
        cache_dir: str = ".cache/rci",
        seq_len: int = 384,
        packing: bool = True,
        holdout_fraction: float = 0.02,
        eval_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pool = MiniWoBPool(
            browsers, pages, episode_ms, settle_ms, timeout, mode, folder=page_folder, browser=browser, sandbox=sandbox
        )
        self.tasks = self._named(tasks)
        for key, value, least in (
            ("episodes", episodes, 1), ("episode_batch", episode_batch, 1), ("batch_size", batch_size, 1),
            ("demonstrations", demonstrations, 1), ("renamed", renamed, 0), ("vocab_size", vocab_size, 258),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"BrowserDataModule: {key} must be >= {least}, got {value}")
        if not 0.0 <= injections <= 1.0:
            raise ValueError(f"BrowserDataModule: injections must be a share in [0, 1], got {injections}")
        if seed_prefix.startswith("tr"):
            raise ValueError("BrowserDataModule: seed_prefix: seeds that begin with 'tr' are the demonstrations'")
        if experts:
            check_experts(self.tasks)
        self.episodes, self.seed_prefix, self.episode_batch = episodes, seed_prefix, episode_batch
        self.batch_size, self.mode, self.experts = batch_size, mode, experts
        self.demonstrations, self.drafts = demonstrations, list(drafts or [])
        self.renamed, self.critiques, self.injections, self.seed = renamed, critiques, injections, seed
        self._prompts = as_spec(ActionPrompts, prompts or {})
        self._tokenizer_dir, self.vocab_size, self.cache_dir = tokenizer, vocab_size, Path(cache_dir)
        self._text_options: dict[str, Any] = {
            "seq_len": seq_len, "batch_size": batch_size, "packing": packing, "document_mask": packing,
            "holdout_fraction": holdout_fraction, "eval_batch_size": eval_batch_size, "seed": seed,
        }  # fmt: skip
        self._text: SFTDataModule | None = None
        self._tokenizer: TextTokenizer | None = None
        self._familiar: set[str] = set()
        self._views: dict[int, PageView] = {}
        self._specs: dict[int, EpisodeSpec] = {}
        self._past: dict[int, list[str]] = {}
        self.save_hyperparameters(
            {
                "tasks": self.tasks, "episodes": episodes, "seed_prefix": seed_prefix, "mode": mode,
                "demonstrations": demonstrations, "renamed": renamed, "critiques": critiques,
                "injections": injections, "seed": seed,
                "prompts": asdict(self._prompts), "miniwob": _version(),
            },
            logger=False,
        )  # fmt: skip

    def _named(self, tasks: Sequence[str]) -> list[str]:
        from datamodules.envs.browser.experts import EXPERTS
        from datamodules.envs.browser.tasks import PAPER_TASKS

        groups = {"paper": list(PAPER_TASKS), "experts": sorted(EXPERTS)}
        names = list(dict.fromkeys(name for task in tasks for name in groups.get(task, [task])))
        if not names:
            raise ValueError("BrowserDataModule: tasks is empty")
        self.pool.tasks.check(names)
        return names

    # ------------------------------------------------------------------------------------------------- demonstrations

    def _demonstration_file(self, task: str) -> Path:
        return self.cache_dir / f"miniwob-{_version()}-{self.mode}" / f"{task}.jsonl"

    def _recorded(self) -> list[Episode]:
        """The demonstrations of all tasks, from the files.

        Raises:
            FileNotFoundError: ``prepare_data`` has not run.
        """
        found = []
        for task in self.tasks:
            path = self._demonstration_file(task)
            episodes = load_episodes(path) if path.is_file() else {}
            wanted = [(task, f"tr{number}") for number in range(self.demonstrations)]
            missing = [key for key in wanted if key not in episodes]
            if missing:
                raise FileNotFoundError(f"BrowserDataModule: {path} lacks {len(missing)} episodes; run prepare_data()")
            found += [episodes[key] for key in wanted]
        return found

    def _draft_steps(self) -> list[Step]:
        steps: dict[tuple[Any, ...], Step] = {}
        for pattern in self.drafts:
            paths = sorted(glob.glob(pattern))
            if not paths:
                raise FileNotFoundError(f"BrowserDataModule: drafts: '{pattern}' matches no file")
            for path in paths:
                for step in load_drafts(Path(path)):
                    steps[step.task, step.seed, step.page, step.history] = step
        test = [step.seed for step in steps.values() if step.seed.startswith(self.seed_prefix)]
        if test:
            raise ValueError(f"BrowserDataModule: drafts: seed '{test[0]}' is a test seed; draw drafts on others")
        return [steps[key] for key in sorted(steps)]

    def prepare_data(self) -> None:
        """For ``fit``: record what demonstrations are missing, write and tokenise the training rows (once a node)."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        check_experts(self.tasks)
        try:
            for task in self.tasks:
                specs = [EpisodeSpec(task, f"tr{number}") for number in range(self.demonstrations)]
                done = record(self.pool, specs, self._demonstration_file(task))
                solved = sum(episode.solved for episode in done)
                if solved < 0.9 * len(done):
                    raise RuntimeError(
                        f"demonstrations: the expert of {task} solved {solved} of {len(done)} episodes; what it did is "
                        f"in {self._demonstration_file(task)}"
                    )
        finally:
            self.pool.close()
        path = self._rows_file
        if not path.is_file():
            with atomic_write(path, "w") as stream:
                for row in self._rows(self.injections):
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        folder = self._tokenizer_folder()
        if not (folder / "tokenizer.json").is_file():
            rows = self._rows(0.0)
            train_tokenizer((row["prompt"] + row["response"] for row in rows), self.vocab_size, folder, True)
        self._build_text().prepare_data()

    def _rows(self, injections: float) -> Iterator[dict[str, str]]:
        return training_rows(
            self._steps(), self._prompts, renamed=self.renamed, critiques=self.critiques, seed=self.seed,
            planted=injections, instructions=self._instructions if injections else (),
        )  # fmt: skip

    @cached_property
    def _instructions(self) -> tuple[PlantedInstruction, ...]:
        module = getattr(self.trainer, "lightning_module", None)
        if not isinstance(module, PlantsInstructions):
            raise ValueError(
                f"BrowserDataModule: {type(module).__name__} brings no texts to plant on pages: set injections to 0"
            )
        return tuple(module.training_instructions())

    def _steps(self) -> list[Step]:
        solved = [episode for episode in self._recorded() if episode.solved]
        return [step for episode in solved for step in episode.decisions()] + self._draft_steps()

    @cached_property
    def _rows_file(self) -> Path:
        """Named by all that decides its content; asked when the demonstrations are complete."""
        key = self._rows_key
        if self.injections:
            texts = [asdict(instruction) for instruction in self._instructions]
            key = canonical_digest([key, self.injections, texts])[:24]
        return self.cache_dir / f"rows-{key}.jsonl"

    @cached_property
    def _rows_key(self) -> str:
        """Of the rows without injections."""
        sources = [sha256_file(Path(path)) for pattern in self.drafts for path in sorted(glob.glob(pattern))]
        episodes = canonical_digest([asdict(episode) for episode in self._recorded()])
        return canonical_digest(
            [AUGMENTATION, episodes, sources, asdict(self._prompts), self.renamed, self.critiques, self.seed]
        )[:24]

    def _tokenizer_folder(self) -> Path:
        if self._tokenizer_dir is not None:
            return Path(self._tokenizer_dir)
        return self.cache_dir / f"tokenizer-rows-{self._rows_key}-{self.vocab_size}-apart"

    def _trained_tokenizer(self) -> Path | None:
        """The folder of the tokenizer in use, where it can be told and is there."""
        try:
            folder = self._tokenizer_folder()
        except FileNotFoundError:  # no demonstrations here
            return None
        return folder if (folder / "tokenizer.json").is_file() else None

    def _build_text(self) -> SFTDataModule:
        text = SFTDataModule(
            [SFTSource("demonstrations", str(self._rows_file))], str(self._tokenizer_folder()), str(self.cache_dir),
            overlong="drop", **self._text_options,
        )  # fmt: skip
        text.trainer = self.trainer
        return text

    def setup(self, stage: str) -> None:
        if stage == "fit" and self._text is None:
            self._text = self._build_text()
            self._text.setup(stage)
            self._tokenizer = self._text.tokenizer
        elif stage != "fit":
            folder = self._trained_tokenizer() if self._tokenizer_dir is None else self._tokenizer_dir
            if folder is not None:
                self._tokenizer = TextTokenizer(folder)
            for task in self.tasks:
                path = self._demonstration_file(task)
                if path.is_file():
                    first = [e.steps[0] for e in load_episodes(path).values() if e.steps]
                    self._familiar |= {page_key(step["goal"], step["page"]) for step in first}

    def teardown(self, stage: str) -> None:
        self.pool.close()

    # ---------------------------------------------------------------------------------------------------------- loaders

    def _need_text(self) -> SFTDataModule:
        if self._text is None:
            raise RuntimeError("BrowserDataModule: call prepare_data() and setup('fit') first")
        return self._text

    @property
    def tokenizer(self) -> TextTokenizer | None:
        """The tokenizer in use; None where the agent is a backend with its own."""
        return self._tokenizer

    @property
    def seq_len(self) -> int | None:
        return None if self._text is None else self._text.seq_len

    def train_dataloader(self) -> Any:
        return self._need_text().train_dataloader()

    def val_dataloader(self) -> Any:
        return self._need_text().val_dataloader()

    def test_dataloader(self) -> list[DataLoader]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        items: Any = {
            "episodes": [
                {"task": task, "seed": f"{self.seed_prefix}{number}"}
                for task in self.tasks
                for number in range(self.episodes)
            ]
        }
        return task_dataloaders(items, rank, world_size, self.episode_batch)

    # ------------------------------------------------------------------------------------------------------- live pages

    @property
    def slots(self) -> int:
        return self.pool.slots

    @property
    def action_prompts(self) -> ActionPrompts:
        return self._prompts

    def reset_pages(self, episodes: Mapping[int, EpisodeSpec]) -> dict[int, PageView]:
        views = self.pool.reset_pages(episodes)
        for slot, view in views.items():
            self._specs[slot], self._past[slot] = episodes[slot], []
            views[slot] = replace(view, familiar=page_key(view.utterance, view.page) in self._familiar)
        return self._with_experts(views)

    def step_pages(self, instructions: Mapping[int, str]) -> dict[int, PageView]:
        views = self.pool.step_pages(instructions)
        for slot, text in instructions.items():
            self._past[slot].append(text)
        return self._with_experts(views)

    def _with_experts(self, views: dict[int, PageView]) -> dict[int, PageView]:
        if not self.experts:
            return views
        return {
            slot: replace(view, expert=expert_move(self._specs[slot].task, view, self._past[slot]))
            for slot, view in views.items()
        }

    def probe_pages(self, instructions: Mapping[int, str]) -> dict[int, ActionStatus]:
        return self.pool.probe_pages(instructions)

    def screenshots(self, slots: Sequence[int]) -> dict[int, bytes]:
        return self.pool.screenshots(slots)

    # -------------------------------------------------------------------------------------------------------- contracts

    def training_sources(self) -> list[tuple[str, str]]:
        """Names and licences of what is trained on."""
        found = [("demonstrations of scripted experts on generated MiniWoB++ episodes", "CC0-1.0")]
        return found + [(f"drafts in {pattern}", "unknown") for pattern in self.drafts]

    def describe(self) -> dict[str, str]:
        """Keys of a training batch, and what is played."""
        keys = {} if self._text is None else self._text.describe()
        return {**keys, "task, seed": f"{len(self.tasks)} tasks x {self.episodes} episodes"}

    def demonstration_summary(self) -> dict[str, Any]:
        """Recorded episodes, solved ones and steps by task."""
        return summary(self._recorded())

    def digest(self) -> dict[str, str]:
        """What every rank must agree on, and what an evaluation's outcomes belong to."""
        found = {
            "miniwob": _version(), "mode": self.mode, "episode_ms": str(self.pool.episode_ms),
            "prompts": canonical_digest(asdict(self._prompts)),
        }  # fmt: skip
        return found if self._text is None else found | self._text.digest()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._text is None else self._text.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._text is not None and state_dict:
            self._text.load_state_dict(state_dict)


def _version() -> str:
    return importlib.metadata.version("miniwob")
