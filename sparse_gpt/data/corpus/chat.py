"""Chat turns to text, by one plain template: each turn is its role, a colon, a space and its
content as it is, and an empty line lies between turns.

    user: How far is the moon?

    assistant: Some 384,000 km.

A turn is {role, content}, or {from, value} as of ShareGPT, whose "human" and "gpt" are "user" and
"assistant". Content is text, or a list of parts {type: "text", text}, which are joined.
"""

import re
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant"}
_ROLE = re.compile(r"[\w-]+")


def rendered(turns: Any, field: str) -> str:
    """The text of a conversation, which is the value of `field`; of no turns it is empty. Raises
    ValueError that says which turn cannot be rendered, and why."""
    if not isinstance(turns, list):
        kind = type(turns).__name__
        raise ValueError(f"{field!r} is {kind}, must be a list of turns, each {{role, content}}")
    return "\n\n".join(_turn(turn, f"{field!r}: turn {n}") for n, turn in enumerate(turns, 1))


def _turn(turn: Any, place: str) -> str:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} is {type(turn).__name__}, must be {{role, content}}")
    given = {key: value for key, value in turn.items() if value is not None}  # parquet's absent
    names = ("from", "value") if "from" in given and "role" not in given else ("role", "content")
    if missing := [name for name in names if name not in given]:
        keys = ", ".join(given) or "none"
        raise ValueError(f"{place} has no {missing[0]!r}; keys there: {keys}")
    role, content = (given[name] for name in names)
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ValueError(f"{place}: its role is {role!r:.80}, must be one word")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place}: its {names[1]} is {type(content).__name__}, must be a string")
    return f"{_ROLES.get(role, role)}: {content}"


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"{place} has a part of type {kind!r:.80}; only text is rendered")
