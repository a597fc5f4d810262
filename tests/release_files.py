"""Read the files of a simulated release as a stranger would: the logs, the key, the people."""

import csv
from datetime import datetime
from pathlib import Path

import duckdb

from ueba_helpers.data.simulate import LOGS

STAMP = "%m/%d/%Y %H:%M:%S"


def log_tables(folder: Path) -> duckdb.DuckDBPyConnection:
    """Return a connection with a table per log (all cells as text, `who`, `place`, `moment`)
    and `days`: who, day, n events."""
    connection = duckdb.connect()
    for log in LOGS:
        connection.execute(
            f'CREATE TABLE {log} AS SELECT *, "user" AS who, row_number() OVER () AS place, '
            f"strptime(date, '{STAMP}') AS moment FROM read_csv('{folder}/{log}.csv', "
            "header = true, all_varchar = true, quote = '', nullstr = 'NEVER')"
        )
    days = " UNION ALL ".join(f"SELECT who, moment::DATE AS day FROM {log}" for log in LOGS)
    connection.execute(f"CREATE TABLE days AS SELECT who, day, count(*) AS n FROM ({days}) "
                       "GROUP BY ALL")
    return connection


def one(connection: duckdb.DuckDBPyConnection, query: str):
    """Return the single value of a query."""
    return connection.execute(query).fetchone()[0]


def answer_rows(folder: Path) -> dict[tuple[int, str], list[tuple[str, list[str]]]]:
    """Return {(scenario, insider): [(log, cells of the row)]} from the answer files."""
    found = {}
    for path in sorted((folder / "answers").glob("r4.2-*/*.csv")):
        _, scenario, user = path.stem.split("-")
        rows = [line.split(",") for line in path.read_text().splitlines()]
        found[int(scenario), user] = [(row[0], row[1:]) for row in rows]
    return found


def moment(cells: list[str]) -> datetime:
    """Return when a row of a log happened."""
    return datetime.strptime(cells[1], STAMP)


def records(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header."""
    with open(path, encoding="ascii", newline="") as stream:
        return list(csv.DictReader(stream))
