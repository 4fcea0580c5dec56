"""Huge pages for torch's CPU memory.

The feature maps of a VAE are up to 134 MB each. In pages of 4 KiB, the kernel takes as long to provide the memory of
such a map as a fused layer takes to write it. torch can ask for huge pages, if a variable is set before it is imported.
"""

from __future__ import annotations

import os
import sys

_VARIABLE = "THP_MEM_ALLOC_ENABLE"


def ask() -> None:
    """Have torch ask for huge pages, unless it is imported already or the variable is set."""
    if "torch" not in sys.modules:
        os.environ.setdefault(_VARIABLE, "1")


def state() -> str:
    """Whether torch asks for huge pages, for `gen.info`."""
    if os.environ.get(_VARIABLE) == "1":
        return "requested"
    return f"not requested: torch was imported first, or {_VARIABLE} was set; set {_VARIABLE}=1 before starting Python"
