"""A function of the operator's that judges answers, as `matsteer evaluate --judge` has one."""

from collections.abc import Callable, Mapping
from importlib import import_module

from server.config import Settings
from server.errors import InvalidField, StartupError

Verdict = Mapping[str, bool | None]  # by what is judged; None: the prompt does not ask for it
Judge = Callable[[str, str], Verdict]
DEMO_JUDGE = "demo.oracle:judge"


def load_judge(settings: Settings) -> Judge | None:
    """The judge that the settings name, the demo's own where the demo is served. Raises StartupError."""
    name = settings.judge or ("" if settings.model else DEMO_JUDGE)
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        judge = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise StartupError(f"The judge {name!r} (MATSTEER_JUDGE) must be MODULE:FUNCTION: {error}.") from error
    if not callable(judge):
        raise StartupError(f"The judge {name!r} (MATSTEER_JUDGE) is not a function.")
    found: Judge = judge
    return found


def verdicts(judge: Judge, prompt: str, texts: list[str]) -> list[dict[str, bool | None]]:
    """Of each text as an answer to `prompt`. Raises InvalidField where the judge does not know the prompt."""
    try:
        return [dict(judge(prompt, text)) for text in texts]
    except ValueError as error:
        raise InvalidField(f"The judge does not take this prompt: {error}.", param="prompt") from error
