"""Errors of decoding that are not the fault of a record.

ColdstreamError
└── DecodingError               records of this format cannot be decoded as the settings are
    ├── MissingExtra            a library that the format needs is not installed
    ├── UnusableDescriptors     the file of Protobuf descriptors, or the message named in it
    └── RegistryUnavailable     the schema registry gives no answer now: the same records may be tried again
"""

from __future__ import annotations

from configs.exceptions import ColdstreamError


class DecodingError(ColdstreamError):
    """Records cannot be decoded as the settings are."""


class MissingExtra(DecodingError):
    """A library that the format needs is not installed."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stream.format {name} needs a library: pip install 'coldstream[{name}]'")


class UnusableDescriptors(DecodingError):
    """The file of Protobuf descriptors cannot be used."""


class RegistryUnavailable(DecodingError):
    """The schema registry gives no answer now. No record is to blame."""
