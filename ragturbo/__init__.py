"""ragturbo: retrieval-augmented one-step text-to-image generation, fast.

    image = ragturbo.generate("a red circle left of a blue square", seed=7)

Light to import: torch, diffusers and the rest load with the first model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ragturbo import errors

# The submodule first, then the function under its name: `import ragturbo.generate as g` is the function,
# `from ragturbo.generate import Generator` is the module's.
from ragturbo.generate import Generator, Neighbor, Output, generate

if TYPE_CHECKING:
    from ragturbo.retrieval import Database

__version__ = "0.1.0"
__all__ = ["Database", "Generator", "Neighbor", "Output", "__version__", "errors", "generate"]


def __getattr__(name: str) -> Any:
    if name == "Database":
        from ragturbo.retrieval import Database

        return Database
    raise AttributeError(f"module 'ragturbo' has no attribute {name!r}")
