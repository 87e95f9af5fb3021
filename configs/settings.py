"""Typed settings, validated once at start into frozen objects.

Precedence: YAML profile < environment (``COLDSTREAM__SECTION__KEY``) < command-line flags.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

HISTORY_CHUNK = 32
"""Events; ``state.history_codec`` writes histories in chunks of so many"""


class Section(BaseModel):
    """Base of every section: frozen, an unknown key is an error, and so is NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class SecretRule(Section):
    """Where a secret is: a file's content without its last line end, or an environment variable's. Never the secret."""

    file: Path | None = None
    env: str | None = None

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self.file is not None or self.env is not None

    @model_validator(mode="after")
    def _one_place(self) -> SecretRule:
        if self.file is not None and self.env is not None:
            raise ValueError("takes file or env, not both")
        return self


class IdRule(Section):
    """Where an id is read from, and a prefix that keeps ids of several sources apart."""

    field: str
    prefix: str = ""


class LabelRule(Section):
    """How the 0/1 label follows from a field: exactly one rule, or none for a field that is 0/1 already."""

    field: str
    at_least: float | None = None
    at_most: float | None = None
    equals: str | None = None

    @field_validator("equals", mode="before")
    @classmethod
    def _yaml_truth(cls, value: object) -> object:
        return str(value).lower() if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_rule(self) -> LabelRule:
        given = [name for name in ("at_least", "at_most", "equals") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"takes one rule, but {' and '.join(given)} are given; set the others to null")
        return self


class ValueRule(Section):
    """The graded value beside the label. ``optional`` accepts files without that field."""

    field: str
    optional: bool = False


class TimeRule(Section):
    """The event time. ``iso`` reads ISO 8601 text; without a zone it is UTC.

    A Parquet timestamp or date column carries its own unit, whatever ``unit`` says.
    """

    field: str
    unit: Literal["s", "ms", "us", "ns", "iso"] = "s"


class FeatureRule(Section):
    """One feature column; ``field`` is the feature's name unless it is given."""

    kind: Literal["categorical", "multi", "numeric"] = "categorical"
    field: str | None = None
    separator: str = "|"


class EventSchema(Section):
    """Maps a source's own fields onto an interaction."""

    user_id: IdRule = IdRule(field="user_id")
    item_id: IdRule = IdRule(field="item_id")
    label: LabelRule = LabelRule(field="label")
    value: ValueRule | None = None
    event_time: TimeRule = TimeRule(field="event_time_ms", unit="ms")
    event_id: IdRule | None = None
    """What names an event: on a topic, one that comes again within ``stream.duplicate_window`` offsets is dropped."""
    user_features: dict[str, FeatureRule] = Field(default_factory=dict)
    item_features: dict[str, FeatureRule] = Field(default_factory=dict)


SourceFormat = Literal["auto", "movielens", "delimited", "jsonl", "parquet"]


