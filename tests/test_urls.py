"""URLs of stores."""

from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text

from sparsetune.urls import sqlite_path, sqlite_url, without_credentials


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg2://u:s3cret@h:5432/db", "postgresql+psycopg2://h:5432/db"),
        ("http://ada:s3/cret@h:9/x", "http://h:9/x"),
        ("http://ada:s3?cr#et@h:9", "http://h:9"),
        ("http://ada:s3@cret@h:9", "http://h:9"),
        ("mongodb:/u:s3cret@h/db", "mongodb:/h/db"),
        ("postgresql://h/db?user=u&password=s3cret&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Ds3cret", "mssql+pyodbc:///?odbc_connect=***"),
        ("https://h/p?X-Amz-Signature=s3cret", "https://h/p?X-Amz-Signature=***"),
        ("cannot open 'http://u:s3cret@h/x': no host", "cannot open 'http://h/x': no host"),
        ("postgresql://h:s3cret/db", "postgresql://h:***/db"),
        ("http://ada:s3 cret@h:9", "http://h:9"),
        ("http://h:5000/@x", "http://h:5000/@x"),
        ("http://[::1]:5000/@x", "http://[::1]:5000/@x"),
        ("cannot reach http://h:5000: refused", "cannot reach http://h:5000: refused"),
        (
            "the server http://h:***, is away (http://[::1]:5000).",
            "the server http://h:***, is away (http://[::1]:5000).",
        ),
        ("models:/demo-sparse@champion", "models:/demo-sparse@champion"),
        ("hf://owner/name@main", "hf://owner/name@main"),
        ("sqlite:////data/a@b/mlflow.db", "sqlite:////data/a@b/mlflow.db"),
        ("journal:/shared/study.log", "journal:/shared/study.log"),
    ],
)
def test_no_credential_is_shown(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


@pytest.mark.parametrize("name", ["plain", "a b", "what?", "50%20off", "c#", 'it\'s "x"', "é中文", "a@b:c", "a+b&c=d"])
def test_a_database_is_made_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "x.db"
    path.parent.mkdir()
    url = sqlite_url(path)
    assert sqlite_path(url) == path
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (x INTEGER)"))
    assert inspect(engine).has_table("t")
    engine.dispose()
    assert [found.name for found in tmp_path.rglob("*.db")] == ["x.db"]
    assert path.is_file()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "postgresql://h/db", "http://h", "mlruns"])
def test_what_names_no_sqlite_file_has_no_path(url: str) -> None:
    assert sqlite_path(url) is None
