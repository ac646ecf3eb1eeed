"""Recursive criticism and improvement, as a pure loop (Kim, Baldi, McAleer 2023, section 2).

A loop is a generator: it yields what it wants done (a :class:`~modules.language.backends.base.Request` to the model, or
an effect that a check needs) and is sent the result. It holds no model, no browser and no randomness of its own, so the
computer agent and the reasoning module share it, a driver asks for many at once (:mod:`modules.rci.driving`), and a
recorded run is replayed without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from modules.language.backends.base import PromptTooLongError, Reply, Request, Role, Turn

StopRule = Literal["fixed", "oracle", "verifier", "unchanged"]
STOP_RULES = ("fixed", "oracle", "verifier", "unchanged")
Loop = Generator[Any, Any, Any]
# Whether an answer is right (oracle) or passes a programmatic test (verifier); may yield effects of its own.
Check = Callable[[str], Generator[Any, Any, bool]]


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn; see :class:`~modules.language.backends.base.Request`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass
class Context:
    """A conversation that only grows: every request's turns begin with those of the request before it.

    Args:
        turns: what was said so far.
        seed: of this conversation; each request gets a seed of its own from it and from its number.
        calls: model calls made so far.
    """

    turns: tuple[Turn, ...] = ()
    seed: int = 0
    calls: int = 0

    def say(self, text: str, role: Role = "user") -> Context:
        """Append a turn (nothing for an empty text)."""
        if text:
            self.turns = (*self.turns, Turn(role, text))
        return self

    def ask(self, sampling: Sampling) -> Generator[Request, Reply, Reply]:
        """Request a reply to all that was said. The caller appends it (:meth:`say`), cleaned or as it is.

        Raises:
            PromptTooLongError: sent in place of a reply, where the driver can tell whose prompt is too long.
        """
        seed = (self.seed * 1_000_003 + self.calls) % 2**62
        request = Request(
            self.turns, sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.stop, seed
        )
        self.calls += 1
        reply = yield request
        if isinstance(reply, PromptTooLongError):  # of this conversation alone: others of its batch were answered
            raise reply
        return reply

    def branch(self, seed: int) -> Context:
        """The same conversation so far, to be continued apart; its calls count from 0."""
        return replace(self, seed=seed, calls=0)


@dataclass(frozen=True)
class RCIPrompts:
    """Texts of one criticise-and-improve round.

    Args:
        critique: asks for problems of the answer before it. Not asked for (implicit RCI) with ``explicit=False``.
        improve: asks for a better answer; with implicit RCI it asserts the requirement itself.
        before, after: open and close an answer in the context (a blank, a closing backtick).
    """

    critique: str = "\n\nReview your previous answer and find problems with your answer.\n\n"
    improve: str = "\n\nBased on the problems you found, improve your answer.\n\n"
    before: str = ""
    after: str = ""


@dataclass
class Outcome:
    """What a loop came to.

    Args:
        answers: ``y_0 .. y_k`` as the model gave them.
        critiques: ``c_1 .. c_k``; empty for implicit rounds.
        stopped_by: the stop rule that ended it, or ``rounds``.
        calls: model calls of the loop.
    """

    answers: list[str] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)
    stopped_by: str = "rounds"
    calls: int = 0

    @property
    def answer(self) -> str:
        return self.answers[-1]


def rci_loop(
    context: Context,
    sampling: Sampling,
    prompts: RCIPrompts,
    *,
    rounds: int,
    explicit: bool = True,
    stop: StopRule = "fixed",
    check: Check | None = None,
    critique_sampling: Sampling | None = None,
    clean: Callable[[str], str] = str.strip,
) -> Generator[Any, Any, Outcome]:
    """Answer, then ``rounds`` times criticise and improve: ``c_k = M(q, y_0 .., CRITIQUE)``, ``y_k = M(.., IMPROVE)``.

    Args:
        context: ends where the answer is to begin; grows by all that is said.
        sampling: of the answers; ``critique_sampling``: of the critiques (default: the same).
        rounds: K, at most. 0: the first answer stands.
        explicit: sample the critique (explicit RCI); False: only the improved answer is sampled (implicit RCI).
        stop: ``fixed``: always K rounds. ``oracle``: as soon as ``check`` finds the answer right; this uses the label,
            and what comes of it is no self-correction (Huang et al. 2024). ``verifier``: as soon as ``check`` passes
            it. ``unchanged``: as soon as a round repeats the answer before it.
        check: needed by ``oracle`` and ``verifier``.
        clean: applied to an answer before it is kept and shown to the model again.

    Raises:
        ValueError: rounds < 0, an unknown stop rule, a missing check, or no prompt to criticise or improve with.
    """
    check_rules(rounds, stop, check is not None, prompts, explicit)
    outcome, start = Outcome(), context.calls

    def answer() -> Generator[Any, Any, str]:
        text = clean((yield from context.ask(sampling)).text)
        context.say(prompts.before + text, "assistant").say(prompts.after)
        outcome.answers.append(text)
        return text

    yield from answer()
    for _ in range(rounds):
        if stop in ("oracle", "verifier") and check is not None and (yield from check(outcome.answer)):
            outcome.stopped_by = stop
            break
        if explicit:
            context.say(prompts.critique)
            critique = (yield from context.ask(critique_sampling or sampling)).text.strip()
            context.say(prompts.before + critique, "assistant")
            outcome.critiques.append(critique)
        context.say(prompts.improve)
        yield from answer()
        if stop == "unchanged" and outcome.answers[-1] == outcome.answers[-2]:
            outcome.stopped_by = stop
            break
    outcome.calls = context.calls - start
    return outcome


def check_rules(rounds: int, stop: str, has_check: bool, prompts: RCIPrompts, explicit: bool) -> None:
    """Raise ValueError for rules that can't be followed; one line that names the setting."""
    if rounds < 0:
        raise ValueError(f"RCI: rounds must be >= 0, got {rounds}")
    if stop not in STOP_RULES:
        raise ValueError(f"RCI: stop must be one of {', '.join(STOP_RULES)}, got {stop!r}")
    if stop in ("oracle", "verifier") and rounds and not has_check:
        raise ValueError(f"RCI: stop: {stop} needs a check of the answer, and there is none here")
    if rounds and explicit and not prompts.critique:
        raise ValueError("RCI: rounds > 0 needs a critique prompt; give one, or set explicit: false")
    if rounds and not prompts.improve:
        raise ValueError("RCI: rounds > 0 needs an improve prompt")


def retry_loop(
    context: Context,
    sampling: Sampling,
    *,
    calls: int,
    check: Check | None = None,
    clean: Callable[[str], str] = str.strip,
) -> Generator[Any, Any, Outcome]:
    """Up to ``calls`` independent samples without critique; the first that passes ``check`` stands, else the last.

    The control at equal calls that RCI has to beat. Without a check all samples are drawn. The first sample is the one
    that a loop without rounds gives.

    Raises:
        ValueError: calls < 1, or several calls at temperature 0, which would all be equal.
    """
    if calls < 1:
        raise ValueError(f"RCI: retry needs calls >= 1, got {calls}")
    if calls > 1 and sampling.temperature == 0:
        raise ValueError("RCI: retry at temperature 0 repeats one answer; set temperature > 0 or calls: 1")
    outcome = Outcome(stopped_by="calls")
    for number in range(calls):
        attempt = context.branch(context.seed * 31 + number if number else context.seed)
        outcome.answers.append(clean((yield from attempt.ask(sampling)).text))
        outcome.calls += 1
        if check is not None and (yield from check(outcome.answer)):
            outcome.stopped_by = "verifier"
            break
    context.calls += outcome.calls
    context.say(outcome.answer, "assistant")
    return outcome
