"""Protobuf message classes from descriptors: those of a registered schema, or those of a file that protoc wrote."""

from __future__ import annotations

import base64
import difflib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from streams.decoding.exceptions import MissingExtra, UnusableDescriptors
from streams.decoding.registry import RegisteredSchema

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError:
    descriptor_pb2 = None

WELL_KNOWN = ("any", "duration", "empty", "field_mask", "struct", "timestamp", "wrappers")
"""Files under google/protobuf/ that every schema may import without saying where they are."""


class UnusableTypes(Exception):
    """Descriptors that give no message class; the message says why."""


def require_protobuf() -> None:
    """Raises MissingExtra where the library is not installed."""
    if descriptor_pb2 is None:
        raise MissingExtra("protobuf")


def registered_message(schema: RegisteredSchema, indices: tuple[int, ...]) -> Any:
    """The class of a message of a schema's file: by its place, one index for each level of nesting.

    Raises:
        UnusableTypes: the schema is no file of Protobuf, or imports what nobody gave.
        LookupError: the file has no message there.
    """
    files: dict[str, Any] = {}
    main = _collect(schema, "registered.proto", files)
    pool = _pool(files.values())
    messages = _found(pool, main).message_types_by_name.values()
    for index in indices:
        descriptor = list(messages)[index]
        messages = descriptor.nested_types
    return message_factory.GetMessageClass(descriptor)


def described_message(path: Path, name: str) -> Any:
    """The class of a message by its full name, from a FileDescriptorSet. Raises UnusableDescriptors."""
    try:
        files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    except OSError as error:
        raise UnusableDescriptors(f"stream.protobuf_descriptors: {path}: {error.strerror}") from None
    except Exception as error:  # google.protobuf.message.DecodeError, where the library is installed
        raise UnusableDescriptors(f"stream.protobuf_descriptors: {path} is no FileDescriptorSet: {error}") from None
    try:
        pool = _pool(files)
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
    except UnusableTypes as error:
        hint = "write it with protoc --include_imports --descriptor_set_out"
        raise UnusableDescriptors(f"stream.protobuf_descriptors: {path}: {error}; {hint}") from None
    except KeyError:
        names = [f"{file.package}.{m.name}".lstrip(".") for file in files for m in file.message_type]
        close = difflib.get_close_matches(name, names, 1) or names[:5]
        raise UnusableDescriptors(
            f"stream.protobuf_message: {path} has no message {name!r}; it has {', '.join(close) or 'none'}"
        ) from None


def _collect(schema: RegisteredSchema, name: str, files: dict[str, Any]) -> str:
    """Enters a schema's file and all that it refers to, by name; what is imported comes first."""
    if schema.kind != "PROTOBUF":
        raise UnusableTypes(f"it is of type {schema.kind}, not PROTOBUF (stream.format)")
    for other_name, other in schema.references:
        if other_name not in files:
            _collect(other, other_name, files)
    try:
        file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(schema.text, validate=True))
    except Exception as error:  # binascii.Error, or the library's DecodeError
        raise UnusableTypes(f"the registry gives no descriptor of {name}: {error}") from None
    file.name = name
    files[name] = file
    return name


def _pool(files: Iterable[Any]) -> Any:
    """A pool of its own for these files and the well-known ones: two schemas may define one name apart."""
    pool = descriptor_pool.DescriptorPool()
    waiting = {file.name: file for file in files}
    for name in WELL_KNOWN:
        if f"google/protobuf/{name}.proto" not in waiting:
            pool.AddSerializedFile(import_module(f"google.protobuf.{name}_pb2").DESCRIPTOR.serialized_pb)
    while waiting:
        ready = [file for file in waiting.values() if not any(name in waiting for name in file.dependency)]
        if not ready:
            raise UnusableTypes(f"{', '.join(waiting)} import each other")
        for file in ready:
            _add(pool, file)
            del waiting[file.name]
    return pool


def _add(pool: Any, file: Any) -> None:
    try:
        pool.Add(file)
    except TypeError as error:  # the library's only word for anything wrong with a descriptor
        raise UnusableTypes(str(error)) from None


def _found(pool: Any, name: str) -> Any:
    try:
        return pool.FindFileByName(name)
    except KeyError as error:
        raise UnusableTypes(str(error)) from None
