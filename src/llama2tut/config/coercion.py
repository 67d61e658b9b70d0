"""Strings of the command line and scalars of YAML -> the types that a request's fields are annotated with."""

import difflib
import math
import os
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from llama2tut.config.yaml_files import plain_values
from llama2tut.errors import UsageError

_SCIENTIFIC = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?e[+-]?[0-9]+", re.IGNORECASE)
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def did_you_mean(word: str, known: Any, dashes: str = "") -> str:
    """` (did you mean X?)` for the nearest of the known words, or an empty string; `dashes` go before it."""
    near = nearest(word, known)
    return f" (did you mean {dashes}{near}?)" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like this one, capitals aside; None where none is like it."""
    folded = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(word.casefold(), folded, n=1)
    return folded[near[0]] if near else None


def coerce(value: Any, annotation: Any, limits: Mapping[str, Any]) -> Any:
    """One value in the type of its field.

    Args:
        value: a string from the command line, or what YAML made of it.
        annotation: the field's type.
        limits: the field's metadata: `least`, `most`, `above`, `auto`.

    Raises:
        ValueError: the value does not fit; the message says what is wanted, as in "wants a whole number".
    """
    if get_origin(annotation) in (Union, types.UnionType):
        if value is None or (value == "auto" and limits.get("auto")):
            return None
        arms = [arm for arm in get_args(annotation) if arm is not type(None)]
        if any(get_origin(arm) is Literal and value in get_args(arm) for arm in arms):
            return value
        annotation = next(arm for arm in arms if len(arms) == 1 or get_origin(arm) is not Literal)
    origin = get_origin(annotation)
    if origin is Literal:
        return _choice(value, get_args(annotation))
    if origin is tuple:
        return _items(value, get_args(annotation)[0])
    if origin is Mapping:
        return _mapping(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("wants a value")
    if annotation is bool:
        return _boolean(value)
    if annotation in (int, float):
        return _number(value, annotation, limits)
    if not isinstance(value, str | Path):
        raise ValueError("wants text")
    if "\0" in str(value) or re.search("[\ud800-\udfff]", str(value)):
        raise ValueError("wants UTF-8 text without NUL bytes")
    return Path(os.path.expanduser(value)) if annotation is Path else value


def _boolean(value: Any) -> bool:
    word = str(value).lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("wants true or false")
    return word in _TRUE


def _number(value: Any, kind: type, limits: Mapping[str, Any]) -> int | float:
    text = str(value).strip()
    # Python itself would also take 1_000, the digits of other scripts, and thousands of digits.
    shape = r"[+-]?[0-9]{1,300}" if kind is int else r"[+-]?([0-9.]+(e[+-]?[0-9]+)?|inf|infinity|nan)"
    try:
        if isinstance(value, bool) or not re.fullmatch(shape, text, re.IGNORECASE | re.ASCII):
            raise ValueError
        number: int | float = kind(text)
    except ValueError:
        raise ValueError("wants a whole number" if kind is int else "wants a number") from None
    least, most, above = limits.get("least"), limits.get("most", 10**18), limits.get("above")
    if not math.isfinite(number):
        raise ValueError("wants a finite number")
    if least is not None and number < least:
        raise ValueError(f"must be at least {least}")
    if above is not None and number <= above:
        raise ValueError(f"must be above {above}")
    if number > most:
        raise ValueError(f"must be at most {most}")
    return number


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    # YAML 1.1 reads a bare on, off and no as booleans; the words are meant.
    word = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    if word not in choices:
        raise ValueError(f"wants one of {', '.join(choices)}{did_you_mean(word, choices)}")
    return word


def _items(value: Any, kind: Any) -> tuple[Any, ...]:
    if isinstance(value, str):  # a repeatable flag names one folder at a time, and that may have a comma in its name
        value = [value] if kind is Path else [part.strip() for part in value.split(",")]
    parts = value
    if not isinstance(parts, list | tuple) or not parts or any(part in ("", None) for part in parts):
        raise ValueError("wants words separated by commas")
    items = tuple(coerce(part, kind, {}) for part in parts)
    if len(set(items)) < len(items):
        raise ValueError("names one thing twice")
    return items


def _mapping(value: Any) -> dict[str, Any]:
    """`a=1,b.c=[x,y]` or a YAML mapping -> {"a": 1, "b.c": ["x", "y"]}; nested sections become dotted names."""
    pairs: dict[str, Any] = {}
    if isinstance(value, Mapping):
        for key, item in value.items():
            pairs |= {f"{key}.{k}": v for k, v in item.items()} if isinstance(item, Mapping) else {str(key): item}
    elif isinstance(value, str) and value.strip():
        for part in re.split(r",(?![^\[]*\])", value):  # a comma inside [...] separates list items, not pairs
            key, equals, text = (word.strip() for word in part.partition("="))
            if not equals or not key:
                raise ValueError(f"wants key=value where it has '{part[:60]}'")
            if key in pairs:
                raise ValueError(f"names {key} twice")
            try:
                pairs[key] = plain_values(text)[0]
            except UsageError:
                raise ValueError(f"wants a plain value for {key}") from None
    else:
        raise ValueError("wants key=value")
    # In YAML 1.1, which the parser follows, 1e-4 is a word.
    return {key: float(item) if isinstance(item, str) and _SCIENTIFIC.fullmatch(item) else item
            for key, item in pairs.items()}
