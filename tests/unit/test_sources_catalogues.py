"""MovieLens in both layouts, and catalogues from any file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.loading import load_settings
from configs.settings import DataSettings
from learner.features import Catalogue, FeatureField
from streams.exceptions import NoInput, SourceError, UnknownColumn
from streams.sources import load_catalogues, open_source
from tests.unit.test_sources import HEADER, data_settings, rows, written

FLAGS = "0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0"
USER_FIELDS = tuple(FeatureField(n, "categorical") for n in ("gender", "age", "occupation", "region"))
ITEM_FIELDS = (FeatureField("genres", "multi"), FeatureField("period", "categorical"))


@pytest.fixture
def ml_1m(tmp_path: Path) -> Path:
    written(tmp_path, "ratings.dat", "1::10::5::978300760\n2::11::3::978302109\n")
    written(tmp_path, "users.dat", "1::F::1::10::48067\n2::M::56::16::02460\n")
    written(tmp_path, "movies.dat", "10::Café (1995)::Animation|Comedy\n11::M (1931) (V)::Drama\n".encode("latin-1"))
    return tmp_path


@pytest.fixture
def ml_100k(tmp_path: Path) -> Path:
    written(tmp_path, "u.data", "1\t10\t5\t978300760\n2\t11\t3\t978302109\n")
    written(tmp_path, "u.user", "1|17|F|writer|48067\n2|24|M|other|V5A2B\n3|73|M|none|\n")
    written(
        tmp_path,
        "u.item",
        f"10|Toy Story (1995)|01-Jan-1995||http://x|{FLAGS}\n"
        f"11|Untitled|04-Feb-1971||http://x|{FLAGS}\n"
        f"12|unknown||||1{'|0' * 18}\n",
    )
    return tmp_path


def movielens(profile: str, directory: Path, **overrides: object) -> DataSettings:
    dotted = {f"data.{name.replace('__', '.')}": value for name, value in overrides.items()}
    return load_settings(profile, {"data.paths": str(directory), **dotted}, {}).data


@pytest.mark.parametrize(("directory", "profile"), [("ml_1m", "ml-1m"), ("ml_100k", "ml-100k")])
def test_both_layouts_give_clicks_values_and_milliseconds(
    directory: str, profile: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(directory)
    for data in (movielens(profile, path), data_settings(path)):
        (batch,) = open_source(data).batches()
        assert rows([batch]) == [("1", "10", 1, 978_300_760_000), ("2", "11", 0, 978_302_109_000)]
        np.testing.assert_array_equal(batch.value, np.array([5, 3], np.float32))


def test_the_catalogues_of_ml_1m(ml_1m: Path) -> None:
    users, items = load_catalogues(movielens("ml-1m", ml_1m))
    assert users == Catalogue(USER_FIELDS, {"1": ("F", "1", "10", "4"), "2": ("M", "56", "16", "0")})
    assert items == Catalogue(ITEM_FIELDS, {"10": ("Animation|Comedy", "13"), "11": ("Drama", "0")})


def test_the_catalogues_of_ml_100k_have_the_classes_of_ml_1m(ml_100k: Path) -> None:
    users, items = load_catalogues(movielens("ml-100k", ml_100k))
    assert users == Catalogue(
        USER_FIELDS,
        {"1": ("F", "1", "writer", "4"), "2": ("M", "18", "other", "V"), "3": ("M", "56", "none", None)},
    )
    genres = "Animation|Children's|Comedy"
    assert items == Catalogue(ITEM_FIELDS, {"10": (genres, "13"), "11": (genres, "8"), "12": ("unknown", "13")})


def test_prefixes_and_selected_features_apply_to_movielens(ml_1m: Path) -> None:
    data = movielens("ml-1m", ml_1m, events__user_id__prefix="u", users__features={"sex": {"field": "gender"}})
    users, _ = load_catalogues(data)
    assert users == Catalogue((FeatureField("sex", "categorical"),), {"u1": ("F",), "u2": ("M",)})
    with pytest.raises(UnknownColumn, match=r"no column 'zip' for data.users.features.zip"):
        load_catalogues(movielens("ml-1m", ml_1m, users__features={"zip": {}}))


def test_ratings_alone_have_no_catalogue(tmp_path: Path) -> None:
    path = written(tmp_path, "ratings.dat", "1::10::5::978300760\n")
    assert load_catalogues(movielens("ml-1m", path)) == (Catalogue(), Catalogue())


def test_a_broken_movielens_catalogue_names_its_line(ml_1m: Path) -> None:
    written(ml_1m, "users.dat", "1::F::1::10::48067\n2::M\n")
    with pytest.raises(SourceError, match=r"users\.dat line 2: 2 fields in place of 5"):
        load_catalogues(movielens("ml-1m", ml_1m))


RULES = {"tags": {"kind": "multi"}, "years": {"kind": "numeric", "field": "age"}}
FIELDS = (FeatureField("tags", "multi"), FeatureField("years", "numeric"))


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl", "c.parquet"])
def test_catalogues_of_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "c.csv":
        path.write_text('id,age,tags\n1,30,x|y\n2,,"z"\n1,31,x|y\n')
    elif name == "c.jsonl":
        path.write_text('{"id":1,"age":30}\n{"id":"2","tags":["z"]}\n{"id":1,"age":31,"tags":["x","y"]}\n')
    else:
        table = pa.table({"id": [1, 2, 1], "age": [30, None, 31], "tags": [["x"], ["z"], ["x", "y"]]})
        pq.write_table(table, path)
    data = data_settings(written(tmp_path, "e.csv", HEADER), items__path=str(path), items__features=RULES)
    users, items = load_catalogues(data)
    assert users == Catalogue()
    assert items == Catalogue(FIELDS, {"1": ("x|y", "31"), "2": ("z", None)})


def test_a_few_bad_catalogue_rows_are_told_and_many_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "c.csv", "id,age,tags\n1,30\n2,31,z\n")
    events = written(tmp_path, "e.csv", HEADER)
    data = data_settings(events, users__path=str(path), users__features=RULES, rejects__max_share=0.5)
    assert load_catalogues(data)[0].rows == {"2": ("z", "31")}
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: 1 of 2 rows cannot be used; first: line 2: 2 fields in place of 3 fields (id, age, tags)"
    ]
    with pytest.raises(SourceError, match="1 of 2 records cannot be used"):
        load_catalogues(data_settings(events, users__path=str(path), users__features=RULES))


def test_a_catalogue_needs_both_a_file_and_features(tmp_path: Path) -> None:
    events = written(tmp_path, "e.csv", HEADER)
    with pytest.raises(NoInput, match=r"name columns under data.users.features"):
        load_catalogues(data_settings(events, users__path=str(events)))
    with pytest.raises(NoInput, match=r"data.items.path names no file"):
        load_catalogues(data_settings(events, items__features=RULES))
