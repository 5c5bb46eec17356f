"""The first client that streams waits for nothing that could have been loaded before."""

import subprocess
import sys

SCRIPT = """
import asyncio, sys
from server.api import body, responses

async def loaded_by_the_second():
    before = set(sys.modules)
    await responses.warm_up()
    first = set(sys.modules) - before
    assert any(name.startswith("anyio._backends.") for name in first), "the first one has to load something"
    assert "encodings.utf_8_sig" in first
    await responses.warm_up()
    print(sorted(set(sys.modules) - before - first))

asyncio.run(loaded_by_the_second())
"""


def test_what_a_stream_needs_is_loaded_by_the_one_at_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
