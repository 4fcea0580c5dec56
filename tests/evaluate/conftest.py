"""A fixture with the modules of the embedded model's recipe."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

RECIPE = Path(__file__).parents[2] / "examples" / "shapes"


@pytest.fixture(scope="session")
def recipe() -> Iterator[dict[str, ModuleType]]:
    """The recipe's modules by name, imported as scripts and removed from sys.modules afterwards."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield {path.stem: importlib.import_module(path.stem) for path in sorted(RECIPE.glob("*.py"))}
    finally:
        sys.path.remove(str(RECIPE))
        for name, module in list(sys.modules.items()):
            if str(RECIPE) in str(getattr(module, "__file__", "")):
                del sys.modules[name]
