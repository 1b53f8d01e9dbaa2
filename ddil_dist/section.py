"""What every section of the configuration is built from: the immutable base, and ranges of numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Precision = Literal["float32", "float16", "bfloat16"]
Positive = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

LabelSelector = dict[str, str]
"""Ray's label selector: label to value, or to "!value", "in(a, b)", "!in(a, b)"; nodes get theirs by `ray start
--labels`."""

UnquotedNo = BeforeValidator(lambda value: "no" if value is False else value)
"""Lets a value be written as a bare `no`, which YAML reads as false."""


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
