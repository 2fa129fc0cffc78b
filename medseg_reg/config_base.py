"""What every group of settings has in common: closed, typed, never changed."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Closed(BaseModel):
    """A group of settings that refuses unknown keys and never changes."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # a layer's own parameters may be infinite
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # To Python, true is the number 1, so `epochs: yes` would train for one epoch.
        field = cls.model_fields[info.field_name or ""]
        kinds = (field.annotation, *get_args(field.annotation))
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("a switch is no number or text")
        return value
