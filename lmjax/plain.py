"""Plain values, as JSON or a command line give them, as typed dataclasses: nothing converted in silence, every problem
at once, and nothing executed.

What lives here: building, checking and reading JSON. What does not: which fields there are (`lmjax.config`).
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from lmjax.errors import ConfigError

MAX_BYTES = 16 << 20  # of a JSON file; a config has a few thousand


def shown(value: Any) -> str:
    """A value for a message: short, in one line, and whatever its repr does."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except Exception:  # a whole number of too many digits, or an object of the user's own
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "…"


def build(value: Any, wanted: Any) -> Any:
    """A plain value as the wanted type: dicts as dataclasses, lists as tuples, ints as floats, nothing else
    converted. Raises TypeError with the first problem."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(wanted)
        if value is None and type(None) in options:
            return None
        return build(value, next(o for o in options if o is not type(None)))
    if dataclasses.is_dataclass(wanted):
        if isinstance(value, wanted):
            return value
        if not isinstance(value, dict):
            raise TypeError(f"expected {wanted.__name__}, got {type(value).__name__}")
        hints = typing.get_type_hints(wanted)
        unknown = sorted(map(str, value.keys() - hints.keys()))
        if unknown:
            raise TypeError(f"{wanted.__name__} has no field {shown(', '.join(unknown))}")
        return wanted(**{k: build(v, hints[k]) for k, v in value.items()})
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"expected a tuple, got {type(value).__name__}")
        return tuple(build(v, typing.get_args(wanted)[0]) for v in value)
    if type(value) is int and wanted in (int, float) and value.bit_length() > 63:
        raise TypeError("expected a number of at most 63 bits")
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise TypeError(f"expected {wanted.__name__}, got {type(value).__name__} {shown(value)}")
    if wanted is str and (problem := _unwritable(value)):
        raise TypeError(f"holds {problem}, which neither a file name nor UTF-8 can hold")
    return value


def _unwritable(text: str) -> str:
    if "\0" in text:
        return "the character U+0000"
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), "")
    return f"half a character, U+{ord(half):04X}" if half else ""


def problems(value: Any, wanted: Any, key: str = "") -> list[str]:
    """Everything that stops `build`, each with its dotted key; unknown fields with the nearest name."""
    if isinstance(value, dict) and (section := _section(wanted)):
        hints = typing.get_type_hints(section)
        found = []
        for name, inner in value.items():
            inside = f"{key}.{name}" if key else str(name)
            if name in hints:
                found += problems(inner, hints[name], inside)
            else:
                near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
                hint = f"; did you mean {key + '.' if key else ''}{near[0]}?" if near else ""
                found.append(f"no field {shown(inside)[1:-1]}{hint}")
        return found
    if typing.get_origin(wanted) is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(wanted)[0]
        return [problem for i, item in enumerate(value) for problem in problems(item, inner, f"{key}[{i}]")]
    try:
        build(value, wanted)
    except TypeError as error:
        return [f"{key or 'the whole'}={shown(value)}: {error}"]
    return []


def _section(wanted: Any) -> type | None:
    """The dataclass that a type is, or may be besides None."""
    union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    options = typing.get_args(wanted) if union else (wanted,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def not_finite(config: Any, prefix: str = "") -> list[tuple[str, float]]:
    """(dotted key, value) of every float that is a NaN or an infinity."""
    found = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        for i, item in enumerate(value if isinstance(value, tuple) else (value,)):
            place = f"{name}[{i}]" if isinstance(value, tuple) else name
            if dataclasses.is_dataclass(item):
                found += not_finite(item, place + ".")
            elif isinstance(item, float) and not math.isfinite(item):
                found.append((place, item))
    return found


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ConfigError for a file that is too large, unreadable, no UTF-8, no JSON, nested
    too deep, or has a key twice (of which most readers take the last, in silence)."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{path}: has the key {shown(twice)} twice; give it once")
        return found

    def constant(name: str) -> None:
        raise ConfigError(f"{path}: {name} is no JSON, and no setting may be {name}; give a finite number")

    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path}: is longer than {MAX_BYTES >> 20} MiB, which no config is; give another file")
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid JSON ({' '.join(str(error).split())[:160]}); correct it, or restore it "
                          "from a copy") from None
