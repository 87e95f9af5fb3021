"""Errors between us and the brokers. None of their messages holds a secret.

ColdstreamError
└── KafkaProblem            the brokers, or a topic, cannot be used
    ├── SecretMissing       a secret is not where the settings say
    ├── WrongSecurity       files or settings that no connection can be made with
    ├── BrokerUnreachable   no broker answers at any address
    ├── TlsRefused          one side does not trust, or does not speak as, the other
    ├── LoginRefused        a broker does not accept who we say we are
    ├── TokenUnavailable    no token could be fetched now; an OSError too, so that clients try again
    ├── TopicError          topics are missing, or are not as they must be: every problem with what mends it
    └── LetterError         a dead letter cannot be sent, read or replayed
"""

from __future__ import annotations

from configs.exceptions import ColdstreamError


class KafkaProblem(ColdstreamError):
    """The brokers, or a topic, cannot be used. The message names the address or topic, and the next action."""


class SecretMissing(KafkaProblem):
    """A secret is not where the settings say."""


class WrongSecurity(KafkaProblem):
    """Files or settings that no connection can be made with."""


class BrokerUnreachable(KafkaProblem):
    """No broker answers."""


class TlsRefused(KafkaProblem):
    """TLS failed: a certificate is not trusted, is for another name, or one side does not speak TLS."""


class LoginRefused(KafkaProblem):
    """A broker does not accept the user, the password, the token or the mechanism."""


class TokenUnavailable(KafkaProblem, ConnectionError):
    """No token could be fetched now. Clients see an OSError, and try again as when a broker does not answer."""


class TopicError(KafkaProblem):
    """Topics are missing, or are not as they must be."""


class LetterError(KafkaProblem):
    """A dead letter cannot be sent, read or replayed."""
