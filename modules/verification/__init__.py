"""Verification of answers: extraction, equivalence, programs, provers, voting, and the sandbox they run in.

Import what you need from its file; this package imports nothing heavy:

  contracts      Problem, Verdict, Verifier
  extraction     the answer in a model's output
  equivalence    SymbolicEquivalence: do two answers mean the same
  programs       ProgramVerifier: run a program, judge its value
  voting         majority voting, pass@k, confidence intervals
  server         PythonSandbox: untrusted Python, one fork per program
  sandbox        sandbox_command, run_command: any program in isolation
"""

from modules.verification.contracts import Problem, Verdict, Verifier

__all__ = ["Problem", "Verdict", "Verifier"]
