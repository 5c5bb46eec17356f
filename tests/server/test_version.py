"""The version, installed or not."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from server.app import bare_app
from server.version import UNINSTALLED, own_version
from tests.server.conftest import World


def test_it_is_that_of_the_package() -> None:
    assert own_version() == version("mat-steer")


def test_the_source_folder_alone_is_served(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.setattr("server.version.version", missing)
    assert bare_app().version == UNINSTALLED
    assert world.client.get("/page.json").json()["version"] == UNINSTALLED
