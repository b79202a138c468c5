"""The first thing wrong with a configuration, in one line for its author."""

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from sparse_gpt.errors import did_you_mean


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first complaint of pydantic as one line, with the nearest name for an unknown key."""
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
        near = did_you_mean(str(name[0]), names)
        what = f"unknown key; {near or 'known here: ' + ', '.join(names)}"
    elif first["type"] == "missing":
        what = "is missing"
    else:
        what = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if not refused:
            what = f"{what[0].lower()}{what[1:]}, got {_shown(first['input'])}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{key}: {what}{more}" if key else f"{what}{more}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:90]}…"


def _path(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[int | str]:
    """The place of an error as its author wrote it: without pydantic's tags of union members."""
    path: list[int | str] = []
    for part in loc:
        names = set(_field_names(root, path))
        if isinstance(part, int) or part in names or _ANY in names:
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
