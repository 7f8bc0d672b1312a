"""What every section of the settings is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


def _checked_address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65_535:
        raise ValueError("must be host:port")
    return value


Address = Annotated[str, AfterValidator(_checked_address)]


def _checked_json_file(value: Path) -> Path:
    if value.suffix != ".json":
        raise ValueError("must end in .json")
    return value


JsonFile = Annotated[Path, AfterValidator(_checked_json_file)]


class Section(BaseModel):
    """A part of the configuration; it never changes, and knows each of its keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", str_strip_whitespace=True, use_attribute_docstrings=True
    )
