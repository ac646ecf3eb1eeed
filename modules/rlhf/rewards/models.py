"""Rewards from models and from the user's own functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modules.files import canonical_digest, sha256_file
from modules.optional import require
from modules.rlhf.classifier_files import PairInputs, classifier_digest, label_of, load_classifier
from modules.rlhf.rewards.base import Responses, Reward


def _folder_digest(folder: Path) -> str:
    """sha256 of the names and contents of the folder's weights and settings."""
    files = sorted(file for pattern in ("*.safetensors", "*.json") for file in folder.rglob(pattern))
    return canonical_digest({str(file.relative_to(folder)): sha256_file(file) for file in files})


@contextmanager
def _no_progress_bar(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


class HFClassifier(Reward):
    """Score of any Hugging Face sequence classifier in a local folder.

    Only safetensors are read, no code of the folder is run, nothing is fetched.

    Args:
        path: folder with the model and its tokenizer.
        label: name of the class to score, as in the model's ``id2label``; or
        label_index: its number; or
        label_key: name of the sample's label that holds the number of the class to score (``act``: the act of the human
            reply). A model with one output needs none of the three.
        mode: ``probability`` of the class (one output: its sigmoid), its ``logit``, or ``argmax``: 1 where the class is
            the most probable one, else 0.
        template: the model's input; ``{prompt}`` and ``{response}`` are put in.
        max_length: tokens; ``None``: what the model can take.
        truncate: end at which a longer text is cut.
        batch_size: texts in a forward pass.

    Raises:
        ValueError: more than one of the three ways to name the class, a template without ``{response}``, a size below
            1.
    """

    learnt = True

    def __init__(
        self,
        path: str,
        label: str | None = None,
        label_index: int | None = None,
        label_key: str | None = None,
        mode: Literal["probability", "logit", "argmax"] = "probability",
        template: str = "{prompt} {response}",
        max_length: int | None = None,
        truncate: Literal["left", "right"] = "left",
        batch_size: int = 32,
    ) -> None:
        if sum(value is not None for value in (label, label_index, label_key)) > 1:
            raise ValueError("HFClassifier: give only one of label, label_index and label_key")
        if "{response}" not in template:
            raise ValueError("HFClassifier: template must hold {response}")
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError("HFClassifier: batch_size and max_length must be at least 1")
        self.path, self.label, self.label_index, self.label_key = path, label, label_index, label_key
        self.mode, self.template, self.max_length = mode, template, max_length
        self.truncate, self.batch_size = truncate, batch_size
        self.bounds = (-float("inf"), float("inf")) if mode == "logit" else (0.0, 1.0)
        self._model: Any = None
        self._tokenizer: Any = None
        self._class = 0
        self._device = torch.device("cpu")

    def setup(self, tokenizer: Any = None, device: torch.device | None = None) -> None:
        """Load model and tokenizer.

        Args:
            tokenizer: not used: the model has its own.
            device: where the model runs.

        Raises:
            FileNotFoundError: no such folder, or it has no ``config.json``.
            ValueError: no safetensors weights, weights that do not fit, a class that the model does not have.
        """
        folder = Path(self.path)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"HFClassifier: path {folder} holds no config.json; give a model folder")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"HFClassifier: path {folder} holds no safetensors weights; no others are loaded")
        transformers = require("transformers", extra="rlhf")
        trusted: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, padding_side="right", truncation_side=self.truncate, **trusted
        )
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        with _no_progress_bar(transformers):
            model, report = load(folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **trusted)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"HFClassifier: path {folder} is no trained classifier: it has no {', '.join(missing[:3])}"
            )
        if self._tokenizer.pad_token is None:
            if self._tokenizer.eos_token is None:
                raise ValueError(f"HFClassifier: the tokenizer in {folder} has neither a pad_token nor an eos_token")
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # Decoder classifiers look for the last token that is not padding.
        model.config.pad_token_id = self._tokenizer.pad_token_id
        self._class = self._find_class(model.config)
        self._device = torch.device("cpu") if device is None else device
        self._model = model.to(self._device).eval().requires_grad_(False)
        if self.max_length is None:
            limits = [self._tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
            # RoBERTa counts positions from its padding token's id on.
            offset = self._tokenizer.pad_token_id + 1 if "roberta" in str(model.config.model_type) else 0
            known = [int(limit) for limit in limits if limit is not None and limit < 10**6]
            self.max_length = min(known) - offset if known else None

    def _find_class(self, config: Any) -> int:
        count = int(config.num_labels)
        if self.label_key is not None:
            return -1
        if self.label is not None:
            names = {str(name): int(number) for number, name in config.id2label.items()}
            if self.label not in names:
                raise ValueError(f"HFClassifier: label '{self.label}' is none of the model's: {', '.join(names)}")
            return names[self.label]
        if self.label_index is None:
            if count > 1:
                raise ValueError(f"HFClassifier: the model has {count} classes: give label, label_index or label_key")
            return 0
        if not 0 <= self.label_index < count:
            raise ValueError(f"HFClassifier: label_index must be in [0, {count}), got {self.label_index}")
        return self.label_index

    def _text(self, prompt: str, response: str) -> str:
        # One pass over the template: what a text spells is never taken for a placeholder.
        pieces = self.template.split("{response}")
        return response.join(piece.replace("{prompt}", prompt) for piece in pieces)

    @torch.no_grad()
    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``, equal (up to rounding) whatever else is in the batch.

        Raises:
            ValueError: a sample without the label ``label_key``, or with one that is no class.
        """
        if self._model is None:
            raise RuntimeError("HFClassifier: setup() was not called")
        texts = [self._text(sample.prompt, text) for sample, text in zip(batch.samples, batch.texts, strict=True)]
        limit = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        tokens = [list(ids) for ids in self._tokenizer(texts, **limit)["input_ids"]] if texts else []
        # A text without tokens would have no last token to score.
        tokens = [ids or [self._tokenizer.pad_token_id] for ids in tokens]
        targets = self._targets(batch)
        scores = torch.zeros(len(texts))
        for rows in _by_length([len(ids) for ids in tokens], self.batch_size):
            padded = self._tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")
            logits = self._model(
                input_ids=padded["input_ids"].to(self._device), attention_mask=padded["attention_mask"].to(self._device)
            ).logits.float()
            scores[rows] = self._reduce(logits, targets[rows].to(self._device)).cpu()
        return scores

    def _targets(self, batch: Responses) -> Tensor:
        if self.label_key is None:
            return torch.full((len(batch),), self._class)
        key, count = self.label_key, int(self._model.config.num_labels)
        found = [label_of(sample, key, "HFClassifier", i) for i, sample in enumerate(batch.samples)]
        for index, value in enumerate(found):
            if not 0 <= value < count:
                raise ValueError(f"HFClassifier: sample {index}: label {key}={value} is none of the {count} classes")
        return torch.tensor(found, dtype=torch.int64)

    def _reduce(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.mode == "argmax":
            single = logits.shape[1] == 1
            return (logits[:, 0] > 0 if single else logits.argmax(-1) == targets).float()
        if self.mode == "probability":
            logits = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)
        return logits.gather(1, targets[:, None])[:, 0]

    def digest(self) -> str:
        """sha256 of the folder's weights and settings."""
        return _folder_digest(Path(self.path))


class CallableReward(Reward):
    """A function of the user's: ``function(prompts, responses, references, labels, **arguments)`` to a float each.

    The four are lists with one entry a response: texts, and the labels as dicts.

    Args:
        function: dotted name, ``package.module.function``. Importing it runs that module's code.
        arguments: further keyword arguments.
        bounds: least and greatest possible score, where there are such.

    Raises:
        ValueError: not a dotted name, or bounds that are not two rising numbers.
    """

    def __init__(
        self, function: str, arguments: dict[str, Any] | None = None, bounds: list[float] | None = None
    ) -> None:
        if "." not in function:
            raise ValueError(
                f"CallableReward: function must be a dotted name (package.module.function), got {function!r}"
            )
        if bounds is not None:
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                raise ValueError(f"CallableReward: bounds must be [least, greatest], got {bounds}")
            self.bounds = (float(bounds[0]), float(bounds[1]))
        self.function, self.arguments = function, dict(arguments or {})
        self._call: Callable[..., Any] | None = None

    def setup(self, tokenizer: Any = None, device: torch.device | None = None) -> None:
        """Import the function.

        Raises:
            ImportError: no such module, or it has no such function.
            ValueError: it can't be called.
        """
        self._call = self._import()

    def _import(self) -> Callable[..., Any]:
        module, _, name = self.function.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, but something it imports is not
            raise ImportError(
                f"CallableReward: function: there is no module '{error.name}' ({self.function})"
            ) from None
        if found is None:
            raise ImportError(f"CallableReward: function: module '{module}' has no '{name}'")
        if not callable(found):
            raise ValueError(f"CallableReward: function: {self.function} is a {type(found).__name__}, no function")
        return found

    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``.

        Raises:
            ValueError: another number of scores than responses, or one that is no number.
        """
        call = self._call or self._import()
        found = call(
            [sample.prompt for sample in batch.samples],
            list(batch.texts),
            [sample.reference for sample in batch.samples],
            [dict(sample.labels) for sample in batch.samples],
            **self.arguments,
        )
        try:
            scores = [float(value) for value in found]
        except (TypeError, ValueError) as error:
            raise ValueError(f"CallableReward: {self.function} must give a float a response ({error})") from None
        if len(scores) != len(batch):
            raise ValueError(f"CallableReward: {self.function} gave {len(scores)} scores for {len(batch)} responses")
        return torch.tensor(scores, dtype=torch.float32)


class IntentReward(Reward):
    """Does the response do what the human reply did (inform, ask, direct, commit)? The paper's second reward.

    A classifier that Plumbline trained (``IntentClassifier``) reads the context's last utterance and the response.

    Args:
        path: folder of the classifier.
        mode: ``accuracy``: 1 where the most probable act is the human reply's, else 0 (the paper); ``prob``: the
            probability of that act, which is smoother.
        label: name of the sample's label that holds the act.
        batch_size: pairs in a forward pass.
        max_prompt_tokens: of the last utterance, its end is kept: what the classifier was trained with.

    Raises:
        ValueError: a size below 1.
    """

    learnt = True
    bounds = (0.0, 1.0)

    def __init__(
        self,
        path: str,
        mode: Literal["accuracy", "prob"] = "accuracy",
        label: str = "act",
        batch_size: int = 1024,
        max_prompt_tokens: int | None = None,
    ) -> None:
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"IntentReward: max_prompt_tokens must be at least 1, got {max_prompt_tokens}")
        if batch_size < 1:
            raise ValueError(f"IntentReward: batch_size must be at least 1, got {batch_size}")
        self.path, self.mode, self.label, self.batch_size = path, mode, label, batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self._network: Any = None
        self._pairs: PairInputs | None = None
        self._device = torch.device("cpu")

    def setup(self, tokenizer: Any, device: torch.device | None = None) -> None:
        """Load the classifier.

        Raises:
            FileNotFoundError, ValueError, TokenizerMismatchError: see
                :func:`modules.rlhf.classifier_files.load_classifier`.
        """
        network, self.classes = load_classifier(self.path, tokenizer.hash)
        self._device = torch.device("cpu") if device is None else device
        self._network = network.to(self._device)
        self._pairs = PairInputs(tokenizer, self.max_prompt_tokens)

    @torch.no_grad()
    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``.

        Raises:
            ValueError: a sample without the label, or with one that is no class of the classifier.
        """
        network, pairs = self._network, self._pairs
        if network is None or pairs is None:
            raise RuntimeError("IntentReward: setup() was not called")
        acts = [label_of(sample, self.label, "IntentReward", i) for i, sample in enumerate(batch.samples)]
        for index, act in enumerate(acts):
            if not 0 <= act < len(self.classes):
                known = ", ".join(f"{number} {name}" for number, name in enumerate(self.classes))
                raise ValueError(f"IntentReward: sample {index}: label {self.label}={act} is none of {known}")
        scores = torch.zeros(len(batch))
        for start in range(0, len(batch), self.batch_size):
            part = slice(start, start + self.batch_size)
            prompts = [sample.prompt for sample in batch.samples[part]]
            logits = network(*pairs(prompts, batch.response_tokens[part], self._device)).float()
            wanted = torch.tensor(acts[part], device=self._device)
            if self.mode == "accuracy":
                scores[part] = (logits.argmax(-1) == wanted).float().cpu()
            else:
                scores[part] = logits.softmax(-1).gather(1, wanted[:, None])[:, 0].cpu()
        return scores

    def digest(self) -> str:
        """Hash of the classifier's files."""
        return classifier_digest(self.path)


class PreferenceReward(Reward):
    """Score of a reward model trained on preferences (Bradley-Terry).

    Args:
        path: folder that the reward model was saved in.
        batch_size: responses in a forward pass.
    """

    learnt = True

    def __init__(self, path: str, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"PreferenceReward: batch_size must be at least 1, got {batch_size}")
        self.path, self.batch_size = path, batch_size
        self._network: Any = None

    def setup(self, tokenizer: Any, device: torch.device | None = None) -> None:
        """Load the reward model.

        Raises:
            FileNotFoundError, ValueError: see :func:`modules.rlhf.reward_model.load_reward_model`.
        """
        from modules.rlhf.reward_model import load_reward_model

        network = load_reward_model(self.path, tokenizer.hash)
        self._network = network.to(torch.device("cpu") if device is None else device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``."""
        if self._network is None:
            raise RuntimeError("PreferenceReward: setup() was not called")
        scores = torch.zeros(len(batch))
        lengths = [len(p) + len(r) for p, r in zip(batch.prompt_tokens, batch.response_tokens, strict=True)]
        for rows in _by_length(lengths, self.batch_size):
            prompts, responses = (
                [batch.prompt_tokens[row] for row in rows],
                [batch.response_tokens[row] for row in rows],
            )
            scores[rows] = self._network.score(prompts, responses).float().cpu()
        return scores

    def digest(self) -> str:
        """sha256 of the folder's weights and settings."""
        return _folder_digest(Path(self.path))
