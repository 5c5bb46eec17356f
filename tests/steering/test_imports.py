"""While libraries are imported the garbage collector waits."""

import gc

import pytest

from steering.imports import importing


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_waits_and_is_afterwards_as_it_was(enabled: bool) -> None:
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise ModuleNotFoundError

    try:
        if not enabled:
            gc.disable()
        with pytest.raises(ModuleNotFoundError), importing():
            fail()
        assert seen == [False]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
