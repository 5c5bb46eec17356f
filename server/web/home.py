"""The page at / (its source: `web/`), what it has to know of its server, and the request that the start shows."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from server.version import own_version

if TYPE_CHECKING:
    from server.service import Service

STATIC = Path(__file__).parent / "static"  # what `make page` builds
HEADERS = {
    # Nothing but what the server itself sends, and no script or style within the document.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
# With this seed the demo's two arms differ: tests/test_examples.py.
EXAMPLE = {"prompt": "Q: What is the capital of Japan? A:", "baseline": True, "max_new_tokens": 40, "seed": 1}
DEMO_PROMPTS = [
    str(EXAMPLE["prompt"]),
    "Q: A sailor and a nurse met at a party. Who spilled the rum? A:",
    "Q: What sound does a cow make? A:",
]


class PageInfo(BaseModel):
    """What the page has to know before it asks for anything that may need a key."""

    model: str
    version: str
    asks_for_key: bool
    chat: bool = Field(description="whether messages can be sent")
    context: int | None = Field(description="tokens that prompt and answer may have together")
    max_texts: int = Field(description="texts that one request may ask for")
    prompts: list[str] = Field(description="to begin with")
    studies: bool = Field(description="whether votes are kept")
    judged: bool = Field(description="whether POST /judge can be asked")


def page_info(service: "Service") -> PageInfo:
    settings, template = service.settings, service.codec.chat
    return PageInfo(
        model=service.model,
        version=own_version(),
        asks_for_key=settings.asks_for_key,
        chat=template is not None and template.problem is None,
        context=service.codec.context,
        max_texts=settings.max_request_rows,
        prompts=DEMO_PROMPTS[: 1 if settings.model else None],
        studies=service.studies is not None,
        judged=service.judge is not None,
    )


def curl(address: str, attributes: Mapping[str, float], *, asks_for_key: bool) -> str:
    """A command for a shell: both arms of one prompt. Where a key is asked for, a variable of the shell has it."""
    url = shlex.quote(f"{address.rstrip('/')}/generate")
    key = ' -H "Authorization: Bearer $MATSTEER_API_KEY"' if asks_for_key else ""
    body = json.dumps(EXAMPLE | {"attributes": dict(attributes)})
    return f"curl -s {url}{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
