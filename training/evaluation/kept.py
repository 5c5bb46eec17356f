"""Results that are written as they come, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steering.types import Column
from training.activations.store import model_hash
from training.evaluation.results import Arm
from training.files import content_key


@dataclass(frozen=True)
class Kept:
    """Rows in a file of JSON lines; those of another `key` are passed over. Without a path nothing is kept."""

    path: Path | None = None
    key: str = ""

    @classmethod
    def of(cls, path: Path | None, model: Any, columns: Sequence[Column], arms: Sequence[Arm], asked: Any) -> "Kept":
        """Of what was `asked`, a value of JSON, of this model, steered by these columns in these arms."""
        if path is None:
            return cls()
        vectors = [
            [column.attribute, str(column.site), column.gate.value, column.gate_bias, column.keep_norm,
             column.clamp and asdict(column.clamp), column.reads and [str(column.reads.site), column.reads.latched],
             *(hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in (column.vector, column.gate_weight))]
            for column in columns
        ]  # fmt: skip
        settings = {"model": model_hash(model), "columns": vectors, "arms": [asdict(arm) for arm in arms]}
        return cls(path, content_key({**settings, "asked": asked}))

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
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("" if whole else "\n")
            file.writelines(json.dumps({**row, "key": self.key}) + "\n" for row in rows)

    def remove(self) -> None:
        """Once all is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
