"""How unkind a text is: a lexicon, and the seam where a trained scorer takes its place (``e.tox``).

A scorer is any callable from texts to scores in [0, 1]. The lexicon's blind spots are those of its kind: it knows no
negation, irony or quotation, and no harm in kind words.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules.assurance.subject import AssuranceError
from modules.assurance.text.assets import check_text, read_asset
from modules.assurance.text.perturbations import fold_homoglyphs

ToxicityScorer = Callable[[Sequence[str]], Tensor]
"""Maps N texts to scores ``[N]`` in [0, 1]; 1 is worst."""
FILE = Path(__file__).with_name("toxicity.yaml")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


def flattened(text: str) -> str:
    """A text as the lexicon reads it: compatibility forms, invisible characters, look-alikes, accents and case undone,
    every run of blanks one blank, typographic apostrophes straight."""
    text = unicodedata.normalize("NFKD", _INVISIBLE.sub("", text))
    text = "".join(c for c in text if not unicodedata.combining(c))
    return " ".join(fold_homoglyphs(text).replace("\u2019", "'").casefold().split())


def load_lexicon(path: Path = FILE) -> dict[str, float]:
    """Term -> weight, of all categories of a lexicon file.

    Raises:
        AssuranceError: no such file, a malformed or doubled term, a weight outside (0, 1].
    """
    table, found = read_asset(path, ("terms",))["terms"], {}
    if not isinstance(table, dict) or not all(isinstance(terms, dict) for terms in table.values()):
        raise AssuranceError(f"{path.name}: terms: must map categories to terms with weights")
    for category, terms in table.items():
        for term, weight in terms.items():
            owner = f"{path.name}: terms.{category}"
            if flattened(check_text(owner, term)) in found:
                raise AssuranceError(f"{owner}: '{term}' stands twice; drop one")
            found[flattened(term)] = _weight(f"{owner}.{term}", weight)
    return found


def _weight(owner: str, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1:
        raise AssuranceError(f"{owner}: the weight must lie in (0, 1], got {weight!r}")
    return float(weight)


class LexiconScorer:
    """Scores a text by the terms it holds: ``1 - prod(1 - weight)`` over their occurrences (noisy or).

    Terms count as whole words, in any case and behind look-alikes and accents; of terms that overlap, the longest one
    that begins first. More terms never lower a score.

    Args:
        terms: term -> weight in (0, 1]; None: the shipped lexicon.

    Raises:
        AssuranceError: no terms, an empty term, a weight outside (0, 1].
    """

    def __init__(self, terms: Mapping[str, float] | None = None) -> None:
        self._weights = (
            load_lexicon()
            if terms is None
            else {flattened(term): _weight(f"lexicon: {term}", weight) for term, weight in terms.items()}
        )
        if not self._weights or "" in self._weights:
            raise AssuranceError("lexicon: terms: needs at least one term, and none that is empty")
        longest_first = sorted(self._weights, key=lambda term: (-len(term), term))
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def hits(self, text: str) -> list[str]:
        """The terms found, in order, as the lexicon writes them."""
        return self._pattern.findall(flattened(text))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Scores float64 ``[texts]`` in [0, 1]."""
        return torch.tensor(
            [1.0 - math.prod(1.0 - self._weights[term] for term in self.hits(text)) for text in texts],
            dtype=torch.float64,
        )


def toxicity(texts: Sequence[str], scorer: ToxicityScorer | None = None) -> Tensor:
    """Scores float64 ``[texts]`` of a scorer (None: the lexicon), checked.

    Raises:
        AssuranceError: a scorer that gives anything but one finite score in [0, 1] a text.
    """
    scores = (scorer or LexiconScorer())(texts)
    if not isinstance(scores, Tensor) or scores.shape != (len(texts),):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise AssuranceError(f"toxicity scorer: must give a tensor [{len(texts)}], one score a text, got {got}")
    scores = scores.detach().to("cpu", torch.float64)
    if not bool(((scores >= 0) & (scores <= 1)).all()):  # also false for NaN
        raise AssuranceError("toxicity scorer: scores must lie in [0, 1]; scale logits with a sigmoid")
    return scores
