"""Change fields of a config dataclass from ``key=value`` strings, by the types of its annotations."""

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from poise.core.lab.catalogs import nearest
from poise.core.lab.errors import BadInput

Config = TypeVar("Config")

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def override(config: Config, assignments: list[str]) -> Config:
    """Return ``config`` with each ``key=value`` applied.

    Raises:
        BadInput: an assignment without ``=``, an unknown key, a value of the wrong type, or one that the config itself refuses.
    """
    hints = get_type_hints(type(config))
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    changes = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise BadInput(f"--set expects key=value, got {assignment!r}")
        if key not in fields:
            raise BadInput(f"--set {key}: this preset has no such setting{nearest(key, fields)}")
        try:
            changes[key] = _convert(text, hints[key])
        except ValueError:
            raise BadInput(f"--set {key}: expected {_describe(hints[key])}, got {text!r}") from None
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        raise BadInput(f"--set: {error}") from error


def as_json(config: Any) -> dict[str, Any]:
    """The config as JSON values."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _convert(text: str, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(text, arguments)
    if origin is Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise ValueError(text)
    if origin is tuple:
        items = [item for item in text.strip("()[]").split(",") if item.strip()]
        kinds = [arguments[0]] * len(items) if arguments[1:] == (Ellipsis,) else list(arguments)
        if len(kinds) != len(items):
            raise ValueError(text)
        return tuple(_convert(item.strip(), kind) for item, kind in zip(items, kinds, strict=True))
    if hint is bool:
        if text.lower() not in _TRUTH:
            raise ValueError(text)
        return _TRUTH[text.lower()]
    if hint in (int, float, str, Path):
        return hint(text)
    raise ValueError(text)


def _convert_union(text: str, choices: tuple[Any, ...]) -> Any:
    if text.lower() == "none" and type(None) in choices:
        return None
    for choice in (choice for choice in choices if choice is not type(None)):
        try:
            return _convert(text, choice)
        except ValueError:
            continue
    raise ValueError(text)


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is tuple:
        return "values separated by commas"
    if hint is type(None):
        return "none"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}.get(
        hint, str(hint)
    )
