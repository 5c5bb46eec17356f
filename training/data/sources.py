"""What `--data NAME=PATH` names: attributes, a data set, and a source to read its rows from; and loading it."""

import glob
import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from steering.text import lone_surrogate
from training.data.loaders import LOADERS, Loader
from training.data.rows import (
    Problems,
    Row,
    RowKind,
    collect,
    content_hash,
    data_format,
    read_rows,
    split_named,
)
from training.data.samples import Sample
from training.errors import DataError

log = logging.getLogger(__name__)

FORM = "NAME=PATH, NAME=LOADER:PATH or NAME=[LOADER:]hub:ID"

PREFIX = "hub:"


class Source(Protocol):
    def rows(self, problems: Problems) -> Iterator[Row]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DataSpec:
    """`attributes` are those that the loader is asked for; rows of the plain form may name others."""

    name: str
    place: str
    loader: str
    attributes: tuple[str, ...]
    source: Source

    @classmethod
    def parse(cls, text: str) -> "DataSpec":
        """NAME is an attribute, or a loader that knows its own attributes. Raises DataError."""
        name, found, rest = (part.strip() for part in text.partition("="))
        if lone_surrogate(text):
            raise DataError(f"Data must be given in the terminal's own encoding, got {text!r}.")
        if not (found and name and rest):
            raise DataError(f"Data must be given as {FORM}, got {text!r}.")
        prefix, _, place = rest.partition(":")
        if prefix not in LOADERS:
            _refuse_unknown(prefix, rest)
            prefix, place = name if name in LOADERS else "jsonl", rest
        if not place:
            raise DataError(f"Data must be given as {FORM}, got {text!r}.")
        loader = LOADERS[prefix]
        return cls(name, place, prefix, _attributes(name, prefix, loader), _source_at(place, loader))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps of its data. Raises DataError where it cannot be read any more."""
        return {"name": self.name, "path": self.place, "loader": self.loader, **self.source.describe()}


def _refuse_unknown(prefix: str, rest: str) -> None:
    """A word before a colon is a loader that does not exist, unless there is such a file."""
    looks = re.fullmatch(r"[A-Za-z][\w-]+", prefix) and ":" in rest and not rest.startswith(PREFIX)
    if looks and not Path(rest).exists():
        raise DataError(f"There is no loader {prefix!r}; there are {', '.join(LOADERS)}.")


def _attributes(name: str, prefix: str, loader: Loader) -> tuple[str, ...]:
    if name == prefix and not loader.attributes and prefix != "jsonl":
        raise DataError(f"{prefix} data have no attribute of their own: name it, as in refusal={prefix}:PATH.")
    if name == prefix and loader.attributes:
        return loader.attributes
    if len(loader.attributes) > 1 and name not in loader.attributes:
        known = ", ".join(loader.attributes)
        raise DataError(f"{prefix} data have {known}, but no {name!r}: name one of these, or {prefix} for all.")
    return (name,)


def _source_at(place: str, loader: Loader) -> Source:
    if place.startswith(PREFIX):
        return HubSource.parse(place, loader.configs)
    folder = Path(place).expanduser()
    return SavedSource(folder) if SavedSource.recognises(folder) else FileSource(place)


@dataclass(frozen=True)
class FileSource:
    """The files that a path stands for: one file, a folder of them, or a pattern."""

    place: str

    def rows(self, problems: Problems) -> Iterator[Row]:
        """The rows of every file, the files in the order of their names. Raises DataError."""
        for path in self.paths():
            yield from read_rows(path, problems)

    def describe(self) -> dict[str, Any]:
        """One file's sha256; for several, that of the list of their names and hashes."""
        hashes = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in self.paths()}
        if len(hashes) == 1:
            return {"sha256": next(iter(hashes.values()))}
        listed = "".join(f"{hash}  {Path(name).name}\n" for name, hash in hashes.items())
        return {"sha256": hashlib.sha256(listed.encode()).hexdigest(), "files": len(hashes)}

    def paths(self) -> list[Path]:
        """Raises DataError where there is none, or a folder does not say which ones are meant."""
        path = Path(self.place).expanduser()
        if path.is_dir():
            return _inside(path)
        if path.exists() or not glob.has_magic(self.place):
            return [path]
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"No file matches {self.place}.")
        return found


def _inside(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_file() and data_format(path))
    formats = sorted({data_format(path) or "" for path in found})
    if not found:
        raise DataError(f"{folder} holds no csv, tsv, json or jsonl file.")
    if len(formats) > 1:
        raise DataError(
            f"{folder} holds files of several formats ({', '.join(formats)}): "
            f"name one file, or a pattern such as {folder}/*{formats[0]}."
        )
    return found


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub, `hub:ID[/CONFIG][@REVISION]`.

    `configs` says which config of a known data set is read where none is named.
    """

    id: str
    config: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str, configs: Mapping[str, str]) -> "HubSource":
        """Raises DataError."""
        place, _, revision = text.removeprefix(PREFIX).partition("@")
        parts = place.split("/")
        if not all(parts) or len(parts) > 3:
            raise DataError(f"A data set of the hub is hub:OWNER/NAME[/CONFIG][@REVISION], got {text!r}.")
        id = "/".join(parts[:2])
        return cls(id, parts[2] if len(parts) == 3 else configs.get(id), revision or None)

    def rows(self, problems: Problems) -> Iterator[Row]:
        yield from _rows(self._load(), f"{PREFIX}{self.id}")

    def describe(self) -> dict[str, Any]:
        """What was read: the rows' own hash, since a name on the hub can change what it stands for."""
        found = {"sha256": content_hash(row.fields for row in self.rows(Problems(self.id)))}
        return found | {key: value for key in ("config", "revision") if (value := getattr(self, key))}

    def _load(self) -> Any:
        datasets = _datasets()
        try:
            return datasets.load_dataset(self.id, self.config, revision=self.revision)
        except Exception as error:  # the library has no common base: missing, gated, offline, unknown config
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{PREFIX}{self.id} cannot be loaded: {reason[0][:300]}") from None


