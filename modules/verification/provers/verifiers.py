"""Provers as `Verifier`s: a formal statement as the question, a whole proof as the answer."""

from __future__ import annotations

import time

from modules.verification.contracts import Problem, Verdict
from modules.verification.provers.base import RefusedTacticError, StatementError
from modules.verification.provers.coq import CoqProver
from modules.verification.provers.coq_grammar import split_proof
from modules.verification.provers.coq_statements import parse_statement
from modules.verification.provers.metamath import Database, MetamathError

MAX_PROOF_CHARS = 200_000


class CoqVerifier:
    """Coq proofs. question: a Coq file up to its proof; answer: the tactics, `Proof.` and `Qed.` optional.

    Args:
        prover: programs, limits and axioms; None finds Coq on PATH (ProverUnavailableError if there is none).
    """

    def __init__(self, prover: CoqProver | None = None) -> None:
        self.prover = prover or CoqProver()

    def check(self, problem: Problem, answer: str) -> Verdict:
        """Judge a proof. Raises StatementError for a question that is no Coq statement."""
        started = time.monotonic()
        statement = parse_statement(problem.question, str(problem.metadata.get("name", "")))
        if len(answer) > MAX_PROOF_CHARS:
            return Verdict(False, f"refused: proof of {len(answer)} characters", time.monotonic() - started)
        try:
            steps = split_proof(answer)
        except RefusedTacticError as error:
            return Verdict(False, f"refused: {error}", time.monotonic() - started)
        return self.prover.check(statement, steps)


class MetamathVerifier:
    """Metamath proofs, normal or compressed.

    question: label of a theorem of the database. answer: the text between `$=` and `$.`. Only what stands before the
    theorem may be used.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    def check(self, problem: Problem, answer: str) -> Verdict:
        """Judge a proof. Raises StatementError if the question names no theorem."""
        started = time.monotonic()
        theorem = self.database.assertions.get(problem.question.strip())
        if theorem is None or theorem.kind != "$p":
            raise StatementError(f"MetamathVerifier: the database has no theorem '{problem.question.strip()[:60]}'")
        try:
            if len(answer) > MAX_PROOF_CHARS:
                raise MetamathError(f"proof of {len(answer)} characters, at most {MAX_PROOF_CHARS} are accepted")
            self.database.check(theorem, answer.split())
        except MetamathError as error:
            return Verdict(False, str(error), time.monotonic() - started)
        return Verdict(True, "accepted by the Metamath checker", time.monotonic() - started)
