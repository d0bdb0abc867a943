"""Settings as frozen dataclasses: from plain data and back, strict in every key and type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from sfumato.errors import BadData, nearest

T = TypeVar("T")


def from_dict(cls: type[T], raw: Any, where: str) -> T:
    """Build a frozen dataclass from plain data, checking every key and type; errors name the place."""
    if not isinstance(raw, dict):
        raise BadData(f"{where}: expected a group of settings, got {raw!r}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints:
            raise BadData(f"{where}: unknown setting {key!r}{nearest(str(key), list(hints))}")
        values[key] = _convert(hints[key], value, f"{where}: {key}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as e:
        raise BadData(f"{where}: {e}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Turn settings back into plain data that JSON and YAML can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v := getattr(config, f.name)) else plain(v)
        for f in dataclasses.fields(config)
    }


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise BadData(f"{where}: expected a list, got {value!r}")
        variadic = origin is list or (len(args) == 2 and args[1] is Ellipsis)
        if not variadic and len(value) != len(args):
            raise BadData(f"{where}: expected {len(args)} values, got {value!r}")
        return origin(_convert(args[0] if variadic else args[i], v, where) for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise BadData(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            raise BadData(f"{where}: expected a number, got {value!r}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise BadData(f"{where}: too large a number") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise BadData(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
