"""ragturbo: retrieval-augmented one-step text-to-image generation, fast."""

from __future__ import annotations

__version__ = "0.1.0"
