"""From profiles, files, environment and flags to one validated, frozen ``Settings``.

Layers, later ones win key by key: the built-in defaults < the profile or YAML file (what it ``extends`` first)
< environment variables ``COLDSTREAM__SECTION__KEY`` < flags (dotted keys). Lists are replaced, not joined; so is a
mapping that one variable or flag gives as a whole. An empty mapping in a file changes nothing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from configs.exceptions import InvalidSettings, SettingsProblem, UnknownProfile, UnreadableSettings
from configs.settings import Settings

ENVIRONMENT_PREFIX = "COLDSTREAM__"
DEFAULT_PROFILE = "default"
BUILT_IN = "built-in default"

Tree = dict[str, object]
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """Validated settings, and for every dotted key that was given somewhere, where it came from."""

    settings: Settings
    origins: Mapping[str, str]

    def changed(self) -> dict[str, str]:
        """Origin by dotted key, of the values that differ from the built-in defaults."""
        default = dict(leaves(Settings().model_dump(mode="json")))
        origins = {tuple(name.split(".")): origin for name, origin in self.origins.items()}
        return {
            ".".join(key): _origin_of(key, origins)
            for key, value in leaves(self.settings.model_dump(mode="json"))
            if key not in default or default[key] != value
        }


@dataclass(slots=True)
class _Layer:
    """One source of values: leaf values by key, and the origin of each key."""

    values: dict[Key, object] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)


def profile_names() -> list[str]:
    """The profiles that come with Coldstream."""
    entries = resources.files("configs").iterdir()
    return sorted(e.name.removesuffix(".yaml") for e in entries if e.name.endswith(".yaml"))


def load_settings(
    profile_or_path: str | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of a profile's name or a YAML file's path, with environment and flags on top.

    ``overrides`` maps dotted keys to values; None means that the flag was not given (the text ``null`` sets None).

    Raises:
        UnknownProfile, UnreadableSettings, InvalidSettings: see ``configs.exceptions``.
    """
    return resolve_settings(profile_or_path, overrides, environ).settings


