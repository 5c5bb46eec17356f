"""Rows of csv, tsv, json and jsonl files (each also as .gz), their checked fields, and all that is wrong with them.

A row knows the file and line that it stands at. Whoever mends a file wants the whole list of problems, so they are
collected and raised as one DataError.
"""

import csv
import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any, TextIO, TypeVar

from steering.text import lone_surrogate
from training.data.samples import Split
from training.errors import DataError

SHOWN = 20

Item = TypeVar("Item")
Found = TypeVar("Found")

FORMATS = (".csv", ".tsv", ".json", ".jsonl")
TABLES = (".csv", ".tsv")

# How files begin that are no text that is read here.
BEGINNINGS = {
    b"PK\x03\x04": "is a zip archive or a spreadsheet, which is not read: write it as csv or JSON lines",
    b"\xff\xfe": "is UTF-16, not UTF-8 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8 text: save it as UTF-8",
}
LABELS = {"true": True, "1": True, "false": False, "0": False}


class Problems:
    """Sentences that name file, line and what is wrong, each kept once."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._found: dict[str, None] = {}

    def add(self, sentence: str) -> None:
        self._found.setdefault(sentence)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """A DataError inside becomes a problem, and the next row has its turn."""
        try:
            yield
        except DataError as error:
            self.add(str(error))

    def check(self) -> None:
        """Raise DataError with the first 20 problems and their number, if there is any."""
        found = list(self._found)
        if len(found) == 1:
            raise DataError(found[0])
        if found:
            shown = [*found[:SHOWN], *([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])]
            raise DataError(f"{self.source} has {len(found)} problems:\n  " + "\n  ".join(shown))


def collect(
    source: str, read: Callable[[Problems], Iterable[Item]], convert: Callable[[Item], Iterable[Found]]
) -> list[Found]:
    """What `convert` makes of every item that `read` gives. Raises one DataError for all that is broken."""
    problems = Problems(source)
    found: list[Found] = []
    for item in read(problems):
        with problems.caught():
            found.extend(convert(item))
    problems.check()
    return found


class RowKind(StrEnum):
    """What a row was read from, which decides how it says that it has not got a field."""

    JSON = "json"  # by leaving it out
    TABLE = "table"  # with an empty cell; every field is text
    ARROW = "arrow"  # with a null


@dataclass(frozen=True)
class Row:
    """One row of a data set. `split` is the part of the data set that it was published in, where that is known."""

    fields: Mapping[str, Any]
    where: str
    split: Split | None = None
    kind: RowKind = RowKind.JSON

    @property
    def is_text(self) -> bool:
        return self.kind is RowKind.TABLE


def read_rows(path: Path, problems: Problems) -> Iterator[Row]:
    """Every row of a UTF-8 file, read as its suffix says; JSON lines where that says nothing.

    Rows that are broken go to `problems`. Raises DataError for a file that cannot be read at all.
    """
    kind = data_format(path)
    part = split_named(path.name)
    _refuse_mistaken(path)
    try:
        _check_beginning(path)
        with _open(path) as file:
            if kind in TABLES:
                found = _table(file, path, problems, "," if kind == ".csv" else "\t")
            elif kind == ".json":
                found = _json(file, path, problems)
            else:
                found = _json_lines(file, path, problems)
            for fields, where in found:
                yield Row(fields, where, part, RowKind.TABLE if kind in TABLES else RowKind.JSON)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path} is not a whole gzip file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _refuse_mistaken(path: Path) -> None:
    from steering.files import EMPTY, GZIP, PARQUET, mistaken_for

    what = mistaken_for(path)
    if what in (None, EMPTY) or (what == GZIP and path.suffix == ".gz"):
        return
    if what == GZIP:
        what = "a gzip archive: give it a name that ends in .gz"
    if what == PARQUET:
        what += ": make JSON lines of it, as with pandas.read_parquet(PATH).to_json(OUT, orient='records', lines=True)"
    raise DataError(f"{path} is {what}.")


def data_format(path: Path) -> str | None:
    """The suffix that says how a file is read, without .gz; None for a file that is no data."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    return suffix if suffix in FORMATS else None


def split_named(name: str) -> Split | None:
    """The part of a data set that a file or hub split is named for; None where it names none or several."""
    named = {"train": Split.TRAIN, "validation": Split.DEV, "valid": Split.DEV, "val": Split.DEV, "dev": Split.DEV,
             "test": Split.TEST}  # fmt: skip
    found = {named[word] for word in re.split(r"[^a-z]+", name.lower()) if word in named}
    return found.pop() if len(found) == 1 else None


