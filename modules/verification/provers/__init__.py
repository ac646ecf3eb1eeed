"""Formal provers behind one step-wise interface (`base.Prover`): Coq (Debian's 8.16) and Metamath (pure Python).

Import what is needed from the submodules: `coq.CoqProver`, `coq_statements.load_minif2f`, `metamath.Database`,
`metamath_search.MetamathProver`, `metamath_proposer.AssertionProposer`, `verifiers.CoqVerifier`.
"""