class FileFormat(Section):
    """How a file is laid out. ``auto`` looks at names and suffixes."""

    format: SourceFormat = "auto"
    delimiter: str = ","
    header: bool | None = None
    """Whether the first line of a delimited file holds column names; None: yes, unless ``columns`` names them."""
    columns: tuple[str, ...] | None = None
    """Column names of a delimited file; with ``header: true`` they replace those of the first line."""
    encoding: str = "utf-8"

    @field_validator("delimiter")
    @classmethod
    def _usable_delimiter(cls, delimiter: str) -> str:
        delimiter = delimiter.replace("\\t", "\t")
        if not delimiter or any(c in delimiter for c in '\r\n"'):
            raise ValueError("a delimiter is one or more characters without quotes and line ends")
        return delimiter

    @field_validator("columns")
    @classmethod
    def _distinct_columns(cls, columns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if columns is not None and len(set(columns)) != len(columns):
            raise ValueError("a column is named twice")
        return columns

    @field_validator("encoding")
    @classmethod
    def _line_based_encoding(cls, encoding: str) -> str:
        try:
            if bytes(range(128)).decode(encoding) == bytes(range(128)).decode("ascii"):
                return codecs.lookup(encoding).name
        except LookupError:
            raise ValueError("unknown encoding; utf-8, latin-1 and cp1252 are common ones") from None
        except UnicodeError:
            pass
        raise ValueError("lines cannot be found in this encoding; convert the file to utf-8 first")


class CatalogueSettings(FileFormat):
    """A file of user or item features."""

    path: Path | None = None
    id: IdRule = IdRule(field="id")
    features: dict[str, FeatureRule] = Field(default_factory=dict)


class RejectSettings(Section):
    """What happens to lines that cannot be used."""

    path: Path | None = None
    max_share: float = Field(default=0.01, ge=0, le=1)


class DataSettings(FileFormat):
    """The interactions and the catalogues beside them."""

    paths: tuple[Path, ...] = ()
    events: EventSchema = EventSchema()
    users: CatalogueSettings = CatalogueSettings()
    items: CatalogueSettings = CatalogueSettings()
    rejects: RejectSettings = RejectSettings()

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path(cls, value: object) -> object:
        return (value,) if isinstance(value, (str, Path)) else value


class LearnerSettings(Section):
    """The model: the fixed part shared by all, and the adaptive part per user."""

    head: Literal["full", "diagonal", "gradient"] = "full"
    dim: int = Field(default=16, ge=2, le=64)
    """d, the width of a user's adaptive part."""
    item_dim: PositiveInt = 64
    second_filter: bool = True
    second_dim: int = Field(default=8, ge=3, le=32)
    ordinal_auxiliary: float = Field(default=0.0, ge=0)
    """Weight of the ordinal loss over graded values, in training only; 0 switches it off."""
    graded_targets: bool = False
    """Whether an event's graded value, where there is one, moves the user's update (online too)."""
    grades: tuple[float, ...] | None = None
    """The grades in rising order; None takes the distinct values of the offline events."""


class TrainingSettings(Section):
    """The offline meta-learning stage."""

    epochs: PositiveInt = 20
    users_per_batch: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-2
    kl_weight: float = Field(default=0.6, ge=0)
    """Below 1 the posterior is colder than Bayes would have it; 0.6 was chosen inside ML-1M's offline users."""
    weight_decay: float = Field(default=1e-3, ge=0)
    clip_norm: PositiveFloat = 5.0
    max_events_per_user: PositiveInt | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "cpu"
    threads: PositiveInt | None = None
    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints."""


class ProtocolSettings(Section):
    """Which events are learned from offline and which are streamed (design: evaluation protocol)."""

    offline_fraction: float = Field(default=0.7, gt=0, lt=1)
    score_last: float | None = Field(default=None, gt=0, le=1)
    bootstrap_samples: int = Field(default=1000, ge=0)


class SyncSettings(Section):
    """When written rows are forced to the disk; a killed process loses nothing under any of them."""

    mode: Literal["never", "interval", "batch"] = "interval"
    interval_ms: PositiveInt = 1000


class StateSettings(Section):
    """Where and how users' rows are kept. The memory is that of all partitions of a process together."""

    directory: Path | None = None
    commit_events: PositiveInt = 65536
    ring: int = Field(default=32, ge=0, le=1024)
    """How many of a user's latest events its row keeps."""
    sync: SyncSettings = SyncSettings()
    expire_after_days: PositiveFloat | None = None
    """Users who are away for longer, by the events' time, are dropped and start anew; None keeps them for ever."""
    hot_rows_mb: PositiveInt = 128
    block_cache_mb: PositiveInt = 32
    write_buffers_mb: PositiveInt = 64


class SecuritySettings(Section):
    """How clients prove who they are, and what they trust. Secrets come from a file or an environment variable."""

    protocol: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = "plaintext"
    ca: Path | None = None
    """PEM of the authorities that are trusted; None: the system's"""
    certificate: Path | None = None
    """PEM of the client's certificate, for mutual TLS"""
    key: Path | None = None
    key_password: SecretRule = SecretRule()
    check_hostname: bool = True
    mechanism: Literal["plain", "scram-sha-256", "scram-sha-512", "oauthbearer"] | None = None
    username: str | None = None
    password: SecretRule = SecretRule()
    token: SecretRule = SecretRule()
    """OAUTHBEARER: a token that somebody else keeps fresh; read again for every connection"""
    token_url: str | None = None
    """OAUTHBEARER: where tokens are fetched for ``username`` and ``password`` (client credentials, RFC 6749 §4.4)"""
    token_scope: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> SecuritySettings:
        sasl = self.protocol.startswith("sasl")
        if sasl != (self.mechanism is not None):
            raise ValueError(f"protocol {self.protocol} and mechanism {self.mechanism} do not go together")
        named = self.username is not None and self.password.given
        if self.mechanism in ("plain", "scram-sha-256", "scram-sha-512") and not named:
            raise ValueError(f"mechanism {self.mechanism} needs username, and password.file or password.env")
        if self.mechanism == "oauthbearer" and self.token.given == (self.token_url is not None):
            raise ValueError("mechanism oauthbearer needs either token.file or token.env, or token_url")
        if self.token_url is not None and not named:
            raise ValueError("token_url needs username, and password.file or password.env")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        return self


class KafkaSettings(Section):
    """Which brokers, and how to reach them: the same for every client."""

    bootstrap: tuple[str, ...] = ("127.0.0.1:9092",)
    client_id: str = "coldstream"
    security: SecuritySettings = SecuritySettings()
    request_timeout_ms: PositiveInt = 40_000
    session_timeout_ms: PositiveInt = 10_000
    """A worker that is silent for so long loses its partitions."""

    @field_validator("bootstrap", mode="before")
    @classmethod
    def _one_address(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class SchemaRegistrySettings(Section):
    """A Confluent-compatible registry, for Avro and Protobuf."""

    url: str | None = None
    username: str | None = None
    password: SecretRule = SecretRule()
    ca: Path | None = None
    timeout_ms: PositiveInt = 5_000


class TopicSettings(Section):
    """The topics beside the source. Names; a missing optional one is null."""

    events_by_user: str = "interactions-by-user"
    """Where the router puts events whose producer did not key them by user"""
    changelog: str = "user-state"
    predictions: str | None = None
    dead_letters: str = "dead-letters"
    create: bool = True
    """Make missing ones; else a missing one is an error that prints the command"""
    partitions: PositiveInt = 4
    """Of topics that are made, where the source does not decide it"""
    replication: PositiveInt | None = None
    """Of topics that are made; None: three, or as many as there are brokers"""


class StreamSettings(Section):
    """A source topic, and what is made of it."""

    topic: str = "interactions"
    keyed_by_user: bool = True
    """False: a router writes the events anew, keyed by user"""
    format: Literal["json", "avro", "protobuf"] = "json"
    registry: SchemaRegistrySettings = SchemaRegistrySettings()
    protobuf_descriptors: Path | None = None
    """A FileDescriptorSet, where there is no registry"""
    protobuf_message: str | None = None
    """Full name of the message in it"""
    group: str = "coldstream"
    start: Literal["earliest", "latest"] = "earliest"
    """Where a partition without any state begins"""
    duplicate_window: PositiveInt = 10_000
    """Offsets of a partition within which ``data.events.event_id`` counts once"""
    topics: TopicSettings = TopicSettings()


class WorkerSettings(Section):
    """A process that takes part in the stream."""

    instance: str | None = None
    """Static membership: a name that outlives restarts, and no other worker has; a restart then moves no partition"""
    standby: bool = False
    """Keep copies of the partitions of others, so that taking one over is quick"""
    fetch_kb: PositiveInt = 2048
    """Of a partition, at once"""
    commit_ms: PositiveInt = 1000
    """How often the group's offsets are committed; they only say how far the changelog is"""
    shutdown_s: PositiveFloat = 30.0
    """SIGTERM: what is under way is finished within this time"""
    stall_s: PositiveFloat = 60.0
    """Without any progress for so long, with events to apply, a worker is not live"""
    ready_lag: PositiveInt = 100_000
    """Events behind, above which a worker is not ready"""
    poison_share: float = Field(default=0.9, gt=0, le=1)
    """Of the latest events of a partition: above it the worker slows down, and is not ready"""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=9464, ge=0, lt=65536)
    """0: any free one, see the log"""


class HistorySettings(Section):
    """The reservoir of whole histories, 8 bytes an event, of a sample of the users of a partition."""

    events: PositiveInt = 4_000_000
    """Of a partition; with more, half of its users are let go"""
    events_per_user: int = Field(default=2_500, ge=32)
    """The latest so many; older ones are dropped"""


class AnchorSettings(Section):
    """Frozen histories on which every version is measured."""

    held_out: float = Field(default=0.05, gt=0, le=0.5)
    """Share of the users who never feed a meta-update, so that anchors do not measure the fit"""
    users: PositiveInt = 256
    """Of a cohort"""
    slice_events: PositiveInt = 100_000
    """A new time slice of cohorts begins after so many events"""
    query: int = Field(default=20, ge=4)
    """Events of a user that are predicted"""
    segment: str | None = None
    """A categorical user feature: its values are cohorts too"""


class GateSettings(Section):
    """What a version must stand before it serves."""

    enabled: bool = True
    """Off: every candidate serves at once, whatever it does"""
    limit: PositiveFloat = 0.003
    """Nats by which the log-loss of a cohort may rise over its best"""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    bootstrap_samples: int = Field(default=400, ge=100)
    min_users: int = Field(default=100, ge=2)
    """Cohorts of fewer are judged together"""
    min_stream_users: int = Field(default=16, ge=2)
    """In a span of fewer the stream itself does not judge"""
    shadow: bool = True
    """Score a candidate on the next events of the stream before it serves anybody"""
    canary_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the users, by a hash of their id, who are served by it before the others; 0: nobody"""
    patience: PositiveInt = 3
    """Rejections in a row before the next rung: smaller rate, more replay, distillation, freeze"""


class AlarmSettings(Section):
    """Who is told, beside the log."""

    webhook: str | None = None
    """An http or https URL that takes JSON"""
    min_interval_s: PositiveFloat = 60.0
    """Between two alarms of one kind"""


class MetaSettings(Section):
    """The online stage: the stream improves what all users share."""

    moves: Literal["off", "initialization", "biases", "everything"] = "off"
    """``biases``: the initialization and the items' biases"""
    every_events: PositiveInt = 5_000
    """Of the stream, between two rounds"""
    users: PositiveInt = 256
    """Whose histories a round's gradient is summed over"""
    recent_share: float = Field(default=0.25, ge=0, le=1)
    """Of them, seen since the last round; the others are a replay of all earlier ones, offline users too"""
    rate: PositiveFloat = 1e-2
    """Of Adam, where everything moves"""
    narrow_rate: PositiveFloat = 3e-2
    """Of Adam, where less than everything moves"""
    kl_weight: float = Field(default=0.4, ge=0)
    """Of the items' prior, where their embeddings or biases move"""
    rebase: Literal["history", "ring", "closed"] = "history"
    """How a user's row comes onto a new version: from the whole history where it is kept, from the latest events, or
    by exchanging the prior"""
    directory: Path | None = None
    """Where versions and their lineage are kept"""
    keep_versions: PositiveInt = 10
    hmac: SecretRule = SecretRule()
    """A key that signs the lineage"""
    histories: HistorySettings = HistorySettings()
    anchors: AnchorSettings = AnchorSettings()
    gate: GateSettings = GateSettings()
    alarms: AlarmSettings = AlarmSettings()


class Settings(Section):
    """Everything a run needs."""

    data: DataSettings = DataSettings()
    learner: LearnerSettings = LearnerSettings()
    training: TrainingSettings = TrainingSettings()
    protocol: ProtocolSettings = ProtocolSettings()
    state: StateSettings = StateSettings()
    kafka: KafkaSettings = KafkaSettings()
    stream: StreamSettings = StreamSettings()
    worker: WorkerSettings = WorkerSettings()
    meta: MetaSettings = MetaSettings()

    @model_validator(mode="after")
    def _rings_hold_a_chunk(self) -> Settings:
        if self.meta.moves != "off" and self.state.ring < HISTORY_CHUNK:
            raise ValueError(
                f"meta.moves {self.meta.moves} keeps histories in chunks of {HISTORY_CHUNK} events, which a row must "
                f"hold: set state.ring (now {self.state.ring}) to at least {HISTORY_CHUNK}"
            )
        return self
