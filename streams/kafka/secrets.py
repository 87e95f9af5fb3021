"""Secrets: read from their place, and kept out of every repr, message and log line."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from configs.settings import SecretRule
from streams.kafka.exceptions import SecretMissing

MOST_BYTES = 65_536
"""No password or token is longer: a file that is, is another file."""
HIDDEN = "(hidden)"
CHATTY_LOGGERS = ("aiokafka.conn", "kafka.net.connection", "kafka.protocol.parser")
"""They log every request at level DEBUG, as text or as bytes, and a login is a request."""
LOGIN_REQUESTS = ("SaslAuthenticate", "SaslBytes")
"""How the names of the requests' classes begin that carry passwords, proofs and tokens"""


class Secret(str):
    """Text that shows as ``(hidden)`` wherever it is printed, formatted or logged.

    Its characters are those of the secret, so that clients can encode and join it; ``reveal`` gives them as plain text.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return HIDDEN

    def __str__(self) -> str:
        return HIDDEN

    def __format__(self, form: str) -> str:
        return HIDDEN

    def reveal(self) -> str:
        """The secret, for the one who must send it."""
        return "".join(self)


def read_secret(rule: SecretRule, setting: str) -> Secret:
    """What is at the rule's place, without its last line end.

    Args:
        rule: the place, which must be given.
        setting: the rule's dotted key, for messages.

    Raises:
        SecretMissing: nothing is there, or what is there is no secret.
    """
    if rule.file is not None:
        text, place = _content(rule.file, setting), f"the file {rule.file}"
    elif rule.env is not None:
        text, place = os.environ.get(rule.env, ""), f"the environment variable {rule.env}"
    else:
        raise SecretMissing(f"{setting}: neither file nor env says where the secret is; give one of them")
    if not text:
        raise SecretMissing(f"{setting}: {place} is empty or not set; put the secret there")
    if not text.isprintable():
        raise SecretMissing(f"{setting}: {place} holds more than one line, or a control character; it must hold one")
    return Secret(text)


def place_of(rule: SecretRule) -> str:
    """Where a secret is, in words for messages."""
    return f"the file {rule.file}" if rule.file is not None else f"the environment variable {rule.env}"


def _content(path: Path, setting: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise SecretMissing(f"{setting}: {path} is larger than {MOST_BYTES:,} bytes: it is no secret")
        text = content.decode()
    except OSError as error:
        raise SecretMissing(f"{setting}: {path}: {error.strerror}; check the path and its rights") from None
    except UnicodeDecodeError:
        raise SecretMissing(f"{setting}: {path} is not UTF-8 text") from None
    return text.removesuffix("\n").removesuffix("\r")


class _HideLogins(logging.Filter):
    """Shows a login as the name of its request, and raw bytes as how many they are. Drops no line."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_shown(argument) for argument in record.args)
        return True


def _shown(argument: object) -> object:
    if isinstance(argument, (bytes, bytearray, memoryview)):
        return f"{len(argument)} bytes"
    name = type(argument).__name__
    return f"{name}{HIDDEN}" if name.startswith(LOGIN_REQUESTS) else argument


_FILTER = _HideLogins()


def hide_logins_in_logs() -> None:
    """Keeps the clients' own debug logs free of what they log in with. Doing it again changes nothing."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
