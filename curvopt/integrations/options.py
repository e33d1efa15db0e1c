"""Optimizer arguments given as strings, on command lines, in environment files or YAML, converted to their types.

.. code-block:: python

    parse_options("lr=1e-3, betas=0.9,0.99, update=polar, rank_threshold=None", GritKFAC)
    # {"lr": 0.001, "betas": (0.9, 0.99), "update": "polar", "rank_threshold": None}
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from typing_extensions import Unpack

_TRUE, _FALSE, _NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null", "")
_WORDS = {float: "a number", int: "an integer", bool: "True or False", str: "a word", type(None): "None"}


def parse_options(
    options: str | Iterable[str] | Mapping[str, Any], optimizer: Callable[..., Any], *, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Convert option strings to the types of an optimizer's arguments.

    Args:
        options: ``"name=value,name=value"`` (a value may contain commas), such strings in a list, or a mapping. Values
            of a mapping that are not strings are used as they are, lists and other sequences as tuples.
        optimizer: The class or function whose signature and annotations define the arguments.
        ignore: Names to leave out, whatever their value.

    Returns:
        {argument: value}, to be passed as keywords. Ranges are checked by the optimizer.

    Raises:
        ValueError: No ``=``, an unknown argument, one that cannot be given as a string (a module, a function), or a
            value of the wrong kind; the message names the argument, its value and what is allowed.
    """
    kinds = _kinds(optimizer)
    found: dict[str, Any] = {}
    for name, value in _entries(options):
        if name in ignore:
            continue
        if name not in kinds and not _takes_anything(optimizer):
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            title = getattr(optimizer, "__name__", type(optimizer).__name__)
            raise ValueError(f"{name} must be an argument of {title} ({', '.join(kinds)}), got {value!r}{hint}")
        found[name] = parse_value(name, value, kinds.get(name, Any))
    return found


def parse_value(name: str, value: Any, kind: Any) -> Any:
    """Convert one string to the type that an annotation names.

    Args:
        name: The argument, for the message.
        value: The string; anything else is returned as it is, lists and other sequences as tuples.
        kind: An annotation: ``float``, ``int``, ``bool``, ``str``, ``None``, a ``Literal``, a tuple of these, or a
            union; parts of a union that cannot be given as a string are ignored.

    Raises:
        ValueError: The string is not an allowed value.
    """
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, Sequence) else value
    text = value.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    members = _members(kind)
    for member in sorted(members, key=_order):
        try:
            return _convert(text, member)
        except ValueError:
            continue
    allowed = [word for member in members if (word := _describe(member))]
    if not allowed:
        raise ValueError(f"{name} cannot be given as a string, got {value!r}")
    raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")


def _entries(options: str | Iterable[str] | Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """(name, value) of every option."""
    if isinstance(options, Mapping):
        return list(options.items())
    parts = [options] if isinstance(options, str) else list(options)
    entries = []
    for part in parts:
        for entry in re.split(r",\s*(?=[A-Za-z_]\w*\s*=)", part.strip().rstrip(",")) if part.strip() else ():
            name, equals, value = entry.partition("=")
            if not equals:
                raise ValueError(f"an option must be name=value, got {entry!r}")
            entries.append((name.strip().lstrip("-"), value))
    return entries


def _kinds(optimizer: Callable[..., Any]) -> dict[str, Any]:
    """{argument: annotation} of everything that can be given by keyword, but the parameters and the model."""
    hints = _hints(optimizer)
    kinds: dict[str, Any] = {}
    for name, parameter in inspect.signature(optimizer).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and (further := _keywords(hints.get(name))) is not None:
            kinds |= further
        if name in ("params", "model") or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        guess = Any if parameter.default in (parameter.empty, None) else type(parameter.default)
        kinds[name] = hints.get(name, guess)
    return kinds


def _hints(optimizer: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a class's constructor or of a function, where they can be evaluated."""
    function = optimizer.__init__ if isinstance(optimizer, type) else optimizer  # type: ignore[misc]
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _keywords(annotation: Any) -> dict[str, Any] | None:
    """{keyword: annotation} of ``**kwargs: Unpack[SomeTypedDict]``; None where the keywords are not listed."""
    if get_origin(annotation) not in (Unpack, getattr(typing, "Unpack", Unpack)):  # two objects on some versions
        return None
    return typing.get_type_hints(get_args(annotation)[0])


def _takes_anything(optimizer: Callable[..., Any]) -> bool:
    """Whether there is a ``**kwargs`` whose keywords nothing lists."""
    open_ended = [p for p in inspect.signature(optimizer).parameters.values() if p.kind is p.VAR_KEYWORD]
    return any(_keywords(_hints(optimizer).get(p.name)) is None for p in open_ended)


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for part in get_args(kind) for inner in _members(part)]
    return [type(None) if kind is None else kind]


def _order(member: Any) -> int:
    """None and the narrow types are tried first, words last."""
    known = (type(None), bool, int, float)
    if member in known:
        return known.index(member)
    return 9 if member in (str, Any) else 5


def _convert(text: str, member: Any) -> Any:
    """Turn a text into one type, or raise a ValueError."""
    lower = text.lower()
    if member is type(None) and lower in _NONE:
        return None
    if member is bool and lower in _TRUE + _FALSE:
        return lower in _TRUE
    if member is int:
        number = float(text)  # "1e3" is a whole number too
        if number.is_integer():
            return int(number)
    if member is float and math.isfinite(number := float(text)):
        return number
    if member is str and text:
        return text
    if member is Any:
        return _guess(text)
    if get_origin(member) is Literal:
        for choice in get_args(member):
            if text == str(choice):
                return choice
    if (members := _several(member)) is not None:
        return _convert_tuple(text, members)
    raise ValueError(text)


def _several(member: Any) -> tuple[Any, ...] | None:
    """What a tuple or sequence holds, a sequence as (kind, ...); None for anything else."""
    origin, inner = get_origin(member), get_args(member)
    if origin is tuple:
        return inner
    return (*inner, Ellipsis) if origin in (list, Sequence, Iterable, Collection) else None


def _convert_tuple(text: str, members: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    if len(members) == 2 and members[1] is Ellipsis:
        members = members[:1] * len(parts)
    if len(parts) != len(members):
        raise ValueError(text)
    return tuple(parse_value("", part, member) for part, member in zip(parts, members, strict=True))


def _guess(text: str) -> Any:
    """What a text most likely means where no annotation says it: as Python reads it, else the text."""
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _describe(member: Any) -> str:
    """What is allowed, in words; empty if no string can say it."""
    if member in _WORDS:
        return _WORDS[member]
    if get_origin(member) is Literal:
        return " or ".join(map(repr, get_args(member)))
    if (inner := _several(member)) is not None:
        many = len(inner) == 2 and inner[1] is Ellipsis
        number = "" if many else f"{len(inner)} "
        return f"{number}{_describe(inner[0]).removeprefix('a ').removeprefix('an ')}s, separated by commas"
    return ""
