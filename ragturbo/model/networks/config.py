"""A network's config.json, if all its options are implemented here."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

# Entries that the libraries write beside the options.
_NOTES = ("_class_name", "_diffusers_version", "_name_or_path", "_commit_hash")


class Config(dict[str, Any]):
    """A configuration whose entries are attributes, too, as in diffusers and transformers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no {name!r}") from None


@dataclass(frozen=True)
class Options:
    """The options of a class of diffusers or transformers, with the library's defaults."""

    free: Mapping[str, Any]
    """May have any value, or one of those in `allowed`."""
    fixed: Mapping[str, Any]
    """Must have the default's value, or the library's own class is needed."""
    allowed: Mapping[str, Container[Any]] = field(default_factory=dict)
    ignored: Container[str] = ()
    """Entries of config.json that do not change what is computed."""

    def read(self, values: Mapping[str, Any]) -> Config | None:
        """Return the configuration with all defaults; None if it has an option that is not implemented here."""
        known = {**self.free, **self.fixed}
        for name, value in values.items():
            if name not in known and name not in self.ignored and name not in _NOTES:
                return None
            if name in self.fixed and value != self.fixed[name]:
                return None
            if name in self.allowed and not _all_in(value, self.allowed[name]):
                return None
        config = Config({**known, **values})
        # From it diffusers knows which values another class may replace by its own defaults.
        if defaults := [name for name in known if name not in values]:
            config["_use_default_values"] = defaults
        return config


def _all_in(value: Any, allowed: Container[Any]) -> bool:
    return all(part in allowed for part in value) if isinstance(value, (list, tuple)) else value in allowed
