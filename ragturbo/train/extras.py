"""Import of the optional training dependencies at first use."""

from __future__ import annotations

import importlib
from typing import Any

from ragturbo.errors import ModelError


def require(name: str) -> Any:
    """Return the module `name`, or raise ModelError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"training needs {name.partition('.')[0]}: pip install 'ragturbo[train]'") from error
