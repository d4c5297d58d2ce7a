"""What every schema is made of: strict fields, and errors that say where and never repeat input."""

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

MAX_TOKENS = 1_048_576


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def refusal(location: tuple[int | str, ...], detail: str) -> ValidationError:
    """The error for one place below the value that is being validated."""
    error = PydanticCustomError("invalid_field", "{detail}", {"detail": detail})
    # The value itself is left out: errors never repeat input.
    line = InitErrorDetails(type=error, loc=location, input=None)
    return ValidationError.from_exception_data("request", [line])
