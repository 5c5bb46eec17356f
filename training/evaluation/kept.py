"""Results that are written as they come, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steering.column import Column
from training.activations.store import model_hash
from training.evaluation.results import Arm
from training.files import content_key


@dataclass(frozen=True)
class Kept:
    """Rows in a file of JSON lines; those of another `key` are passed over. Without a path nothing is kept."""

    path: Path | None = None
    key: str = ""

    @classmethod
    def of(cls, path: Path | None, model: Any, columns: Sequence[Column], arms: Sequence[Arm]) -> "Kept":
        """Of this model, steered by these columns in these arms."""
        if path is None:
            return NOTHING
        vectors = [
            [column.attribute, str(column.site), column.gate.value, column.gate_bias, column.keep_norm,
             column.clamp and asdict(column.clamp), column.reads and [str(column.reads.site), column.reads.latched],
             *(hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in (column.vector, column.gate_weight))]
            for column in columns
        ]  # fmt: skip
        settings = {"model": model_hash(model), "columns": vectors, "arms": [asdict(arm) for arm in arms]}
        return cls(path, content_key(settings))

    def about(self, *asked: Any) -> "Kept":
        """Of what was `asked` alone, values of JSON, in the same file."""
        return self if self.path is None else replace(self, key=content_key([self.key, *asked]))

    def read(self) -> list[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last one, where writing was cut short
                continue
            if row["key"] == self.key:
                found.append(row)
        return found

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")
            file.write("".join(json.dumps({**row, "key": self.key}) + "\n" for row in rows).encode())

    def remove(self) -> None:
        """Once all is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


NOTHING = Kept()
