"""JSON lines: `{"text" | "prompt" + "completion", "label", "attribute"?, "group"?, "split"?}`, one sample a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.records import Sample, Split
from training.errors import DataError


def load_jsonl(path: Path, attribute: str) -> list[Sample]:
    """Read samples; `attribute` is for rows that name none.

    A row without `group` gets its prompt as the group (its text, where there is no prompt): answers to one question
    stay together. Raises DataError with file and line for the first broken row.
    """
    samples = [_sample(row, attribute, where) for row, where in read_rows(path)]
    if not samples:
        raise DataError(f"{path} holds no samples.")
    return samples


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every non-empty line as an object, with its "file:line". Raises DataError for a line that is no JSON object."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: not valid JSON ({error}).") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}.")
                yield row, where
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def text_field(row: dict[str, Any], name: str, where: str, default: str | None = None) -> str:
    """A non-empty string field. Raises DataError when it is missing (without a default), empty or no string."""
    if name not in row and default is not None:
        return default
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{name}" must be a non-empty string, got {value!r}.')
    return value


def split_field(row: dict[str, Any], where: str) -> Split | None:
    value = row.get("split")
    if value is None:
        return None
    if not isinstance(value, str) or value not in list(Split):
        raise DataError(f'{where}: "split" must be train, dev or test, got {value!r}.')
    return Split(value)


def _sample(row: dict[str, Any], attribute: str, where: str) -> Sample:
    if "completion" in row:
        prompt, completion = row.get("prompt", ""), text_field(row, "completion", where)
        if not isinstance(prompt, str):
            raise DataError(f'{where}: "prompt" must be a string, got {prompt!r}.')
    elif "text" in row:
        prompt, completion = "", text_field(row, "text", where)
    else:
        raise DataError(f'{where}: a row needs "prompt" and "completion", or "text".')
    label = row.get("label")
    if not isinstance(label, int) or label not in (0, 1):
        raise DataError(f'{where}: "label" must be true, false, 1 or 0, got {label!r}.')
    group = row.get("group", prompt or completion)
    if isinstance(group, int) and not isinstance(group, bool):
        group = str(group)
    if not isinstance(group, str) or not group:
        raise DataError(f'{where}: "group" must be a non-empty string or an integer, got {group!r}.')
    return Sample(
        attribute=text_field(row, "attribute", where, attribute),
        prompt=prompt,
        completion=completion,
        label=bool(label),
        group=group,
        split=split_field(row, where),
    )
