"""Document filters in the manner of AlgebraicStack (Azerbayev et al. 2024, section 2.1 and appendix B.1).

The rules are the paper's; the code is ours. Two faults of the published filters are not repeated: there, missing
commas joined neighbouring list entries (so neither was ever matched), and an empty file raised an IndexError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

MAX_FILE_BYTES = 1_048_575
MAX_NUMERIC_DENSITY = 0.5
MAX_NUMERIC_DENSITY_CPP = 0.1

LANGUAGE_OF_SUFFIX = {
    ".py": "python", ".sage": "python", ".ipynb": "notebook", ".tex": "tex", ".hs": "haskell", ".c": "c", ".h": "c",
    ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".jl": "julia", ".r": "r", ".m": "matlab",
    ".f": "fortran", ".f90": "fortran", ".f95": "fortran", ".g": "gap", ".gap": "gap", ".mpl": "maple",
    ".maple": "maple", ".v": "coq", ".lean": "lean", ".thy": "isabelle", ".agda": "agda", ".lagda": "agda",
    ".idr": "idris", ".mm": "metamath",
}  # fmt: skip

PYTHON_PACKAGES = frozenset({
    "numpy", "scipy", "sympy", "sage", "numba", "numexpr", "theano", "statsmodels", "networkx", "mpmath", "pymc3",
    "astropy", "cupy", "pycuda", "cvxpy", "pyomo", "jax",
})  # fmt: skip
HASKELL_MODULES = (
    "Numeric.LinearAlgebra", "Numeric.GSL", "Numeric.AD", "Numeric.SpecFunctions", "Numeric.Integration",
    "Numeric.MathFunctions", "Math.", "Data.Matrix", "Data.Complex", "Data.Ratio", "Statistics", "Data.Massiv",
    "AlgebraicPrelude", "Algebra.", "Numeric.Algebra", "Linear.",
)  # fmt: skip
C_HEADERS = (
    "fftw3.h", "fftw.h", "rfftw.h", "gsl/", "gmp.h", "mpfr.h", "mpc.h", "flint/", "cblas.h", "clapack.h", "lapacke.h",
    "blas.h", "nlopt.h", "petsc", "suitesparse", "cs.h", "arb.h", "pari/", "sundials/", "glpk.h",
)  # fmt: skip
CPP_HEADERS = (
    *C_HEADERS, "eigen", "armadillo", "blitz/", "boost/math", "boost/numeric", "boost/multiprecision", "NTL/", "ginac/",
    "deal.II/", "dlib/", "mtl/", "adept.h", "alglib", "blaze/", "xtensor/", "ceres/", "mlpack", "stan/math", "gmpxx.h",
)  # fmt: skip

_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import\b|import[ \t]+([^#\n;]+))", re.MULTILINE)
_HASKELL_IMPORT = re.compile(r"^import[ \t]+(?:safe[ \t]+)?(?:qualified[ \t]+)?([A-Z][\w.]*)", re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*[<\"]([^>\"\n]+)[>\"]", re.MULTILINE)
_SECTIONING = re.compile(r"\\(?:part|chapter|(?:sub){0,2}section|(?:sub)?paragraph)\*?[ \t]*[\[{]")
_MATH_ENVIRONMENT = re.compile(r"\\begin\{(?:equation|align)\*?\}")
_IMAGE_MARKDOWN = re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)|<img\b[^>]*>", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+")
_ENGLISH = frozenset({
    "the", "of", "and", "to", "in", "is", "that", "for", "we", "with", "as", "are", "be", "this", "by", "on", "it",
    "an", "which", "can", "from", "have", "if", "let", "not", "or", "at", "has",
})  # fmt: skip


def numeric_density(text: str) -> float:
    """Digits divided by non-space characters; 0 for blank text."""
    solid = "".join(text.split())
    if not solid:
        return 0.0
    return sum(solid.count(digit) for digit in "0123456789") / len(solid)


def imports_mathematics(text: str) -> bool:
    """True if Python code imports one of the paper's mathematical packages."""
    for origin, plain in _IMPORT.findall(text):
        names = [origin] if origin else [part.split()[0] for part in plain.split(",") if part.split()]
        if any(name.split(".")[0] in PYTHON_PACKAGES for name in names):
            return True
    return False


def is_english(text: str) -> bool:
    """Rough test for TeX: common English function words make up at least 12% of the words."""
    words = _WORD.findall(text.lower())
    return bool(words) and sum(word in _ENGLISH for word in words) >= 0.12 * len(words)


