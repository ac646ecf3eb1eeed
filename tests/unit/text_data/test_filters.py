"""AlgebraicStack-style rules, and the two published faults that must not come back."""

from __future__ import annotations

import json

import pytest

from datamodules.text import filters
from datamodules.text.filters import algebraic_stack, imports_mathematics, notebook_to_markdown, numeric_density

ENGLISH = "We show that the sum of the series is bounded by an integral and that it can be made small. "


@pytest.mark.parametrize("text", ["", "   ", "\n\n\t"])
@pytest.mark.parametrize("suffix", [".py", ".tex", ".cpp", ".v", ".ipynb", ".hs"])
def test_blank_files_do_not_raise(text: str, suffix: str) -> None:
    assert isinstance(algebraic_stack(text, suffix)[1], str)


def test_list_entries_are_not_joined() -> None:
    # The published code lost "fftw3.h" and "rfftw.h" to a missing comma.
    for header in ("fftw3.h", "rfftw.h"):
        assert algebraic_stack(f"#include <{header}>\nint main() {{ return f(x); }}\n", ".c")[0] is not None
    assert len(filters.PYTHON_PACKAGES) == 17


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("import numpy as np\n", True),
        ("import os, scipy.linalg as la\n", True),
        ("    from sympy.core import S\n", True),
        ("from jax import grad\n", True),
        ("import numpylike\n", False),
        ("# import numpy\n", False),
        ("from . import numpy_helpers\n", False),
        ("x = 'import numpy'\n", False),
    ],
)
def test_python_import_rule(code: str, kept: bool) -> None:
    assert imports_mathematics(code) is kept


def test_size_and_density() -> None:
    assert numeric_density("1 2 ab") == pytest.approx(0.5)
    assert numeric_density("   ") == 0.0
    assert algebraic_stack("a" * 1_048_576, ".v") == (None, "size")
    assert algebraic_stack("a" * 1_048_575, ".v")[1] == ""
    assert algebraic_stack("123456 ab", ".v") == (None, "numeric_density")
    dense = "#include <Eigen/Dense>\n" + "1 2 3 4 5 " * 10
    assert algebraic_stack(dense, ".cpp") == (None, "numeric_density")
    assert algebraic_stack("#include <gsl/gsl_math.h>\n" + "1 2 3 4 5 6 7 8 " * 2, ".c")[1] == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\\section{A}\n" + ENGLISH, ""),
        (ENGLISH, "no_sectioning"),
        ("\\section{A} gnuplot\n" + ENGLISH, "gnuplot"),
        ("\\section{A}\nNous montrons que la somme de cette suite est petite et converge vite.", "not_english"),
    ],
)
def test_tex_rules(text: str, reason: str) -> None:
    assert algebraic_stack(text, ".tex")[1] == reason


def notebook(cells: list[dict]) -> str:
    return json.dumps({"nbformat": 4, "cells": cells})


def test_notebooks_become_markdown_without_pictures_and_tracebacks() -> None:
    text = notebook(
        [
            {"cell_type": "markdown", "source": ["# Title\n", "![plot](data:image/png;base64,AAAA)\n", "words"]},
            {
                "cell_type": "code",
                "source": "import sympy\nsympy.sqrt(8)",
                "outputs": [
                    {"output_type": "execute_result", "data": {"text/plain": ["2*sqrt(2)"]}},
                    {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "<Figure>"}},
                    {"output_type": "error", "ename": "E", "evalue": "", "traceback": ["Traceback ..."]},
                    {"output_type": "stream", "text": "Traceback (most recent call last)\n x"},
                ],
            },
        ]
    )
    kept, reason = algebraic_stack(text, ".ipynb")
    assert reason == ""
    assert kept == "# Title\n\nwords\n\n```python\nimport sympy\nsympy.sqrt(8)\n```\n\n```\n2*sqrt(2)\n```\n"
    assert algebraic_stack(text, ".py")[1] == "notebook_as_python"


def test_notebooks_without_mathematics_or_structure() -> None:
    plain = notebook([{"cell_type": "markdown", "source": "hello"}])
    assert algebraic_stack(plain, ".ipynb") == (None, "no_mathematics")
    aligned = notebook([{"cell_type": "markdown", "source": "\\begin{align}a&=b\\end{align}"}])
    assert algebraic_stack(aligned, ".ipynb")[1] == ""
    assert notebook_to_markdown("sympy [") is None
    assert algebraic_stack('"sympy"', ".ipynb") == (None, "not_a_notebook")


def test_haskell_and_cpp_need_a_numeric_library() -> None:
    assert algebraic_stack("import qualified Numeric.LinearAlgebra as L\nmain = f\n", ".hs")[1] == ""
    assert algebraic_stack("import Data.List\nmain = f\n", ".hs")[1] == "no_math_import"
    assert algebraic_stack('#include "armadillo"\nint main() {}\n', ".cpp")[1] == ""
    assert algebraic_stack("#include <vector>\nint main() {}\n", ".cpp")[1] == "no_math_import"


def test_unknown_language_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown language 'cobol'"):
        algebraic_stack("x", ".py", language="cobol")
