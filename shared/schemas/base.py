"""What every wire body has in common."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, JsonValue

ItemT = TypeVar("ItemT")


class _FailFast(FailFast):
    """Pydantic's own cannot be part of a union in Python 3.11, which asks for hashes."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


Checked = Annotated[list[ItemT], _FailFast()]
"""A list of a request. Ends at the first item that is wrong: an account of each of a million would
take hundreds of times the memory of the body."""


class WireModel(BaseModel):
    """A request or response body: unknown fields are an error, so that typos never pass."""

    model_config = ConfigDict(
        extra="forbid",
        use_enum_values=False,
        ser_json_inf_nan="null",
        # Messages of a ValidationError that ends up in a log must not quote prompts.
        hide_input_in_errors=True,
        # What is written under a field describes it in /openapi.json too.
        use_attribute_docstrings=True,
    )


class ErrorBody(WireModel):
    """``error`` of an error answer."""

    code: str
    type: str
    message: str
    param: str | None = None


class ErrorResponse(WireModel):
    """Every answer with a status of 400 or above."""

    error: ErrorBody


JsonObject = dict[str, JsonValue]
"""A JSON object whose shape is the caller's own business (metadata, reward parameters)."""
