"""What only training needs is imported where it is used, and named where it is missing."""

from __future__ import annotations

import importlib
from typing import Any

from ragturbo.errors import ModelError

INSTALL = "pip install 'ragturbo[train]'"


def require(name: str) -> Any:
    """The module `name`, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"training needs {name.partition('.')[0]}: {INSTALL}") from error
