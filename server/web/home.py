"""The page at /: one self-contained HTML document."""

import html
import json
import shlex
from collections.abc import Mapping

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
<a href="/openapi.json">/openapi.json</a> &middot; <a href="/docs">/docs</a> (its page loads from a CDN)</p>
</html>
"""


def page(*, model: str, checkpoint: str | None, attributes: Mapping[str, float], address: str) -> str:
    """The page of a server whose URL is `address`. The command on it can be copied and run."""
    body = {
        "prompt": "Q: What colour is the sky? A:",
        "attributes": dict(attributes),
        "max_new_tokens": 24,
        "temperature": 0,
        "baseline": True,
    }
    url = shlex.quote(f"{address.rstrip('/')}/generate")
    curl = f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    shown = ", ".join(f"{name} {value:g}" for name, value in attributes.items()) or "none"
    return PAGE.format(
        model=html.escape(model),
        checkpoint=html.escape(checkpoint or "none"),
        attributes=html.escape(shown),
        curl=html.escape(curl),
    )
