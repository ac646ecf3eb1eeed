"""Terms, unification and backward steps in Metamath, on a small system."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.verification.proof_search import SearchLimits, best_first_search
from modules.verification.proposers import ScriptedProposer
from modules.verification.provers.base import Prover, StatementError
from modules.verification.provers.metamath import Database, MetamathError
from modules.verification.provers.metamath_proposer import AssertionProposer
from modules.verification.provers.metamath_search import Library, MetamathProver, parse_tactic
from modules.verification.provers.metamath_terms import MAX_TERM_DEPTH, Grammar, Term, resolve, unify

SYSTEM = """
$c ( ) -> ' = wff term |- $.  $v p q r a b c $.
wp $f wff p $.  wq $f wff q $.  wr $f wff r $.
ta $f term a $.  tb $f term b $.  tc $f term c $.
wi $a wff ( p -> q ) $.
weq $a wff a = b $.
tn $a term a ' $.
ax1 $a |- ( p -> ( q -> p ) ) $.
ax2 $a |- ( ( p -> ( q -> r ) ) -> ( ( p -> q ) -> ( p -> r ) ) ) $.
${ min $e |- p $.  maj $e |- ( p -> q ) $.  mp $a |- q $. $}
${ sym.1 $e |- a = b $.  sym $a |- b = a $. $}
${ tr.1 $e |- a = b $.  tr.2 $e |- b = c $.  tr $a |- a = c $. $}
${ cong.1 $e |- a = b $.  cong $a |- a ' = b ' $. $}
${ $d a b $.  far $a |- ( a = b -> b = a ) $. $}
"""


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(Database.parse(SYSTEM))


def test_prover_meets_the_protocol(library: Library) -> None:
    assert isinstance(MetamathProver(library), Prover)


_TERM = st.recursive(st.sampled_from(["a", "b", "c"]), lambda inner: inner.map(lambda t: f"{t} '"), max_leaves=6)
_WFF = st.recursive(
    st.sampled_from(["p", "q", "r"]) | st.tuples(_TERM, _TERM).map(" = ".join),
    lambda inner: st.tuples(inner, inner).map(lambda pair: f"( {pair[0]} -> {pair[1]} )"),
    max_leaves=12,
)


@given(_WFF)
@settings(max_examples=150)
def test_parsing_and_printing_are_inverse(text: str) -> None:
    grammar = LIBRARY.grammar
    tree = grammar.parse(["|-", *text.split()])
    assert " ".join(grammar.symbols(tree)) == f"|- {text}"
    # The syntax proof builds the same symbols in the checker's eyes.
    wff = grammar.parse(["wff", *text.split()])
    database = LIBRARY.database
    assert database.check(database.theorem("t", f"wff {text}"), grammar.syntax_proof(wff)) > 0


LIBRARY = Library(Database.parse(SYSTEM))


@pytest.mark.parametrize("text", ["|- ( p -> q", "|- p q", "|-", "|- ( a -> p )", "wff p = q", "|- zz"])
def test_unparsable_statements_are_refused(library: Library, text: str) -> None:
    with pytest.raises(MetamathError, match=r"does not parse"):
        library.grammar.parse(text.split())


@pytest.mark.parametrize("text", ["( " * 5000, "( p -> " * 500 + "p" + " )" * 500, "a " + "' " * 5000 + "= a"])
def test_deep_nesting_is_an_error_not_a_crash(library: Library, text: str) -> None:
    with pytest.raises(MetamathError, match=r"nested deeper|depth"):
        library.grammar.parse(["|-", *text.split()])


def test_terms_have_bounds() -> None:
    term = Term("x")
    for _ in range(MAX_TERM_DEPTH - 1):
        term = Term("f", (term,))
    with pytest.raises(MetamathError, match="depth 121"):
        Term("f", (term,))
    with pytest.raises(MetamathError, match="size 2001"):
        Term("f", tuple(Term("x") for _ in range(2000)))


def test_unification_finds_the_most_general_unifier_and_checks_occurrence(library: Library) -> None:
    types, of = {1: "wff", 2: "wff", 3: "term"}, library.type_of
    p = Term("wp")
    bindings: dict[int, Term] = {}
    assert unify(Term("wi", (Term(1), Term(2))), Term("wi", (Term(2), p)), bindings, types, of)
    assert resolve(Term(1), bindings).head == "wp"
    assert not unify(Term(1), Term("wi", (Term(1), p)), {}, types, of)
    cycle = Term("wi", (Term("wi", (Term(1), p)), Term("wi", (Term(2), p))))
    assert not unify(Term("wi", (Term(2), Term(1))), cycle, {}, types, of)
    assert not unify(Term(3), p, {}, types, of)  # a term is no wff
    assert not unify(Term(1), Term(3), {}, types, of)
    assert unify(Term(1), Term(1), {}, types, of)


def test_tactics_are_split_at_their_assignments() -> None:
    assert parse_tactic("tr") == ("tr", {})
    assert parse_tactic("tr b := a ' c := a") == ("tr", {"b": ["a", "'"], "c": ["a"]})
    for bad in ("", "tr b", "tr b c := a", "tr := a", "tr b := a b := c", "x" * 5000):
        with pytest.raises(MetamathError):
            parse_tactic(bad)


def test_steps_open_goals_with_metavariables_and_bind_them_later(library: Library) -> None:
    prover = MetamathProver(library)
    theorem = library.database.theorem("t", "|- a ' = c '", ["|- a = b", "|- c = b"])
    root = prover.start(theorem)
    assert prover.goals(root) == "1 goal\nt.1: |- a = b\nt.2: |- c = b\n|- a ' = c '"
    step = prover.apply(root, "tr")
    assert prover.goals(step.state).splitlines()[3:] == ["|- a ' = &term1", "|- &term1 = c '"]
    step = prover.apply(step.state, "cong")
    assert prover.goals(step.state).splitlines()[3:] == ["|- a = &term1", "|- &term1 ' = c '"]
    step = prover.apply(step.state, "t.1")
    assert prover.goals(step.state).splitlines()[0] == "1 goal"
    assert prover.goals(step.state).splitlines()[3:] == ["|- b ' = c '"]
    explicit = prover.apply(root, "tr b := b '")
    assert prover.goals(explicit.state).splitlines()[3:] == ["|- a ' = b '", "|- b ' = c '"]
    proof = ["tr", "cong", "t.1", "cong", "sym", "t.2"]
    assert prover.check(theorem, proof).ok
    assert library.database.check(theorem, prover.compressed(theorem, proof)) > 0
    assert prover.replay(theorem, proof)[-1] == "tr"


@pytest.mark.parametrize(
    ("tactic", "status", "why"),
    [
        ("nothing", "error", "no assertion stated before"),
        ("wi", "error", "no assertion stated before"),
        ("ax1", "error", "does not unify"),
        ("tr z := a", "error", "no variable `z`"),
        ("tr b := p", "error", "does not parse"),
        ("tr b := ( ( (", "error", "does not parse"),
        ("t.1 a := a", "error", "takes no substitution"),
        ("tr b", "refused", "must read"),
        ("t", "error", "no assertion stated before"),
    ],
)
def test_bad_tactics_are_outcomes(library: Library, tactic: str, status: str, why: str) -> None:
    prover = MetamathProver(library)
    root = prover.start(library.database.theorem("t", "|- a = c", ["|- p"]))
    step = prover.apply(root, tactic)
    assert (step.status, step.state) == (status, None)
    assert why in step.message


def test_later_theorems_cannot_be_used() -> None:
    library = Library(Database.parse(SYSTEM + "first $p |- ( p -> ( q -> p ) ) $= wp wq ax1 $.\n"
                                     "second $p |- ( p -> ( q -> p ) ) $= wp wq first $."))  # fmt: skip
    first, second = library.database.assertions["first"], library.database.assertions["second"]
    prover = MetamathProver(library)
    assert prover.apply(prover.start(first), "first").status == "error"
    assert prover.apply(prover.start(first), "second").status == "error"
    assert prover.apply(prover.start(second), "first").status == "proved"
    assert not prover.check(first, ["second"]).ok
    assert library.uses("first", second.index) == 0
    assert library.uses("first", second.index + 1) == 1


def test_a_proof_that_breaks_a_disjointness_is_not_accepted(library: Library) -> None:
    prover = MetamathProver(library)
    plain = library.database.theorem("t", "|- ( a = b -> b = a )")
    apart = library.database.theorem("t", "|- ( a = b -> b = a )", disjoint=[("b", "a")])
    assert prover.apply(prover.start(plain), "far").status == "proved"
    verdict = prover.check(plain, ["far"])
    assert not verdict.ok
    assert "$d a b" in verdict.reason
    assert prover.check(apart, ["far"]).ok
    assert not best_first_search(prover, plain, ScriptedProposer(["far"])).proved


def test_unfinished_and_overlong_proofs_are_not_accepted(library: Library) -> None:
    prover = MetamathProver(library)
    theorem = library.database.theorem("t", "|- a = c", ["|- c = a"])
    assert "1 goals are left" in prover.check(theorem, ["sym"]).reason
    assert "at most 1000" in prover.check(theorem, ["sym"] * 1001).reason
    assert prover.check(theorem, ["sym", "t.1"]).ok
    assert "no goal left" in prover.check(theorem, ["sym", "t.1", "t.1"]).reason


def test_variables_left_open_become_variables_of_their_type(library: Library) -> None:
    prover = MetamathProver(library)
    theorem = library.database.theorem("t", "|- ( p -> p )")
    # mp with ax1 leaves the middle formula of the identity proof undetermined.
    proof = ["mp", "ax1", "mp", "ax1", "ax2"]
    verdict = prover.check(theorem, proof)
    assert verdict.ok, verdict.reason


def test_statements_outside_the_grammar_are_refused() -> None:
    library = Library(Database.parse("$c |- x y $. odd $a |- x y $. other $a |- y x x $."))
    with pytest.raises(StatementError, match="does not parse"):
        MetamathProver(library).start(library.database.theorem("t", "|- y y y"))


def test_forms_are_learnt_from_the_statements() -> None:
    grammar = Grammar(Database.parse(
        "$c term type |- : |= $. $v A B al $. ta $f term A $. tb $f term B $. tal $f type al $.\n"
        "ax $a |- A : al $. bx $a |- A |= B $."))  # fmt: skip
    for text in ("|- B : al", "|- B |= A"):
        assert " ".join(grammar.symbols(grammar.parse(text.split()))) == text


def test_search_without_a_model_proves_the_identity_and_a_chain(library: Library) -> None:
    for theorem in (
        library.database.theorem("t", "|- ( p -> p )"),
        library.database.theorem("t", "|- a = c", ["|- b = a", "|- b = c"]),
    ):
        prover = MetamathProver(library)
        result = best_first_search(prover, theorem, AssertionProposer(library, theorem), SearchLimits(100, 30))
        assert result.proved, result
        assert result.proof is not None
        assert library.database.check(theorem, prover.replay(theorem, result.proof)) > 0
        again = best_first_search(prover, theorem, AssertionProposer(library, theorem), SearchLimits(100, 30))
        assert again.proof == result.proof


def test_search_does_not_prove_what_does_not_follow(library: Library) -> None:
    theorem = library.database.theorem("t", "|- a = b")
    prover = MetamathProver(library)
    result = best_first_search(prover, theorem, AssertionProposer(library, theorem), SearchLimits(30, 20))
    assert not result.proved
    hostile = ScriptedProposer(["t", "t.1", "far", "sym a := b", "?", "tr b := a", "mp p := a = b", "sym", "ax1"])
    assert not best_first_search(prover, theorem, hostile, SearchLimits(50, 20)).proved
