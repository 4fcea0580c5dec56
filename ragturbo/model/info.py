"""ragturbo.json: what a bundle says about itself beside its diffusers folders."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ragturbo import __version__
from ragturbo.errors import ModelError

FILE = "ragturbo.json"
FORMAT = 1
_KEY_KINDS = ("pooled", "clip")
_ADAPTER_KINDS = ("transformer", "attention")


@dataclass(frozen=True)
class BundleInfo:
    """Checks itself when it is made; a folder without ragturbo.json gets one by the rules for plain folders."""

    distilled: bool
    """One to four steps without guidance, or an undistilled base."""
    key_kind: str = "pooled"
    adapter_kind: str | None = None
    num_neighbors: int = 1
    """How many neighbours the adapter was trained with: what a request takes unless it says otherwise."""
    base_model: str | None = None
    base_revision: str | None = None
    provenance: dict[str, Any] | None = None
    """Where the weights come from, in its makers' own words: recipe, commit, seeds, steps, losses."""
    format: int = FORMAT
    ragturbo: str = __version__

    def __post_init__(self) -> None:
        if not isinstance(self.format, int) or self.format > FORMAT:
            raise ModelError(f"{FILE} has format {self.format!r}; this ragturbo ({__version__}) reads up to {FORMAT}")
        if not isinstance(self.distilled, bool):
            raise ModelError(f"{FILE}: distilled is {self.distilled!r}, not true or false")
        if self.key_kind not in _KEY_KINDS:
            raise ModelError(f"{FILE}: key_kind is {self.key_kind!r}, not one of {', '.join(_KEY_KINDS)}")
        if self.adapter_kind is not None and self.adapter_kind not in _ADAPTER_KINDS:
            raise ModelError(f"{FILE}: adapter_kind is {self.adapter_kind!r}, not one of {', '.join(_ADAPTER_KINDS)}")
        if not isinstance(self.num_neighbors, int) or not 1 <= self.num_neighbors <= 64:
            raise ModelError(f"{FILE}: num_neighbors is {self.num_neighbors!r}, not a number from 1 to 64")
        if self.provenance is not None and not isinstance(self.provenance, dict):
            raise ModelError(f"{FILE}: provenance is {self.provenance!r}, not a table")

    @classmethod
    def read(cls, folder: Path) -> BundleInfo | None:
        """None where the folder has no ragturbo.json."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text("utf-8"))
            known = {field.name for field in fields(cls)}
            # A newer format says so first: its own words come after that.
            if values.get("format", FORMAT) == FORMAT and (unknown := sorted(set(values) - known)):
                raise ModelError(f"{path} has an entry {unknown[0]!r} that is not known; there are: {', '.join(known)}")
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is not a bundle's description: {error}") from error

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
