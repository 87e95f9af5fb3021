"""A command that starts at once: typer converts what was typed by pydantic, and loading that takes 50 ms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand


class QuickCommand(TyperCommand):
    """Converts text, paths, whole numbers, flags and lists of text itself. Anything else is converted by typer."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        for parameter in self.params:
            quicken(parameter)

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``."""
        return quicken(super().get_help_option(ctx))


def quicken(parameter: Any) -> Any:
    """The parameter itself, which from now on converts without pydantic what it can."""
    convert = _CONVERSIONS.get(_annotation(parameter))
    if convert is not None and "process_value" not in vars(parameter):
        _replace_conversion(parameter, convert)
    return parameter


def _annotation(parameter: Any) -> Any:
    """What type the parameter was declared with; None in versions of typer that convert without pydantic."""
    return getattr(getattr(parameter, "type_descriptor", None), "annotation", None)


def _replace_conversion(parameter: Any, convert: Callable[[Any, Any], Any]) -> None:
    by_typer = parameter.process_value

    def process_value(context: Any, value: Any) -> Any:
        if value is None and parameter.required:
            return by_typer(context, value)  # which says what is missing
        nothing = () if parameter.multiple else None
        converted = nothing if value is None else convert(value, parameter)
        return converted if parameter.callback is None else parameter.callback(context, parameter, converted)

    parameter.process_value = process_value


def _whole_number(value: Any, parameter: Any) -> int:
    least = parameter.type_descriptor.parameter_info.min
    try:
        number = int(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is not a whole number.", param=parameter) from error
    if least is not None and number < least:
        raise typer.BadParameter(f"{number} is below {least}.", param=parameter)
    return number


_CONVERSIONS: dict[Any, Callable[[Any, Any], Any]] = {
    bool: lambda value, _: bool(value),
    str: lambda value, _: str(value),
    Path: lambda value, _: Path(value),
    int: _whole_number,
    list[str]: lambda value, _: list(value),
    tuple[str, str]: lambda value, _: tuple(value),
}