@dataclass(frozen=True)
class SavedSource:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""

    folder: Path

    @staticmethod
    def recognises(folder: Path) -> bool:
        return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))

    def rows(self, problems: Problems) -> Iterator[Row]:
        try:
            loaded = _datasets().load_from_disk(str(self.folder))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder} is not a data set that was saved whole: {error}.") from None
        yield from _rows(loaded, str(self.folder))

    def describe(self) -> dict[str, Any]:
        return {"sha256": content_hash(row.fields for row in self.rows(Problems(str(self.folder))))}


def _rows(loaded: Any, name: str) -> Iterator[Row]:
    """A DatasetDict's splits one after the other, or a Dataset."""
    parts = loaded.items() if isinstance(loaded, dict) else [(str(loaded.split or "all"), loaded)]
    for split, rows in parts:
        for index, fields in enumerate(rows):
            yield Row(fields, f"{name}:{split}[{index}]", split_named(split), RowKind.ARROW)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError("Data sets of the hub need the package datasets: pip install 'datasets>=3.0'.") from None
    return datasets


def load_data(specs: Iterable[str], *, chat: bool = False) -> list[Sample]:
    """Samples of every "NAME=PATH" (see `DataSpec.parse`), in order. `chat`: prompts become turns of a user.

    A text that has both labels of an attribute says nothing about it and is left out, with a warning. Raises DataError
    for a malformed spec, one for all that is broken in a file, and for conversations beside plain texts.
    """
    samples = [sample for spec in specs for sample in load_spec(DataSpec.parse(spec), chat=chat)]
    if not samples:
        raise DataError("No data was given: name at least one NAME=PATH.")
    if len({sample.form for sample in samples}) > 1:
        raise DataError(
            "Some of the data are conversations (messages) and some are plain texts: with --chat the prompts become "
            "turns of a user too."
        )
    return _without_contradictions(samples)


def load_spec(spec: DataSpec, *, chat: bool = False) -> list[Sample]:
    """Raises DataError where the source is broken or empty."""
    loader = LOADERS[spec.loader]

    def convert(row: Row) -> Iterable[Sample]:
        found = [sample for attribute in spec.attributes for sample in loader.samples(row, attribute)]
        return [_as_chat(sample, row.where) for sample in found] if chat else found

    samples = collect(spec.place, spec.source.rows, convert)
    if not samples:
        raise DataError(f"{spec.place} holds no samples.")
    return samples if loader.per_side is None else draw(samples, loader.per_side)


def _as_chat(sample: Sample, where: str) -> Sample:
    try:
        return sample.as_chat()
    except DataError as error:
        raise DataError(f"{where}: {error}.") from None


def draw(samples: Sequence[Sample], per_side: int) -> list[Sample]:
    """At most `per_side` samples of each attribute and label, attribute by attribute, else in their order.

    Drawn by a hash of the group, then of the text: the same ones whatever the order of the rows, and, as far as both
    labels have enough, positives and negatives of the same prompts. Of groups with several prompts, as BBQ's templates,
    every group's first is drawn before any group's second; of samples without their texts, as stored activations have
    them, every group's first of a label.
    """
    return [samples[index] for index in draw_indices(samples, per_side)]


def draw_indices(samples: Sequence[Sample], per_side: int) -> list[int]:
    """Where the samples of `draw` are."""
    sides: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        sides[sample.attribute, sample.label].append(index)
    prompts: dict[tuple[str, str], set[str]] = defaultdict(set)
    for sample in samples:
        prompts[sample.attribute, sample.group].add(sample.prompt)
    turns = {
        (*place, prompt): turn for place, own in prompts.items() for turn, prompt in enumerate(sorted(own, key=_hash))
    }
    seen: Counter[tuple[str, bool, str]] = Counter()
    keys = []
    for sample in samples:
        place, text = (sample.attribute, sample.label, sample.group), sample.text
        turn = turns[sample.attribute, sample.group, sample.prompt] if text else seen[place]
        seen[place] += 1
        keys.append((turn, _hash(sample.group), _hash(text)))
    drawn = {index for side in sides.values() for index in sorted(side, key=keys.__getitem__)[:per_side]}
    order = {attribute: place for place, (attribute, _) in enumerate(sides)}
    return sorted(drawn, key=lambda index: (order[samples[index].attribute], index))


def _without_contradictions(samples: list[Sample]) -> list[Sample]:
    labels: dict[tuple[str, str, str], set[bool]] = defaultdict(set)
    for sample in samples:
        labels[sample.attribute, sample.prompt, sample.completion].add(sample.label)
    both = {key for key, found in labels.items() if len(found) == 2}
    for attribute in sorted({attribute for attribute, _, _ in both}):
        texts = sorted(prompt + completion for name, prompt, completion in both if name == attribute)
        log.warning("%s: texts that have both labels are left out: %d, as %r.", attribute, len(texts), texts[0])
    return [sample for sample in samples if (sample.attribute, sample.prompt, sample.completion) not in both]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
