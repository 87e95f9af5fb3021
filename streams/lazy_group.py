"""A command whose subcommands are imported when they are asked for: `coldstream query` then loads no torch."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from streams.quick_command import QuickCommand, quicken


class LazyGroup(TyperGroup):
    """A group that knows where its subcommands live; what is registered in the usual way stands beside them.

    A subclass names them. Their help needs the modules, so `--help` of the group imports them all.
    """

    places: ClassVar[Mapping[str, str]] = {}
    """Subcommand -> ``module:name`` of its function, or of the Typer application of a group"""
    quick: ClassVar[frozenset[str]] = frozenset()
    """Subcommands that are a ``QuickCommand``"""

    def __init__(self, *, commands: Any = None, **attributes: Any) -> None:
        super().__init__(commands=commands, **attributes)
        self.commands = _OnDemand(self.places, self.quick, self.commands)

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``."""
        return quicken(super().get_help_option(ctx))


class _OnDemand(MutableMapping[str, Any]):
    """Commands by name, those of ``places`` first; each is built once, at its first use."""

    def __init__(self, places: Mapping[str, str], quick: frozenset[str], built: Mapping[str, Any]) -> None:
        self._built: dict[str, Any] = {**dict.fromkeys(places), **built}
        self._places = places
        self._quick = quick

    def __getitem__(self, name: str) -> Any:
        if self._built[name] is None:
            self._built[name] = _command(name, self._places[name], name in self._quick)
        return self._built[name]

    def __contains__(self, name: object) -> bool:
        return name in self._built

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._built)

    def __len__(self) -> int:
        return len(self._built)


def _command(name: str, place: str, quick: bool) -> Any:
    module, _, attribute = place.partition(":")
    found = getattr(_imported_at_once(module) if quick else import_module(module), attribute)
    parent = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    parent.callback()(lambda: None)  # makes it a group, however few commands it has
    if isinstance(found, typer.Typer):
        parent.add_typer(found, name=name)
    else:
        parent.command(name, cls=QuickCommand if quick else TyperCommand)(found)
    group: Any = typer.main.get_command(parent)
    return group.commands[name]


def _imported_at_once(module: str) -> ModuleType:
    """Imports a quick command's module without what makes its start and its end slow, unless numpy is loaded already.

    numpy starts threads for large products of matrices, of which such a command has none. And the collector looks for
    garbage among what an import makes, all of which stays: during the import, and once more at the end of the process.
    """
    if "numpy" in sys.modules:
        return import_module(module)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()
    imported = import_module(module)
    gc.freeze()
    gc.enable()
    return imported
