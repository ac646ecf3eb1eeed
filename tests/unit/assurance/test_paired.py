from __future__ import annotations

import pytest

from modules.assurance.paired import mcnemar_exact


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 1), (3, 9), (9, 3), (0, 12), (17, 40), (254, 250), (600, 3)])
def test_mcnemar_exact_equals_scipy_binomtest(first: int, second: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs the extra 'games'")
    theirs = stats.binomtest(first, first + second, 0.5).pvalue
    assert mcnemar_exact(first, second) == pytest.approx(theirs, rel=1e-10)


def test_mcnemar_exact_at_its_ends() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 6) == 2 / 2**6
    with pytest.raises(ValueError, match="got -1 and 2"):
        mcnemar_exact(-1, 2)