def notebook_to_markdown(text: str) -> str | None:
    """A Jupyter notebook as Markdown: prose, fenced code, text outputs; images and tracebacks left out.

    Returns None if the text is not a notebook.
    """
    try:
        notebook = json.loads(text)
        cells = notebook.get("cells") or [cell for sheet in notebook.get("worksheets", []) for cell in sheet["cells"]]
        parts = [part for cell in cells for part in _cell_markdown(cell)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return "\n\n".join(parts) + "\n" if parts else ""


def _cell_markdown(cell: dict) -> list[str]:
    source = _joined(cell.get("source", cell.get("input", ""))).strip("\n")
    if cell.get("cell_type") in ("markdown", "raw", "heading"):
        source = _IMAGE_MARKDOWN.sub("", source)
        return [source] if source.strip() else []
    if cell.get("cell_type") != "code":
        return []
    parts = [f"```python\n{source}\n```"] if source.strip() else []
    for output in cell.get("outputs", []):
        if output.get("output_type") in ("error", "pyerr"):
            continue
        # Rich outputs carry a plain-text twin beside the picture; only words are kept.
        data = output.get("data", {})
        shown = _joined(output.get("text", data.get("text/latex", data.get("text/plain", "")))).strip("\n")
        pictured = any(kind.startswith("image/") for kind in data)
        if shown.strip() and not pictured and "Traceback (most recent call last)" not in shown:
            parts.append(f"```\n{shown}\n```")
    return parts


def _joined(value: object) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _python(text: str) -> str | None:
    return None if imports_mathematics(text) else "no_math_import"


def _haskell(text: str) -> str | None:
    wanted = HASKELL_MODULES
    return None if any(name.startswith(wanted) for name in _HASKELL_IMPORT.findall(text)) else "no_math_import"


def _includes(headers: tuple[str, ...]) -> Callable[[str], str | None]:
    lowered = tuple(header.lower() for header in headers)

    def rule(text: str) -> str | None:
        return None if any(name.lower().startswith(lowered) for name in _INCLUDE.findall(text)) else "no_math_import"

    return rule


def _tex(text: str) -> str | None:
    if "gnuplot" in text.lower():
        return "gnuplot"
    if not _SECTIONING.search(text):
        return "no_sectioning"
    return None if is_english(text) else "not_english"


_RULES: dict[str, Callable[[str], str | None]] = {
    "python": _python, "haskell": _haskell, "c": _includes(C_HEADERS), "cpp": _includes(CPP_HEADERS), "tex": _tex,
}  # fmt: skip
_SIZE_AND_DENSITY_ONLY = frozenset(LANGUAGE_OF_SUFFIX.values()) - set(_RULES) - {"notebook"} | {"text"}


def algebraic_stack(text: str, suffix: str, language: str | None = None) -> tuple[str | None, str]:
    """Apply the rules to one document.

    Args:
        text: the document.
        suffix: file suffix with its dot; sets the rule set unless ``language`` does. Unknown suffixes get the size and
            density rules alone, as formal languages do.

    Returns:
        (text to keep or None, reason for dropping or ""). A kept notebook comes back as Markdown.

    Raises:
        ValueError: unknown ``language``.
    """
    language = language or LANGUAGE_OF_SUFFIX.get(suffix.lower(), "text")
    if language not in _RULES and language not in _SIZE_AND_DENSITY_ONLY and language != "notebook":
        known = ", ".join(sorted({*_RULES, *_SIZE_AND_DENSITY_ONLY, "notebook"}))
        raise ValueError(f"algebraic_stack: unknown language {language!r}; known: {known}")
    if len(text.encode()) > MAX_FILE_BYTES:
        return None, "size"
    if language == "python" and text.lstrip().startswith("{") and notebook_to_markdown(text) is not None:
        return None, "notebook_as_python"
    if language == "notebook":
        if not (_MATH_ENVIRONMENT.search(text.replace("\\\\", "\\")) or "sympy" in text):
            return None, "no_mathematics"
        converted = notebook_to_markdown(text)
        if not converted:
            return None, "not_a_notebook"
        text = converted
    if numeric_density(text) > (MAX_NUMERIC_DENSITY_CPP if language == "cpp" else MAX_NUMERIC_DENSITY):
        return None, "numeric_density"
    reason = _RULES[language](text) if language in _RULES else None
    return (None, reason) if reason else (text, "")
