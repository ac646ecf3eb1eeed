"""Proof texts of Metamath: normal (labels) and compressed, and the way between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from modules.verification.provers.metamath import MAX_PROOF_STEPS, Assertion, Database, MetamathError, proof_steps


def _nodes(
    database: Database, theorem: Assertion, proof: Sequence[str]
) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
    """Hash-consed proof tree: list of (label, children) with equal subproofs merged, and the root's index."""
    own = {h.label for h in theorem.hypotheses}
    nodes: list[tuple[str, tuple[int, ...]]] = []
    index: dict[tuple[str, tuple[int, ...]], int] = {}
    stack: list[int] = []
    saved: list[int] = []
    for step in proof_steps(theorem, tuple(proof)):
        if step is None:
            saved.append(stack[-1])
            continue
        if isinstance(step, int):
            stack.append(saved[step])
            continue
        used = database.assertions.get(step)
        if step in own or step in theorem.floating or used is None:
            arity = 0
            if step not in own and step not in theorem.floating:
                raise MetamathError(f"Metamath: proof of `{theorem.label}` names `{step[:60]}`, which does not exist")
        else:
            arity = len(used.hypotheses)
        if arity > len(stack):
            raise MetamathError(f"Metamath: proof of `{theorem.label}`: `{step}` finds too few expressions")
        node = (step, tuple(stack[len(stack) - arity :]))
        del stack[len(stack) - arity :]
        if node not in index:
            index[node] = len(nodes)
            nodes.append(node)
        stack.append(index[node])
    if len(stack) != 1:
        raise MetamathError(f"Metamath: proof of `{theorem.label}` leaves {len(stack)} expressions, expected 1")
    return nodes, stack[0]


def expand(database: Database, theorem: Assertion, proof: Sequence[str] | None = None) -> list[str]:
    """Normal form: labels in reverse Polish order, shared subproofs written out.

    Raises MetamathError for a malformed proof or more than MAX_PROOF_STEPS labels.
    """
    nodes, root = _nodes(database, theorem, theorem.proof if proof is None else proof)
    labels: list[str] = []
    stack: list[int | str] = [root]
    while stack:
        top = stack.pop()
        if isinstance(top, str):
            labels.append(top)
            if len(labels) > MAX_PROOF_STEPS:
                raise MetamathError(f"Metamath: proof of `{theorem.label}` expands to over {MAX_PROOF_STEPS} steps")
            continue
        label, children = nodes[top]
        stack.append(label)
        stack.extend(reversed(children))
    return labels


def _number(value: int) -> str:
    """Letters of the 0-based entry number `value` (appendix B): base 20 last, base 5 before."""
    letters = chr(ord("A") + value % 20)
    value //= 20
    while value > 0:
        value -= 1
        letters = chr(ord("U") + value % 5) + letters
        value //= 5
    return letters


def compress(database: Database, theorem: Assertion, proof: Sequence[str] | None = None, width: int = 79) -> list[str]:
    """Compressed form as tokens `(`, labels, `)`, lines of letters. Equal subproofs are written once.

    Raises MetamathError for a malformed proof.
    """
    nodes, root = _nodes(database, theorem, theorem.proof if proof is None else proof)
    mandatory = [h.label for h in theorem.hypotheses]
    # Only what the root reaches counts: hash-consing keeps the order of first use, children before parents.
    uses = Counter(child for _, children in nodes for child in children)
    others = list(dict.fromkeys(label for label, _ in nodes if label not in set(mandatory)))
    entry = {label: i for i, label in enumerate([*mandatory, *others])}
    letters: list[str] = []
    saved: dict[int, int] = {}
    stack: list[tuple[int, bool]] = [(root, False)]
    while stack:
        node, ready = stack.pop()
        label, children = nodes[node]
        if node in saved:
            letters.append(_number(len(entry) + saved[node]))
        elif ready or not children:
            letters.append(_number(entry[label]))
            if children and uses[node] > 1:
                letters.append("Z")
                saved[node] = len(saved)
        else:
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(children))
    text = "".join(letters)
    return ["(", *others, ")", *(text[i : i + width] for i in range(0, len(text), width))]


def theorem_text(theorem: Assertion, proof: Sequence[str]) -> str:
    """The `$p` statement with its proof, to be put where the theorem stands in its database."""
    return f"{theorem.label} $p {' '.join(theorem.expression)} $= {' '.join(proof)} $."
