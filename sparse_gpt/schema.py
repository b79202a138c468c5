"""What is read back from a file has the form in which it was written, or one line says where it
has not."""

from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

T = TypeVar("T")

Natural = Annotated[int, Field(strict=True, ge=0, le=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def checked(form: TypeAdapter[T], value: Any) -> T:
    """`value`, as JSON gave it, in this form. Raises ValueError that names the key."""
    try:
        return form.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