def content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """sha256 of rows that are no file."""
    digest = hashlib.sha256()
    for fields in rows:
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _check_beginning(path: Path) -> None:
    """Raises DataError for a file that is no text."""
    with path.open("rb") as file:
        head = file.read(64)
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning):
            raise DataError(f"{path} {what}.")


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _table(file: TextIO, path: Path, problems: Problems, delimiter: str) -> Iterator[tuple[dict[str, str], str]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(f"{where}: not a valid row ({error}).")
            continue
        if not header:
            header = cells
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{where}: the header names {_quoted(twice)} twice.")
        elif len(cells) == len(header):
            yield dict(zip(header, cells, strict=True)), where
        elif cells:
            problems.add(f"{where}: expected {len(header)} fields as in the header, got {len(cells)}.")


def _json_lines(file: Iterable[str], path: Path, problems: Problems) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(file, start=1):
        where = f"{path}:{number}"
        with problems.caught():
            if line.strip():
                yield _object(_parsed(line, path, number - 1, unique=True), where), where


def _json(file: TextIO, path: Path, problems: Problems) -> Iterator[tuple[dict[str, Any], str]]:
    """A list of objects, or one; a file that starts otherwise holds one object a line."""
    text = file.read()
    if not text.lstrip().startswith("["):
        if _is_one_object(text):
            with problems.caught():
                yield _object(_parsed(text, path, 0, unique=True), f"{path}:1"), f"{path}:1"
        else:
            yield from _json_lines(StringIO(text), path, problems)
        return
    _parsed(text, path, 0)
    between, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    place, line, counted = text.index("[") + 1, 1, 0
    while True:
        match = between.match(text, place)
        place = match.end() if match else place
        if text[place] == "]":
            return
        line, counted = line + text.count("\n", counted, place), place
        begin, (_, place) = place, decoder.raw_decode(text, place)
        with problems.caught():
            value = _parsed(text[begin:place], path, line - 1, unique=True)
            yield _object(value, f"{path}:{line}"), f"{path}:{line}"


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class _Twice(ValueError):
    """A JSON object names a field twice, and all but the last one would be lost."""


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(_quoted(sorted({name for name in names if names.count(name) > 1})))
    return found


def _parsed(text: str, path: Path, before: int, *, unique: bool = False) -> Any:
    """`before`: the lines of the file before the text. `unique`: no object may name a field twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except json.JSONDecodeError as error:
        where = f"{path}:{before + error.lineno}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}).") from None
    except _Twice as error:
        raise DataError(f"{path}:{before + 1}: {error} is there twice.") from None
    except ValueError as error:  # numbers with thousands of digits
        raise DataError(f"{path}:{before + 1}: not valid JSON ({str(error).partition(':')[0]}).") from None
    except RecursionError:
        raise DataError(f"{path}:{before + 1}: not valid JSON (nested too deeply).") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    for name, item in value.items():
        if any(map(lone_surrogate, _strings([name, item]))):
            raise DataError(
                f"{where}: {json.dumps(name)} holds half of a surrogate pair (as in \\ud83d), which is no character."
            )
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(json.dumps(name, ensure_ascii=False) for name in names)


def check_fields(row: Row, known: Sequence[str]) -> None:
    """Raises DataError for a field that is not known: what it says would be lost."""
    for name in map(str, row.fields):
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"there are {', '.join(known)}."
            raise DataError(f'{row.where}: there is no field "{name}"; {hint}')


def without_blanks(row: Row, *, but: str) -> Row:
    """The row with the fields alone that it has, and the field `but`, which it has to have."""
    if row.kind is RowKind.JSON:
        return row
    blank = "" if row.kind is RowKind.TABLE else None
    return replace(row, fields={name: value for name, value in row.fields.items() if value != blank or name == but})


def check_near_misses(row: Row, optional: Sequence[str], known: Sequence[str]) -> None:
    """Raises DataError for a field that reads like an optional one that is missing; rows may have any others."""
    for name in [name for name in optional if name not in row.fields]:
        others = [str(other) for other in row.fields if other not in known]
        if close := difflib.get_close_matches(name, others, n=1, cutoff=0.85):
            raise DataError(f'{row.where}: there is no field "{close[0]}"; did you mean "{name}"?')


def raw_field(row: Row, name: str) -> Any:
    """Raises DataError where the row has no such field."""
    if name not in row.fields:
        there = list(map(str, row.fields))
        close = difflib.get_close_matches(name, there, n=1)
        meant = f' (is "{close[0]}" meant?)' if close else ""
        raise DataError(f'{row.where}: there is no "{name}"{meant}; there are {", ".join(there)}.')
    return row.fields[name]


def text_field(row: Row, name: str, default: str | None = None) -> str:
    """A non-empty string. Raises DataError when it is missing (without a default), empty or no string."""
    if name not in row.fields and default is not None:
        return default
    value = raw_field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{row.where}: "{name}" must be a non-empty string, got {value!r}.')
    return value


def label_field(row: Row) -> bool:
    """True or false: in JSON also 1 and 0, in a table these words in any case. Raises DataError."""
    value = row.fields.get("label")
    if row.is_text and isinstance(value, str) and value.strip().lower() in LABELS:
        return LABELS[value.strip().lower()]
    if row.is_text or not isinstance(value, int) or value not in (0, 1):
        raise DataError(f'{row.where}: "label" must be true, false, 1 or 0, got {value!r}.')
    return bool(value)


def choice_field(row: Row, name: str, count: int) -> int:
    """A whole number from 0 to `count` - 1, in a table as text. Raises DataError."""
    value = raw_field(row, name)
    choices = list(range(count))
    if row.is_text and isinstance(value, str) and value.strip() in map(str, choices):
        return int(value)
    if isinstance(value, bool) or value not in choices:
        listed = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
        raise DataError(f'{row.where}: "{name}" must be {listed}, got {value!r}.')
    return int(value)


def number_field(row: Row, name: str, low: float, high: float) -> float:
    """A number in [low, high], also written as text. Raises DataError."""
    value = raw_field(row, name)
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not (isfinite(number) and low <= number <= high):
        raise DataError(f'{row.where}: "{name}" must be a number from {low:g} to {high:g}, got {value!r}.')
    return number


def list_field(row: Row, name: str) -> list[str]:
    """A list of strings. Raises DataError."""
    value = raw_field(row, name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f'{row.where}: "{name}" must be a list of strings, got {value!r}.')
    return value


def split_field(row: Row) -> Split | None:
    value = row.fields.get("split")
    if value is None:
        return None
    if not isinstance(value, str) or value not in list(Split):
        raise DataError(f'{row.where}: "split" must be train, dev or test, got {value!r}.')
    return Split(value)
