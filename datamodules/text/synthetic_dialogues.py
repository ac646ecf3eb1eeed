"""Dialogues from templates: no files, no licence, and something to learn.

Two speakers talk about one plan: a thing, a place, a time, a person and a quality of a topic. What a reply does follows
from what the last utterance did (a question is mostly informed, a directive mostly committed to), and replies take up
the words of the dialogue, so that word overlap with the human reply tells a good reply from a bad one.
"""

from __future__ import annotations

import re
from random import Random

from datamodules.text.dialogues import Dialogue

# act of the next utterance given the last one's: inform, question, directive, commissive
_NEXT_ACT = ((0.30, 0.50, 0.20, 0.00), (0.85, 0.05, 0.05, 0.05), (0.10, 0.10, 0.00, 0.80), (0.35, 0.30, 0.30, 0.05))

_TEMPLATES = (
    (  # inform
        "the {thing} at the {place} is {quality} .",
        "{person} told me that the {thing} is {quality} .",
        "i saw a {quality} {thing} in the {place} {time} .",
        "it is {quality} , and {person} likes it .",
        "the {place} is open {time} , so we can see the {thing} .",
        "i think {person} has the {thing} already .",
        "yes , the {place} has a very {quality} {thing} .",
        "no , the {thing} is not at the {place} , {person} has it .",
    ),
    (  # question
        "is the {thing} at the {place} {quality} ?",
        "where can i find a {quality} {thing} ?",
        "do you know if {person} is at the {place} {time} ?",
        "what do you think of the {thing} ?",
        "when will {person} come to the {place} ?",
        "why is the {thing} so {quality} ?",
        "how much is the {thing} ?",
    ),
    (  # directive
        "please bring the {thing} to the {place} {time} .",
        "could you ask {person} about the {thing} ?",
        "let's meet at the {place} {time} .",
        "you should try the {quality} {thing} .",
        "please call {person} before you go to the {place} .",
        "let's get a {quality} {thing} for {person} .",
    ),
    (  # commissive
        "all right , i'll bring the {thing} {time} .",
        "sure , i will ask {person} about it .",
        "okay , i'll meet you at the {place} {time} .",
        "sorry , i can't come to the {place} {time} .",
        "i promise to get the {quality} {thing} for {person} .",
        "no problem , i'll call {person} {time} .",
    ),
)
# may stand for an inform or a commissive: no classifier can be perfect
_AMBIGUOUS = ("yes , the {thing} , {time} .", "okay , {person} and the {thing} .")
_OPENERS = {0: ("well ,", "you know ,", "so ,"), 4: ("great !", "wonderful !"), 5: ("oh no !",), 6: ("really ?",)}

_TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "food": {
        "thing": ("soup", "salad", "steak", "dessert", "coffee", "menu"),
        "place": ("restaurant", "kitchen", "bakery", "cafe"),
        "quality": ("fresh", "spicy", "delicious", "cheap"),
    },
    "travel": {
        "thing": ("ticket", "suitcase", "map", "passport", "tour", "train"),
        "place": ("station", "airport", "hotel", "harbour"),
        "quality": ("long", "crowded", "comfortable", "early"),
    },
    "work": {
        "thing": ("report", "contract", "meeting", "budget", "project", "order"),
        "place": ("office", "factory", "bank", "warehouse"),
        "quality": ("urgent", "complete", "difficult", "important"),
    },
    "school": {
        "thing": ("exam", "lecture", "essay", "textbook", "course", "lesson"),
        "place": ("library", "classroom", "campus", "laboratory"),
        "quality": ("boring", "useful", "strict", "advanced"),
    },
    "shopping": {
        "thing": ("jacket", "dress", "sweater", "watch", "camera", "bag"),
        "place": ("shop", "market", "mall", "counter"),
        "quality": ("expensive", "elegant", "warm", "fashionable"),
    },
    "health": {
        "thing": ("medicine", "bandage", "prescription", "checkup", "vitamin", "thermometer"),
        "place": ("hospital", "clinic", "pharmacy", "gym"),
        "quality": ("strong", "bitter", "safe", "effective"),
    },
    "home": {
        "thing": ("sofa", "lamp", "carpet", "heater", "window", "garden"),
        "place": ("flat", "house", "cellar", "balcony"),
        "quality": ("broken", "bright", "noisy", "clean"),
    },
    "leisure": {
        "thing": ("film", "concert", "match", "novel", "painting", "game"),
        "place": ("cinema", "theatre", "stadium", "museum"),
        "quality": ("exciting", "famous", "sad", "funny"),
    },
}
_TIMES = ("today", "tomorrow", "tonight", "on monday", "on friday", "next week", "after lunch", "in the morning")
_PEOPLE = ("mary", "john", "mr smith", "mrs brown", "anna", "peter", "the manager", "my sister", "lucy", "tom")


class SyntheticDialogue:
    """Seeded dialogues; number i of a split depends on the seed, the split's name and i alone.

    Args:
        seed: of all splits.
        turns: least and greatest number of utterances of a dialogue.

    Raises:
        ValueError: not 2 <= least <= greatest.
    """

    splits = ("train", "validation", "test")

    def __init__(self, seed: int = 0, turns: tuple[int, int] = (4, 10)) -> None:
        if not 2 <= turns[0] <= turns[1]:
            raise ValueError(f"SyntheticDialogue: want 2 <= least <= greatest number of turns, got {turns}")
        self.seed, self.turns = seed, turns

    def dialogues(self, split: str, count: int) -> list[Dialogue]:
        """The first ``count`` dialogues of ``split``.

        Raises:
            ValueError: no such split.
        """
        if split not in self.splits:
            raise ValueError(f"SyntheticDialogue: no split {split!r}; there are {', '.join(self.splits)}")
        return [self._dialogue(Random(f"{self.seed}/{split}/{number}")) for number in range(count)]

    def _dialogue(self, random: Random) -> Dialogue:
        topic = _TOPICS[random.choice(list(_TOPICS))]
        slots = {name: random.choice(words) for name, words in topic.items()}
        slots |= {"time": random.choice(_TIMES), "person": random.choice(_PEOPLE)}
        act = random.choices((0, 1, 2), (0.3, 0.5, 0.2))[0]
        utterances, acts, emotions = [], [], []
        for turn in range(random.randint(*self.turns)):
            if turn:
                act = random.choices(range(4), _NEXT_ACT[act])[0]
            if random.random() < 0.15:  # the talk moves on
                name = random.choice(list(slots))
                slots[name] = random.choice({"time": _TIMES, "person": _PEOPLE, **topic}[name])
            choices = _TEMPLATES[act] + (_AMBIGUOUS if act in (0, 3) else ())
            text = random.choice(choices).format(**slots)
            emotion = random.choices((0, 4, 5, 6), (0.8, 0.1, 0.05, 0.05))[0]
            if emotion or random.random() < 0.2:
                text = f"{random.choice(_OPENERS[emotion])} {text}"
            utterances.append(re.sub(r"\ba (?=[aei]|urgent)", "an ", text))
            acts.append(act)
            emotions.append(emotion)
        return Dialogue(tuple(utterances), tuple(acts), tuple(emotions))