def resolve_settings(
    profile_or_path: str | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ResolvedSettings:
    """As ``load_settings``, and says where each value came from."""
    layers = [
        *_file_layers(profile_or_path or DEFAULT_PROFILE),
        _environment_layer(os.environ if environ is None else environ),
        _flag_layer(overrides or {}),
    ]
    problems = [problem for layer in layers for problem in _unknown_keys(layer)]
    unknown = {problem.key for problem in problems}
    values = dict(leaves(Settings().model_dump()))
    origins: dict[Key, str] = {}
    for layer in layers:
        for key, value in layer.values.items():
            if ".".join(key) not in unknown:
                _replace(values, key, value)
                origins[key] = layer.origins[key]
    try:
        settings = Settings.model_validate(_nested(values))
    except ValidationError as error:
        problems.extend(_problem(details, origins) for details in error.errors())
    if problems:
        raise InvalidSettings(tuple(problems))
    return ResolvedSettings(settings, {".".join(key): origins[key] for key in values if key in origins})


def leaves(tree: Mapping[str, object], path: Key = ()) -> Iterator[tuple[Key, object]]:
    """Every (key path, value) of a nested mapping; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


# Layers


def _file_layers(profile_or_path: str) -> list[_Layer]:
    """The layers of a file and of all it extends, the furthest ancestor first."""
    layers: list[_Layer] = []
    seen: list[str] = []
    name, directory = profile_or_path, Path()
    while name:
        label, text, directory = _read(name, directory)
        if label in seen:
            raise UnreadableSettings(f"{label}: extends itself through {' -> '.join([*seen, label])}; cut the circle")
        seen.append(label)
        layer = _parse(label, text)
        parent = layer.values.pop(("extends",), None)
        if parent is not None and not isinstance(parent, str):
            raise UnreadableSettings(f"{label}: extends must be a profile's name or a path, not {parent!r}")
        layers.insert(0, layer)
        name = parent or ""
    return layers


def _read(name: str, directory: Path) -> tuple[str, str, Path]:
    """(label for messages, YAML text, directory that its own ``extends`` is relative to)."""
    if name in profile_names():
        resource = resources.files("configs").joinpath(f"{name}.yaml")
        return f"profile {name}", resource.read_text("utf-8"), Path()
    path = directory / name
    try:
        return str(path), path.read_text("utf-8"), path.parent
    except FileNotFoundError:
        close = difflib.get_close_matches(name, profile_names(), n=1)
        hint = f" (nearest: {close[0]})" if close else ""
        raise UnknownProfile(
            f"no profile and no file is named {name!r}{hint}; profiles: {', '.join(profile_names())}; "
            "or give the path of a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableSettings(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _parse(label: str, text: str) -> _Layer:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        layer = _Layer()
        if isinstance(node, yaml.MappingNode):
            _collect(loader, node, label, (), layer)
        elif node is not None:
            raise UnreadableSettings(f"{label}: must be a mapping of sections such as `data:` and `learner:`")
        return layer
    except yaml.YAMLError as error:
        raise UnreadableSettings(f"{label}: not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _collect(loader: yaml.SafeLoader, node: yaml.MappingNode, label: str, path: Key, layer: _Layer) -> None:
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = (*path, str(loader.construct_object(key_node)))
        origin = f"{label}:{key_node.start_mark.line + 1}"
        if key in layer.origins:
            raise UnreadableSettings(f"{origin}: {'.'.join(key)} is given twice; keep one of them")
        layer.origins[key] = origin
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            _collect(loader, value_node, label, key, layer)
        else:
            layer.values[key] = loader.construct_object(value_node, deep=True)


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for name in sorted(environ):
        if name.upper().startswith(ENVIRONMENT_PREFIX):
            key = tuple(name[len(ENVIRONMENT_PREFIX) :].lower().split("__"))
            layer.values[key] = _from_text(environ[name], f"environment variable {name}")
            layer.origins[key] = f"environment variable {name}"
    return layer


def _flag_layer(overrides: Mapping[str, object]) -> _Layer:
    layer = _Layer()
    for name, value in overrides.items():
        if value is not None:
            key = tuple(name.split("."))
            layer.values[key] = _from_text(value, f"flag {name}") if isinstance(value, str) else value
            layer.origins[key] = f"flag {name}"
    return layer


def _from_text(text: str, origin: str) -> object:
    """Text as it stands, but ``null`` is None, and ``[…]`` or ``{…}`` is read as YAML."""
    if text.strip() == "null":
        return None
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UnreadableSettings(f"{origin}: not a YAML list or mapping: {' '.join(str(error).split())}") from error


# Merging and checking


def _replace(values: dict[Key, object], key: Key, value: object) -> None:
    """Sets a leaf; what stood below or above it goes."""
    for other in [k for k in values if k[: len(key)] == key or key[: len(k)] == k]:
        if other != key and not (value == {} and other[: len(key)] == key):
            del values[other]
    values[key] = value


def _nested(values: Mapping[Key, object]) -> Tree:
    tree: Tree = {}
    for key, value in values.items():
        branch = tree
        for part in key[:-1]:
            deeper = branch.setdefault(part, {})
            assert isinstance(deeper, dict)
            branch = deeper
        branch.setdefault(key[-1], value)
    return tree


def _unknown_keys(layer: _Layer) -> Iterator[SettingsProblem]:
    for key, value in layer.values.items():
        inner = [key + k for k, _ in leaves(value)] if isinstance(value, dict) and value else [key]
        for full in inner:
            message = _unknown(full)
            if message:
                yield SettingsProblem(".".join(key), layer.origins[key], message)
                break


def _unknown(key: Key) -> str | None:
    """Why a key is unknown, with the nearest known one; None if it is known."""
    model: type[BaseModel] = Settings
    for depth, part in enumerate(key):
        if part not in model.model_fields:
            known = _nearest(key[: depth + 1], list(model.model_fields))
            return f"unknown key{known}; known{_under(key[:depth])}: {', '.join(model.model_fields)}"
        section, named = _section(model.model_fields[part].annotation)
        rest = key[depth + 1 :]
        if section is None or not rest:
            return f"has no keys below it, but {'.'.join(rest)} was given" if rest else None
        model = section
        if named:
            return _unknown_below(section, rest[1:], key[: depth + 2])
    return None


def _unknown_below(section: type[BaseModel], rest: Key, path: Key) -> str | None:
    if rest and rest[0] not in section.model_fields:
        known = _nearest((*path, rest[0]), list(section.model_fields))
        return f"unknown key{known}; known{_under(path)}: {', '.join(section.model_fields)}"
    return None


def _under(path: Key) -> str:
    return f" under {'.'.join(path)}" if path else ""


def _nearest(key: Key, siblings: list[str]) -> str:
    close = difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.5)
    if close:
        return f", did you mean {'.'.join((*key[:-1], close[0]))}?"
    everywhere = {k[-1]: k for k in reversed(list(_known_keys(Settings)))}
    close = difflib.get_close_matches(key[-1], list(everywhere), n=1, cutoff=0.8)
    return f", did you mean {'.'.join(everywhere[close[0]])}?" if close else ""


def _known_keys(model: type[BaseModel], path: Key = ()) -> Iterator[Key]:
    for name, info in model.model_fields.items():
        yield (*path, name)
        section, named = _section(info.annotation)
        if section is not None and not named:
            yield from _known_keys(section, (*path, name))


def _section(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """(the section that a field holds, whether it holds one for each name)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    named = get_origin(annotation) is dict
    for argument in get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument, named
    return None, False


def _problem(details: Mapping[str, object], origins: Mapping[Key, str]) -> SettingsProblem:
    location = details["loc"]
    assert isinstance(location, tuple)
    key = tuple(str(part) for part in location)
    message = str(details["msg"]).removeprefix("Value error, ")
    given = details.get("input")
    if details["type"] == "missing":
        message = "is required and missing"
    elif not isinstance(given, (dict, BaseModel)):
        message = f"{message}, given {given!r}"
    return SettingsProblem(".".join(key) or "settings", _origin_of(key, origins), message)


def _origin_of(key: Key, origins: Mapping[Key, str]) -> str:
    """The origin of a key, else of the nearest key above it, else of the first below it."""
    for depth in range(len(key), 0, -1):
        if key[:depth] in origins:
            return origins[key[:depth]]
    return next((origin for k, origin in reversed(list(origins.items())) if k[: len(key)] == key), BUILT_IN)
