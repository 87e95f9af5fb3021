"""MovieLens as GroupLens publishes it: 100K (``u.data`` …) and 1M (``ratings.dat`` …), files and catalogues.

Both give the same features, so that one profile serves both: of users gender, age (ML-1M's classes), occupation
and region (first character of the zip code); of items genres and period (five years of release). The names of
occupations differ: 1M publishes their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.settings import EventSchema, FeatureRule, LabelRule, TimeRule, ValueRule
from streams.delimited import DelimitedLayout
from streams.exceptions import UnusableFile
from streams.text_blocks import open_file

ENCODING = "latin-1"
RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
SCHEMA = EventSchema(
    label=LabelRule(field="rating", at_least=4),
    value=ValueRule(field="rating"),
    event_time=TimeRule(field="timestamp", unit="s"),
)
"""What a rating means unless ``data.events`` says otherwise: a click is a rating of 4 or 5."""
USER_FEATURES = {name: FeatureRule() for name in ("gender", "age", "occupation", "region")}
ITEM_FEATURES = {"genres": FeatureRule(kind="multi"), "period": FeatureRule()}

AGE_CLASSES = (1, 18, 25, 35, 45, 50, 56)
"""ML-1M's classes by their lowest age; 1 stands for under 18."""
FIRST_YEAR, LAST_YEAR, PERIOD_YEARS = 1930, 2000, 5
UNKNOWN_YEAR = 1995
"""Counts for a film without a year: where most of both catalogues lie."""
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The flags at the end of a line of ``u.item``, in order."""

Record = dict[str, str]


@dataclass(frozen=True, slots=True)
class MovieLensFiles:
    """Where the three files of one edition lie; users and items may be missing."""

    ratings: Path
    users: Path
    items: Path
    delimiter: str
    """Of the ratings."""

    def layout(self, time_field: str) -> DelimitedLayout:
        """How the ratings are split."""
        return DelimitedLayout(self.delimiter, False, RATING_COLUMNS, ENCODING, quoted=False, plain=(time_field,))


def find_movielens(path: Path) -> MovieLensFiles | None:
    """The files of a directory, or beside a ratings file; None if ``path`` is neither."""
    directory = path if path.is_dir() else path.parent
    names = ("ratings.dat", "u.data") if path.is_dir() else (path.name,)
    if "ratings.dat" in names and (directory / "ratings.dat").is_file():
        return MovieLensFiles(directory / "ratings.dat", directory / "users.dat", directory / "movies.dat", "::")
    if "u.data" in names and (directory / "u.data").is_file():
        return MovieLensFiles(directory / "u.data", directory / "u.user", directory / "u.item", "\t")
    return None


def read_users(files: MovieLensFiles) -> Iterator[tuple[str, Record]]:
    """(id, features by name) of each user; nothing if the file is not there."""
    if not files.users.is_file():
        return
    if files.users.name == "users.dat":
        for user, gender, age, occupation, postcode in _lines(files.users, "::", 5):
            yield user, {"gender": gender, "age": age, "occupation": occupation, "region": postcode[:1]}
    else:
        for user, age, gender, occupation, postcode in _lines(files.users, "|", 5):
            yield user, {"gender": gender, "age": _age_class(age), "occupation": occupation, "region": postcode[:1]}


def read_items(files: MovieLensFiles) -> Iterator[tuple[str, Record]]:
    """(id, features by name) of each film; nothing if the file is not there."""
    if not files.items.is_file():
        return
    if files.items.name == "movies.dat":
        for item, title, genres in _lines(files.items, "::", 3):
            yield item, {"genres": genres, "period": _period(title)}
    else:
        for item, title, released, _, _, *flags in _lines(files.items, "|", 5 + len(GENRES_100K)):
            genres = "|".join(genre for genre, flag in zip(GENRES_100K, flags, strict=True) if flag == "1")
            yield item, {"genres": genres, "period": _period(title, released)}


def _lines(path: Path, delimiter: str, fields: int) -> Iterator[list[str]]:
    with open_file(path) as file:
        for number, line in enumerate(file.read().decode(ENCODING).split("\n"), 1):
            text = line.removesuffix("\r")
            if not text:
                continue
            values = text.split(delimiter)
            if len(values) != fields:
                raise UnusableFile(
                    f"{path} line {number}: {len(values)} fields in place of {fields}; this is not MovieLens as "
                    "published: fetch it again, or describe the file under data.users or data.items"
                )
            yield values


def _age_class(age: str) -> str:
    years = int(age) if age.isdigit() else 0
    return str(max((c for c in AGE_CLASSES if c <= years), default=AGE_CLASSES[0]))


def _period(title: str, released: str = "") -> str:
    years = re.findall(r"\((\d{4})\)", title)[-1:] or re.findall(r"\d{4}$", released) or [str(UNKNOWN_YEAR)]
    return str((min(max(int(years[0]), FIRST_YEAR), LAST_YEAR) - FIRST_YEAR) // PERIOD_YEARS)
