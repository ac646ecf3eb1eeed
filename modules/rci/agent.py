"""The computer agent: plans, grounds instructions in task, state and grammar, and acts (Kim et al. 2023, section 3).

An episode is a loop in the sense of :mod:`modules.rci.loop`: it yields requests to the model and effects on its page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from modules.contracts.browsing import ActionPrompts, ActionStatus, EpisodeSpec, PageView, is_instruction
from modules.language.backends.base import PromptTooLongError, Reply, Request
from modules.rci.driving import watched
from modules.rci.effects import Act as Act
from modules.rci.effects import Film as Film
from modules.rci.effects import Halted
from modules.rci.effects import Probe as Probe
from modules.rci.effects import Reset as Reset
from modules.rci.loop import STOP_RULES, Context, Outcome, RCIPrompts, Sampling, StopRule, rci_loop, retry_loop
from modules.rci.oversight import Oversight, overseen
from modules.rci.prompting import PromptLibrary, TaskPrompts, fill
from modules.seeds import text_seed

STEP_CAP = 20
MAX_PLAN_LINES = 40


@dataclass
class Strategy:
    """How an agent comes to its instructions.

    Args:
        erci: criticise-and-improve rounds on the plan; -1: no plan (exemplars then go into the action prompt).
        irci: repairs of an instruction that is not of the grammar; after them the episode fails.
        state_grounding: ask for each instruction again in view of the page (implicit RCI), where the task's prompts
            have a text for it.
        explicit_action: criticise-and-improve rounds on each instruction, critique sampled.
        action_stop: ``verifier`` ends them as soon as an instruction is of the grammar and its XPath has a match.
        retry: instead of RCI, this many samples per instruction at most; the first that passes the verifier stands.
        vote: instead of RCI, this many samples per instruction; the most frequent stands.
        implicit_plan: plan rounds without a sampled critique.
        replan_every: plan anew after so many steps; 0: plan once.
        temperature, top_p: of plans and instructions; critique_temperature: of critiques (None: the same).
        max_new_tokens: of any reply.
        max_steps: instructions per episode; None: lines of the plan + 1 (4 for a plan of one line), capped at 20.
    """

    erci: int = 1
    irci: int = 1
    state_grounding: bool = True
    explicit_action: int = 0
    action_stop: StopRule = "fixed"
    retry: int = 0
    vote: int = 0
    implicit_plan: bool = False
    replan_every: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    critique_temperature: float | None = None
    max_new_tokens: int = 256
    max_steps: int | None = None

    def check(self, name: str) -> None:
        """Raise ValueError naming the strategy, the setting and its rule."""
        rules = (
            ("erci", self.erci >= -1, ">= -1"),
            ("irci", self.irci >= 0, ">= 0"),
            ("explicit_action", self.explicit_action >= 0, ">= 0"),
            ("retry", self.retry >= 0, ">= 0"),
            ("vote", self.vote >= 0, ">= 0"),
            ("replan_every", self.replan_every >= 0, ">= 0"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("critique_temperature", self.critique_temperature is None or self.critique_temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("max_steps", self.max_steps is None or self.max_steps >= 1, ">= 1 or null"),
            ("action_stop", self.action_stop in STOP_RULES, f"one of {', '.join(STOP_RULES)}"),
        )
        for key, holds, rule in rules:
            if not holds:
                raise ValueError(f"RCI: strategy {name}: {key} must be {rule}, got {getattr(self, key)}")
        if self.action_stop == "oracle":
            raise ValueError(f"RCI: strategy {name}: there is no label to stop by on a page; use action_stop: verifier")
        if (self.retry > 1 or self.vote > 1) and self.temperature == 0:
            raise ValueError(f"RCI: strategy {name}: several samples at temperature 0 are equal; set temperature > 0")
        if (self.retry > 0) + (self.vote > 0) + (self.explicit_action > 0) > 1:
            raise ValueError(f"RCI: strategy {name}: set one of retry, vote and explicit_action")
        if self.erci < 0 and self.replan_every:
            raise ValueError(f"RCI: strategy {name}: replan_every needs a plan (erci >= 0)")

    def most_calls(self, steps: int) -> int:
        """Model calls of an episode of ``steps`` instructions, at most (plan made once)."""
        plan = 0 if self.erci < 0 else 1 + (1 if self.implicit_plan else 2) * self.erci
        draft = self.retry or self.vote or 1 + 2 * self.explicit_action
        return plan + steps * (draft + self.state_grounding + self.irci)


@dataclass
class EpisodeResult:
    """What came of an episode; plain values, one JSON line.

    ``success``: reward > 0 (the paper's protocol); ``strict``: reward >= 1. ``error``: the browser failed; counted as
    a failure. ``overlong``: a prompt did not fit the model's context, which ended the episode. ``malformed``:
    instructions whose first draft is not of the grammar; ``unrepaired``: those that stayed so. ``unmatched``:
    executed XPaths without a match. ``flips``: instructions by whether draft and final were the expert's (``rr``,
    ``rw``, ``wr``, ``ww``), where there is an expert and a draft was revised.
    """

    strategy: str
    task: str
    seed: str
    success: bool = False
    strict: bool = False
    error: bool = False
    overlong: bool = False
    familiar: bool = False
    reward: float = 0.0
    reason: str = ""
    steps: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    malformed: int = 0
    unrepaired: int = 0
    unmatched: int = 0
    plan_lines: int = 0
    flips: dict[str, int] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)


@dataclass
class Record:
    """An episode's result with what only logs want: turns, screenshots, and drafts beside the expert's moves.

    ``plan``: lines of the last plan; ``refused``: instructions that an overseer refused.
    """

    result: EpisodeResult
    plan: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    transcript: list[str] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    drafts: list[dict[str, Any]] = field(default_factory=list)


def clean(text: str) -> str:
    """The instruction in a reply: up to the first backtick, line breaks dropped, outer blanks and quotes stripped."""
    text = text.split("`", 1)[0].replace("\r", "").replace("\n", "").replace("\\n", "\n").strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == "'" else text


def clean_plan(text: str) -> str:
    """The lines of a plan, empty ones and list numbers dropped; capped. It ends at a fence, or lies in one."""
    text = text.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2]
    lines = [line.strip().lstrip("-*0123456789.) ").strip("`").strip() for line in text.split("```")[0].splitlines()]
    return "\n".join([line for line in lines if line][:MAX_PLAN_LINES])


class Agent:
    """Makes episode loops.

    Args:
        library: prompts.
        action_prompts: of the ``compact`` library, from the data.
        seed: of all sampling; with the episode and the strategy's name it decides every draw.
        oversight: rules of every episode; None: none.
    """

    def __init__(
        self,
        library: PromptLibrary,
        action_prompts: ActionPrompts | None = None,
        seed: int = 0,
        oversight: Oversight | None = None,
    ) -> None:
        if library.compact and action_prompts is None:
            raise ValueError("RCI: prompts: compact needs a datamodule with action_prompts")
        self.library, self.action_prompts, self.seed = library, action_prompts, seed
        self.oversight = oversight

    def episode(
        self,
        name: str,
        strategy: Strategy,
        spec: EpisodeSpec,
        film: bool = False,
        stopping: Callable[[], bool] | None = None,
    ) -> Generator[Any, Any, Record]:
        """The loop of one episode; returns its :class:`Record`.

        ``stopping``: asked before every effect; true ends the episode.
        """
        record = Record(EpisodeResult(name, spec.task, spec.seed))
        result = record.result

        def watch(effect: Any, answer: Any) -> None:
            if isinstance(effect, Request) and isinstance(answer, Reply):
                result.calls += 1
                result.prompt_tokens += answer.prompt_tokens
                result.completion_tokens += answer.completion_tokens
                record.transcript.append(f"[asked]{effect.text}\n[answered]{answer.text}")
            elif isinstance(effect, Act):
                record.transcript.append(f"[did] {effect.instruction} -> {answer.status} {answer.reason}".rstrip())

        loop = watched(self._play(strategy, spec, record, film), watch)
        if self.oversight is not None or stopping is not None:
            loop = overseen(loop, self.oversight or Oversight(confirm=[]), stopping)
        try:
            yield from loop
        except Halted as halt:
            result.reason = f"halted: {halt}"
        except PromptTooLongError as error:  # the page or its history outgrew the model: this episode's failure
            result.overlong, result.reason = True, str(error)
        result.steps = len(result.history)
        return record

    # --------------------------------------------------------------------------------------------------------- playing

    def _play(self, strategy: Strategy, spec: EpisodeSpec, record: Record, film: bool) -> Generator[Any, Any, None]:
        result, prompts = record.result, self.library[spec.task]
        view: PageView = yield Reset(spec)
        result.familiar = view.familiar
        history = result.history
        planned = strategy.erci >= 0 and bool(prompts.plan)
        plan = ""
        number = 0
        while not view.done:
            if planned and (number == 0 or strategy.replan_every and number % strategy.replan_every == 0):
                plan = yield from self._plan(strategy, prompts, spec, view, number)
                record.plan = plan.splitlines()
                result.plan_lines = len(record.plan)
            if number >= self._limit(strategy, plan if planned else None):
                view = replace(view, done=True, reason=view.reason or "step limit")
                break
            number += 1
            if film:
                record.frames.append((yield Film()))
            context = self._ask_for(prompts, spec, view, plan if planned else None, history, number)
            drafts, instruction = yield from self._instruction(strategy, prompts, context)
            result.malformed += not is_instruction(drafts[0])
            status = (yield Probe(drafts[0])) if view.expert is not None else "ok"
            self._compare(record, spec, view, history, drafts, instruction, status)
            if not is_instruction(instruction):
                result.unrepaired += 1
                view = replace(view, done=True, reason="not an instruction")
                break
            view = yield Act(instruction)
            if view.status == "refused":
                record.refused.append(instruction)
                continue
            history.append(instruction)
            result.unmatched += view.status in ("no_match", "bad_xpath", "not_clickable")
        result.error = view.status in ("error", "left_page")
        if not result.error:
            result.reward = view.reward
            result.success, result.strict = view.reward > 0, view.reward >= 1
        result.reason = view.reason

    @staticmethod
    def _limit(strategy: Strategy, plan: str | None) -> int:
        if strategy.max_steps is not None:
            return strategy.max_steps
        if plan is None:
            return STEP_CAP
        lines = len(plan.splitlines())
        return 4 if lines <= 1 else min(lines + 1, STEP_CAP)

    def _seed(self, spec: EpisodeSpec, what: str) -> int:
        """Of one conversation: the same on every rank, in every order and for every strategy (first drafts pair up)."""
        return text_seed(f"{self.seed}/{spec.task}/{spec.seed}/{what}")

    # -------------------------------------------------------------------------------------------------- task grounding

    def _plan(
        self, strategy: Strategy, prompts: TaskPrompts, spec: EpisodeSpec, view: PageView, number: int
    ) -> Generator[Any, Any, str]:
        """``p_0 = M(B, s_0, E, g, PLAN)``, then ``erci`` rounds of critique and improvement."""
        context = prompts.start(view.utterance, exemplars=True)
        context.seed = self._seed(spec, f"plan {number}")
        page = prompts.seen(view)
        context.say(fill(prompts.page, page=page)).say(fill(prompts.goal, goal=view.utterance)).say(prompts.plan)
        improve = prompts.plan_requirement if strategy.implicit_plan else fill(prompts.plan_improve, page=page)
        outcome: Outcome = yield from rci_loop(
            context,
            self._sampling(strategy),
            RCIPrompts(prompts.plan_critique, improve),
            rounds=strategy.erci,
            explicit=not strategy.implicit_plan,
            clean=clean_plan,
            critique_sampling=self._sampling(strategy, critique=True),
        )
        return outcome.answer

    # ------------------------------------------------------------------------------------------ one instruction a step

    def _ask_for(
        self,
        prompts: TaskPrompts,
        spec: EpisodeSpec,
        view: PageView,
        plan: str | None,
        history: list[str],
        number: int,
    ) -> Context:
        """``B + s_t + g + p + h_t + NEXT(t)``."""
        if self.library.compact:
            assert self.action_prompts is not None
            context = Context().say(self.action_prompts.acting(view.utterance, view.page, history))
        else:
            context = prompts.start(view.utterance, exemplars=plan is None)
            context.say(fill(prompts.page, page=prompts.seen(view))).say(fill(prompts.goal, goal=view.utterance))
            if plan is not None:
                context.say(fill(prompts.planned, plan=plan))
            if history:
                context.say(fill(prompts.history, history="\n".join(history)))
            context.say(prompts.ask_next(number, history[-1] if history else "", plan is not None))
        context.seed = self._seed(spec, f"step {number}")
        return context

    def _instruction(
        self, strategy: Strategy, prompts: TaskPrompts, context: Context
    ) -> Generator[Any, Any, tuple[list[str], str]]:
        """Drafts of one instruction in the order they were made, and the one that stands."""
        sampling, texts = self._sampling(strategy), self._action_rci(prompts)

        def passes(answer: str) -> Generator[Any, Any, bool]:
            status: ActionStatus = yield Probe(answer)
            return status == "ok"

        if strategy.vote or strategy.retry:
            apart = context.branch(context.seed)
            calls, check = (strategy.vote, None) if strategy.vote else (strategy.retry, passes)
            outcome = yield from retry_loop(apart, sampling, calls=calls, check=check, clean=clean)
            drafts = outcome.answers
            if strategy.vote:
                counts = Counter(drafts)
                drafts = [max(drafts, key=lambda answer: counts[answer])]
            context.calls += outcome.calls  # only what stands is part of the conversation
            context.say(texts.before + drafts[-1], "assistant").say(texts.after)
        else:
            outcome = yield from rci_loop(
                context, sampling, texts, rounds=strategy.explicit_action, stop=strategy.action_stop, check=passes,
                critique_sampling=self._sampling(strategy, critique=True), clean=clean,
            )  # fmt: skip
            drafts = outcome.answers
        if strategy.state_grounding and prompts.state:
            drafts.append((yield from self._again(context, sampling, texts, prompts.state)))
        for _ in range(strategy.irci if prompts.agent else 0):
            if is_instruction(drafts[-1]):
                break
            drafts.append((yield from self._again(context, sampling, texts, prompts.agent)))
        return drafts, drafts[-1]

    @staticmethod
    def _again(context: Context, sampling: Sampling, texts: RCIPrompts, prompt: str) -> Generator[Request, Reply, str]:
        """Implicit RCI: the requirement is asserted, the instruction asked for again."""
        context.say(prompt)
        text = clean((yield from context.ask(sampling)).text)
        context.say(texts.before + text, "assistant").say(texts.after)
        return text

    def _action_rci(self, prompts: TaskPrompts) -> RCIPrompts:
        if self.action_prompts is not None and self.library.compact:
            return replace(
                prompts.action_rci, critique=self.action_prompts.critique, improve=self.action_prompts.improve
            )
        return prompts.action_rci

    def _sampling(self, strategy: Strategy, critique: bool = False) -> Sampling:
        temperature = strategy.temperature
        if critique and strategy.critique_temperature is not None:
            temperature = strategy.critique_temperature
        return Sampling(strategy.max_new_tokens, temperature, strategy.top_p)

    @staticmethod
    def _compare(
        record: Record,
        spec: EpisodeSpec,
        view: PageView,
        history: list[str],
        drafts: list[str],
        final: str,
        status: ActionStatus,
    ) -> None:
        """Note the draft beside what the expert does here, for figures and as training data for a critic."""
        if view.expert is None:
            return
        record.drafts.append(
            {
                "task": spec.task, "seed": spec.seed, "goal": view.utterance, "page": view.page,
                "history": list(history), "action": view.expert, "draft": drafts[0], "status": status,
            }
        )  # fmt: skip
        if len(drafts) > 1:
            key = ("r" if drafts[0] == view.expert else "w") + ("r" if final == view.expert else "w")
            record.result.flips[key] = record.result.flips.get(key, 0) + 1
