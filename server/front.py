"""What a server is made of beside its engine: what a process without a model has, too."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.config import Settings
from server.engine_client import EngineClient
from server.errors import StartupError
from server.judge import Judge, load_judge
from server.metrics import Metrics
from server.service import Service
from server.studies import Studies
from server.tokenizer import Codec
from steering.chat_template import ChatTemplate, read_chat_template
from steering.errors import ChatTemplateError, ModelError
from steering.pretrained import open_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judging:
    """Who judges answers, and where people's votes are kept."""

    judge: Judge | None
    studies: Studies | None


def open_judging(settings: Settings) -> Judging:
    """What can fail before the model is loaded. Raises StartupError."""
    return Judging(load_judge(settings), Studies(settings.studies) if settings.studies else None)


def service_of(
    settings: Settings, codec: Codec, client: EngineClient, judging: Judging, *, told: bool = False
) -> Service:
    """`told`: another process has logged already what the operator should know."""
    if not told:
        _tell_chat_template(codec.chat, settings)
    return Service(
        settings,
        codec,
        client,
        Metrics(settings.served_name, engine_pid=client.facts.pid),
        judge=judging.judge,
        studies=judging.studies,
    )


def read_template(file: Path | None) -> str | None:
    """Raises StartupError where the operator's chat template cannot be read."""
    if file is None:
        return None
    try:
        return read_chat_template(file)
    except ChatTemplateError as error:
        raise StartupError(f"{error.sentence} (--chat-template or MATSTEER_CHAT_TEMPLATE)") from error


def load_tokenizer(settings: Settings, *, alone: bool) -> Any:
    """That of the model, without it. `alone`: this process loads no model (`open_tokenizer`). Raises StartupError."""
    trust = settings.trust_remote_code
    try:
        return open_tokenizer(settings.model_path, revision=settings.revision, trust_remote_code=trust, alone=alone)
    except ModelError as error:
        raise StartupError(str(error)) from error


def _tell_chat_template(template: ChatTemplate | None, settings: Settings) -> None:
    """What the operator should know about it before somebody asks."""
    name = f"{str(settings.chat_template)!r}" if settings.chat_template else f"of {settings.model_path!r}"
    if template is None:
        log.info("the model has no chat template: it takes 'prompt', not 'messages'")
    elif template.problem:
        log.warning("the chat template %s cannot be used, and requests with messages fail: %s", name, template.problem)
    else:
        if template.dropped:
            roles = ", ".join(template.dropped)
            log.info("the chat template %s leaves out turns of role %s: requests with them are refused", name, roles)
        if not template.shows_tool_calls:
            log.info("the chat template %s does not show tool calls: requests with them are refused", name)
