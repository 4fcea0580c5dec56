"""ragturbo: retrieval-augmented one-step text-to-image generation, fast.

    image = ragturbo.generate("a red circle left of a blue square", seed=7)

Importing it loads no heavy package: torch, diffusers and the rest are imported with the first model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ragturbo import errors

# The function replaces the submodule's attribute: `import ragturbo.generate as g` gives the function, and
# `from ragturbo.generate import Generator` still finds the module.
from ragturbo.generate import Generator, generate
from ragturbo.neighbor import Neighbor
from ragturbo.output import Output
from ragturbo.version import __version__

if TYPE_CHECKING:
    from ragturbo.retrieval import Database

__all__ = ["Database", "Generator", "Neighbor", "Output", "__version__", "errors", "generate"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name == "Database":
        from ragturbo.retrieval import Database

        return Database
    raise AttributeError(f"module 'ragturbo' has no attribute {name!r}")
