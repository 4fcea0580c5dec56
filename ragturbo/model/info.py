"""ragturbo.json: the description of a bundle, next to its diffusers folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ragturbo.config import RETRIEVERS
from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.messages import short
from ragturbo.version import __version__

FILE = "ragturbo.json"
# One-step and few-step students are distilled for at most the four steps of the paper's T_4.
DISTILLED_MAX_STEPS = 4
# Consistency models are sampled in several steps.
_CONSISTENCY = ("LCMScheduler", "TCDScheduler")
FORMAT = 1
KEY_KINDS = ("pooled", "clip")
ADAPTER_KINDS = ("transformer", "attention")


@dataclass(frozen=True)
class BundleInfo:
    """The contents of ragturbo.json, checked on construction. `Bundle.load` infers one for folders without the file."""

    distilled: bool
    """True for models of one to four steps without guidance, False for undistilled base models."""
    key_kind: str = "pooled"
    adapter_kind: str | None = None
    num_neighbors: int = 1
    """How many neighbours the adapter was trained with; the default of a request."""
    retriever: str | None = None
    """The retriever the adapter was trained with: what "auto" means for its database, unless that names another."""
    compose: bool | None = None
    """Whether the adapter was trained with the neighbours of the prompt's phrases; the default of a request."""
    base_model: str | None = None
    base_revision: str | None = None
    provenance: dict[str, Any] | None = None
    """Where the weights come from, as free-form facts: recipe, commit, seeds, steps, losses."""
    format: int = FORMAT
    ragturbo: str = __version__

    def __post_init__(self) -> None:
        if not isinstance(self.format, int) or self.format > FORMAT:
            raise ModelError(f"{FILE} has format {self.format!r}; this ragturbo ({__version__}) reads up to {FORMAT}")
        if not isinstance(self.distilled, bool):
            raise ModelError(f"{FILE}: distilled is {self.distilled!r}, not true or false")
        if self.key_kind not in KEY_KINDS:
            raise ModelError(f"{FILE}: key_kind is {self.key_kind!r}, not one of {', '.join(KEY_KINDS)}")
        if self.adapter_kind not in (None, *ADAPTER_KINDS):
            raise ModelError(f"{FILE}: adapter_kind is {self.adapter_kind!r}, not one of {', '.join(ADAPTER_KINDS)}")
        if not isinstance(self.num_neighbors, int) or not 1 <= self.num_neighbors <= 64:
            raise ModelError(f"{FILE}: num_neighbors is {self.num_neighbors!r}, not a number from 1 to 64")
        if self.retriever not in (None, *RETRIEVERS):
            raise ModelError(f"{FILE}: retriever is {self.retriever!r}, not one of {', '.join(RETRIEVERS)}")
        if self.compose not in (None, True, False):
            raise ModelError(f"{FILE}: compose is {self.compose!r}, not true or false")
        if self.provenance is not None and not isinstance(self.provenance, dict):
            raise ModelError(f"{FILE}: provenance is {self.provenance!r}, not an object")

    @classmethod
    def read(cls, folder: Path) -> BundleInfo | None:
        """Read ragturbo.json; None if the folder has none."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text("utf-8"))
            known = {field.name for field in fields(cls)}
            # Unknown entries of a newer format are expected; __post_init__ then reports the format.
            if values.get("format", FORMAT) == FORMAT and (unknown := sorted(set(values) - known)):
                raise ModelError(f"{path} has an unknown entry {unknown[0]!r}; known: {', '.join(sorted(known))}")
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is not a valid bundle description: {error}") from error

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


@dataclass(frozen=True)
class Sampling:
    """How many steps a model takes, and what a request that does not say gets."""

    distilled: bool
    why: str
    """Why it counts as distilled or not, for messages."""
    most_steps: int
    steps: int
    guidance_scale: float

    @classmethod
    def of(cls, info: BundleInfo | None, scheduler: Mapping[str, Any], asked: bool | None = None) -> Sampling:
        """Args:
        info: None if the model has no ragturbo.json.
        scheduler: its configuration, with "_class_name".
        asked: what the caller says of the model; None: nothing.
        """
        if asked is not None and not isinstance(asked, bool):
            raise InvalidRequest(f"distilled={short(asked)} must be True, False or None", option="distilled")
        kind, distilled = scheduler.get("_class_name"), False
        if asked is not None:
            distilled, why = asked, f"distilled={asked} was given"
        elif info is not None:
            distilled, why = info.distilled, f"its {FILE} says so"
        else:
            if kind in _CONSISTENCY:
                distilled, why = True, f"its scheduler is {kind}"
            elif scheduler.get("timestep_spacing") == "trailing":
                distilled, why = True, "its scheduler's timesteps are trailing"
            else:
                why = "its scheduler is that of an undistilled model"
            why += f", and it has no {FILE}"
        if distilled:
            return cls(True, why, DISTILLED_MAX_STEPS, DISTILLED_MAX_STEPS if kind in _CONSISTENCY else 1, 0.0)
        most = scheduler.get("num_train_timesteps", 1000)
        if not isinstance(most, int) or most < 1:
            raise ModelError(f"the scheduler's num_train_timesteps is {most!r}, not a whole number above 0")
        # The defaults of diffusers' pipelines; 50 steps are those of the paper's teacher.
        return cls(False, why, most, min(50, most), 7.5)
