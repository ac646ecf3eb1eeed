"""Import of optional packages with one line that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str, *, extra: str) -> ModuleType:
    """Import ``package`` or say which extra of Plumbline brings it.

    Args:
        package: dotted import name, e.g. ``"sympy.parsing.latex"``.
        extra: name of the extra in ``pyproject.toml`` that lists the distribution.

    Returns:
        The imported module.

    Raises:
        ImportError: one line naming the missing package and the install command. An import error raised
            *inside* an installed package is passed on unchanged: hiding it would send users after the wrong mend.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        if missing.split(".")[0] != package.split(".")[0]:
            raise
        raise ImportError(
            f"package '{missing}' is needed here but not installed: pip install 'plumbline[{extra}]'"
        ) from None
