"""The first thing wrong with a configuration, in one line for its author."""

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from sparse_gpt.errors import did_you_mean

_OF_KEYS = ("extra_forbidden", "missing")  # complaints about a key, of which the last part is it


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first complaint of pydantic as one line, with the nearest name for an unknown key, or the
    section that it belongs to, and the keys of the other complaints."""
    errors = error.errors(include_url=False)
    first = errors[0]
    section, name = _path(root, first["loc"][:-1]), first["loc"][-1:]
    refused = first["type"] in ("value_error", "assertion_error")
    if refused:  # also of a whole section, whose tag is then the last
        section, name = _path(root, first["loc"]), ()
    key = ".".join(map(str, (*section, *name)))
    if first["type"] == "extra_forbidden":
        # Of the other kind of a section that has kinds it may be a key, but not of this one.
        names = sorted(set(_field_names(root, section)) - {str(name[0])})
        elsewhere = [] if str(name[0]) in names else list(_places(root, str(name[0])))
        near = did_you_mean(elsewhere[0], elsewhere) if elsewhere else ""
        near = near or did_you_mean(str(name[0]), names)
        what = f"unknown key; {near or 'known here: ' + ', '.join(names)}"
    elif first["type"] == "missing":
        what = "is missing"
    else:
        what = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if not refused:
            what = f"{what[0].lower()}{what[1:]}, got {_shown(first['input'])}"
    others = dict.fromkeys(
        ".".join(map(str, _path(root, e["loc"], e["type"] in _OF_KEYS))) for e in errors[1:]
    )
    more = f" (also wrong: {', '.join(name for name in others if name and name != key)})"
    more = more if any(name and name != key for name in others) else ""
    return f"{key}: {what}{more}" if key else f"{what}{more}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:90]}…"


def _places(root: type[BaseModel], key: str) -> Iterator[str]:
    """The keys of sections of a run that are called so: `optimizer.lr` for `lr`."""
    for section in root.model_fields:
        if key in _field_names(root, [section]):
            yield f"{section}.{key}"


def _path(
    root: type[BaseModel], loc: tuple[int | str, ...], with_last: bool = False
) -> list[int | str]:
    """The place of an error as its author wrote it: without pydantic's tags of union members. The
    last part is kept where it is asked for, a key or not."""
    path: list[int | str] = []
    for number, part in enumerate(loc, 1):
        names = set(_field_names(root, path))
        last = with_last and number == len(loc)
        if last or isinstance(part, int) or part in names or _ANY in names:
            path.append(part)
    return path


def _field_names(model: Any, section: Sequence[int | str]) -> Iterator[str]:
    """Names of the keys that may stand in `section`, a path below `model`; _ANY in a mapping."""
    for branch in _models(model):
        if typing.get_origin(branch) is dict:
            if not section:
                yield _ANY
            else:
                yield from _field_names(typing.get_args(branch)[1], section[1:])
        elif not section:
            yield from branch.model_fields
        elif section[0] in branch.model_fields:
            annotation = branch.model_fields[str(section[0])].annotation
            yield from _field_names(annotation, section[1:])


_ANY = "*"


def _models(annotation: Any) -> list[Any]:
    """The models and mappings among what an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is dict:
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [model for arg in typing.get_args(annotation) for model in _models(arg)]
    return []
