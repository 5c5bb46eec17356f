"""The page at /: one self-contained HTML document; and the request to copy that it and the start of the server show."""

import html
import json
import shlex
from collections.abc import Mapping

# With this seed the demo's two arms differ: tests/test_examples.py.
EXAMPLE = {"prompt": "Q: What is the capital of Japan? A:", "baseline": True, "max_new_tokens": 40, "seed": 1}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>mat-steer</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem }}
pre {{ background: #8881; padding: 1rem; overflow-x: auto }}
</style>
<h1>mat-steer</h1>
<p>Serving <b>{model}</b>, steered by checkpoint <b>{checkpoint}</b>. Attributes and their default multipliers:
{attributes}.</p>
<p>One request, both answers: steered, and the same without steering:</p>
<pre>{curl}</pre>
<p><a href="/checkpoints">/checkpoints</a> &middot; <a href="/readyz">/readyz</a> &middot;
<a href="/openapi.json">/openapi.json</a> &middot; <a href="/docs">/docs</a></p>
</html>
"""


def page(
    *, model: str, checkpoint: str | None, attributes: Mapping[str, float], address: str, asks_for_key: bool
) -> str:
    """The page of a server whose URL is `address`. The command on it can be copied and run."""
    shown = ", ".join(f"{name} {value:g}" for name, value in attributes.items()) or "none"
    return PAGE.format(
        model=html.escape(model),
        checkpoint=html.escape(checkpoint or "none"),
        attributes=html.escape(shown),
        curl=html.escape(curl(address, attributes, asks_for_key=asks_for_key)),
    )


def curl(address: str, attributes: Mapping[str, float], *, asks_for_key: bool) -> str:
    """A command for a shell: both arms of one prompt. Where a key is asked for, a variable of the shell has it."""
    url = shlex.quote(f"{address.rstrip('/')}/generate")
    key = ' -H "Authorization: Bearer $MATSTEER_API_KEY"' if asks_for_key else ""
    body = json.dumps(EXAMPLE | {"attributes": dict(attributes)})
    return f"curl -s {url}{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
