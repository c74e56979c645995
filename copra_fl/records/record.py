"""Base class of all records: JSON in and out, and errors that name the first bad field."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError


class RecordError(ValueError):
    """JSON that is not valid, or does not follow the schema. The message names the first bad field and the problem."""


class DamagedRecord(RecordError):
    """Text that is not JSON, such as half a line. The message names the problem."""


class Record(BaseModel):
    """A record: immutable, without unknown fields, as one JSON object."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def to_json(self, indent: int | None = None) -> str:
        """Return the record as JSON; a number that is not finite is NaN or Infinity, as Python writes it."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse `to_json`'s output. Raises RecordError for another schema: runs of other versions are not readable."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problems = error.errors()
            field, message = ".".join(map(str, problems[0]["loc"])), problems[0]["msg"]
            if problems[0]["type"] == "json_invalid":
                raise DamagedRecord(f"not valid JSON: {message}") from None
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise RecordError(
                f"not a {cls.__name__} of this version of copra-fl, and results of other versions cannot be read: "
                f"{field or 'the record'}: {message}{more}"
            ) from None
