"""Settings as nested mappings: into dataclasses, changed by name, and compared. Errors name the setting."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

from ragturbo.errors import InvalidRequest

# What a value must be, by its type.
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def build(kind: Any, values: Any) -> Any:
    """Build a dataclass, whose fields may be dataclasses, from a mapping."""
    return _build(kind, values, "", kind)


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The settings that differ between two nested dicts: {"optim.lr": "was 0.001, now 0.01", …}."""
    a, b = _flat(before), _flat(now)
    names = sorted(a.keys() | b.keys())
    return {n: f"was {_brief(a.get(n))}, now {_brief(b.get(n))}" for n in names if a.get(n) != b.get(n)}


def _brief(value: Any) -> str:
    """A setting's value for a message, with the beginning of hashes."""
    return "not set" if value is None else re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b", r"\1…", repr(value))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for name, value in values.items() for k, v in _flat(value, f"{prefix}.{name}".strip(".")).items()}


def put(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InvalidRequest(f"--set {name}: {part} is not a group of settings")
        values = inner
    values[last] = value


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    hints = typing.get_type_hints(kind)
    return {spec.name: hints[spec.name] for spec in dataclasses.fields(kind)}


def _setting_names(kind: Any, prefix: str = "") -> list[str]:
    """The names of all settings, with dots."""
    names = []
    for name, hint in _hints(kind).items():
        inner = _setting_names(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [f"{prefix}{name}"]
        names += inner
    return names


def _unknown(name: str, known: Iterable[str], root: Any) -> str:
    """The message for an unknown setting: the nearest name in the whole configuration, or the group's names."""
    group, _, last = name.rpartition(".")
    everywhere: dict[str, list[str]] = {}
    for other in _setting_names(root):
        everywhere.setdefault(other.rpartition(".")[2], []).append(other)
    here = difflib.get_close_matches(last, list(known), 1)
    near = [f"{group}.{here[0]}".lstrip(".")] if here else everywhere.get(last, [])
    if not near and (close := difflib.get_close_matches(last, list(everywhere), 1)):
        near = everywhere[close[0]]
    hint = f"did you mean {or_list(near)}?" if near else f"known: {', '.join(sorted(known))}"
    return f"no setting {name}; {hint}"


def _build(kind: Any, values: Any, where: str, root: Any) -> Any:
    if not isinstance(values, dict):
        example = f", such as {{{kind.EXAMPLE}}}" if hasattr(kind, "EXAMPLE") else ""
        raise InvalidRequest(
            f"{where or 'the configuration'} must be a group of settings{example}, not {values!r}", option=where or None
        )
    hints = _hints(kind)
    prefix = f"{where}." if where else ""
    if unknown := sorted(str(name) for name in set(values) - set(hints)):
        raise InvalidRequest(_unknown(prefix + unknown[0], hints, root), option=prefix + unknown[0])
    for spec in dataclasses.fields(kind):
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and spec.name not in values:
            raise InvalidRequest(f"{prefix}{spec.name} is not set", option=prefix + spec.name)
    return kind(**{name: _convert(hints[name], value, f"{prefix}{name}", root) for name, value in values.items()})


def _convert(hint: Any, value: Any, name: str, root: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name, root)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(next(t for t in inner if t is not type(None)), value, name, root)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            example = f", such as [{{{inner[0].EXAMPLE}}}]" if hasattr(inner[0], "EXAMPLE") else ""
            raise InvalidRequest(f"{_said(name, value)} must be a list{example}", option=name)
        kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise InvalidRequest(f"{_said(name, value)} must have {len(kinds)} values", option=name)
        return tuple(_convert(t, v, f"{name}[{i}]", root) for i, (t, v) in enumerate(zip(kinds, value, strict=True)))
    # YAML 1.1 reads 1e-5 as a string.
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            raise InvalidRequest(f"{_said(name, value)} must be a number", option=name) from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InvalidRequest(f"{_said(name, value)} must be {_KINDS[hint]}", option=name)
    if hint is float and not math.isfinite(value):
        raise InvalidRequest(f"{_said(name, value)} must be finite", option=name)
    return value


def _said(name: str, value: Any) -> str:
    """`name=value`; in backticks if it could be taken for an option of the command line."""
    text = f"{name}={value!r}"
    return text if "." in name else f"`{text}`"


def or_list(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def yaml_problem(error: Any) -> str:
    """The parser's message on one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def check_range(group: str, config: Any, **bounds: float | tuple[float, float]) -> None:
    """bounds: by setting, the minimum or (minimum, maximum). A value of None is allowed."""
    for name, bound in bounds.items():
        value = getattr(config, name)
        low, high = bound if isinstance(bound, tuple) else (bound, math.inf)
        if value is not None and not low <= value <= high:
            wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise InvalidRequest(f"{group}.{name}={value!r} must be {wanted}", option=f"{group}.{name}")
