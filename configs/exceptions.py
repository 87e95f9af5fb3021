"""Errors of Coldstream's settings, and the root of all its errors.

ColdstreamError             whatever a user can cause and mend; exit code 2
└── SettingsError
    ├── UnknownProfile      neither a profile's name nor a file
    ├── UnreadableSettings  a file that is no YAML mapping, or that extends itself
    └── InvalidSettings     unknown keys and values outside their type, all of them at once
"""

from __future__ import annotations

from dataclasses import dataclass


class ColdstreamError(Exception):
    """Something the user can mend. The message is one line: what, where, and what to do."""


class SettingsError(ColdstreamError):
    """The settings cannot be used."""


class UnknownProfile(SettingsError):
    """``--config`` or ``extends`` names neither a profile nor a readable file."""


class UnreadableSettings(SettingsError):
    """A settings file is not a YAML mapping of sections."""


@dataclass(frozen=True, slots=True)
class SettingsProblem:
    """One wrong key or value: ``key`` is dotted, ``origin`` says which file and line, variable or flag gave it."""

    key: str
    origin: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.key}: {self.message}"


class InvalidSettings(SettingsError):
    """Unknown keys or values outside their type."""

    def __init__(self, problems: tuple[SettingsProblem, ...]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems
