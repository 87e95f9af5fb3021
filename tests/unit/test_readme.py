"""What the README shows is true: its settings load, its commands exist, and the marked blocks run as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from configs.loading import load_settings
from streams.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md"]
BLOCK = re.compile(r"(<!-- run -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language: str) -> list[tuple[bool, str]]:
    found = [m for page in PAGES for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [(bool(m[1]), m[3]) for m in found if m[2] == language]


def commands(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def shown_commands() -> list[list[str]]:
    lines = [c for _, text in blocks("console") for c in commands(text)]
    return [shlex.split(line) for line in lines if line.startswith("coldstream ")]


def test_every_shown_command_and_option_exists():
    group = typer.main.get_command(app)
    shown = shown_commands()
    assert shown
    for _, *words in shown:
        command = group
        while words and hasattr(command, "commands") and words[0] != "--help":
            assert words[0] in command.commands, words
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        used = {word.split("=")[0] for word in words if word.startswith("-")}
        assert used <= known, f"{command.name}: {sorted(used - known)}"


def test_every_shown_setting_is_valid(tmp_path):
    shown = blocks("yaml")
    assert shown
    for k, (_, text) in enumerate(shown):
        path = tmp_path / f"{k}.yaml"
        path.write_text(text)
        assert yaml.safe_load(text)
        load_settings(str(path))


def test_make_targets_that_are_shown_exist():
    text = "".join(text for _, text in blocks("console"))
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\$ make (\w+)", text, re.MULTILINE))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.skipif(sys.platform == "win32", reason="the shown commands are a shell's")
def test_marked_blocks_run_and_print_what_is_shown(tmp_path):
    """In order, in one directory; files that a block shows as ``yaml`` after its name are written first."""
    script = tmp_path / "coldstream"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m streams.cli "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for page in PAGES:
        for match in re.finditer(r"`(\S+\.yaml)`:\n\n```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            (tmp_path / match[1]).write_text(match[2])
    marked = [text for run, text in blocks("console") if run]
    assert marked
    for text in marked:
        expected = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("$ ")]
        printed = ""
        for command in commands(text):
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            printed += done.stdout
        for line in expected:
            pattern = ".*".join(re.escape(part) for part in line.split("…"))
            assert re.search(pattern, printed), f"not printed: {line}\n{printed}"
