"""Options of the terminal's commands, and groups of them (`steering.option_groups`) for those that ask a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from server.config import Settings, default_text, load_settings
from steering.option_groups import ChatTemplateFile, ChatTemplateKwargs, OptionGroup


def setting(name: str, *declarations: str) -> Any:
    """The option of a setting, with its description and its default."""
    about = Settings.model_fields[name].description or ""
    return typer.Option(*declarations, help=f"{about[:1].upper()}{about[1:]}.", show_default=default_text(name))


Model = Annotated[str | None, setting("model")]
Checkpoints = Annotated[Path | None, setting("checkpoints")]
Checkpoint = Annotated[str | None, setting("checkpoint")]
Device = Annotated[str | None, setting("device")]
Dtype = Annotated[str | None, setting("dtype")]
ApiKey = Annotated[str | None, typer.Option(envvar="MATSTEER_API_KEY", help="The server's key.")]
Multipliers = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=X", help="A multiplier; repeat it.")]


@dataclass(frozen=True)
class Question(OptionGroup):
    """A single prompt, and how it and its answer are shown."""

    prompt: Annotated[str, typer.Argument(help="The text to continue.")]
    trace: Annotated[bool, typer.Option("--trace", help="Colour each token by the attribute that moved it most.")] = (
        False
    )
    chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is what a user says: through the model's chat template.")
    ] = False

    def fields(self) -> dict[str, Any]:
        """Of a request."""
        said = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        return {**said, "trace": self.trace}


@dataclass(frozen=True)
class Sampling(OptionGroup):
    """How an answer is made."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0
    seed: Annotated[int | None, typer.Option(help="For temperatures above 0.")] = None
    chat_template_kwargs: ChatTemplateKwargs = None

    def fields(self) -> dict[str, Any]:
        """Of a request."""
        return dict(vars(self))


@dataclass(frozen=True)
class ChatSampling(Sampling):
    """The same for a conversation, whose answers are longer."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 256


@dataclass(frozen=True)
class Answerer(OptionGroup):
    """A server, or a model that is loaded for the command."""

    url: Annotated[
        str | None, typer.Option(envvar="MATSTEER_URL", help="Ask this server; default: load the model here.")
    ] = None
    api_key: ApiKey = None
    model: Model = None
    checkpoints: Checkpoints = None
    checkpoint: Checkpoint = None
    chat_template: ChatTemplateFile = None
    device: Device = None
    dtype: Dtype = None

    def settings(self) -> Settings:
        """Of the model that is loaded here. Raises StartupError."""
        return load_settings(
            model=self.model, checkpoints=self.checkpoints, checkpoint=self.checkpoint,
            chat_template=self.chat_template, device=self.device, dtype=self.dtype, log_level="warning", remember=False,
        )  # fmt: skip

    def server(self) -> str | None:
        """The server's address. Raises BadParameter for options that are not for a server."""
        own = ("model", "checkpoints", "chat_template", "device", "dtype")
        foreign = [f"--{name.replace('_', '-')}" for name in own if getattr(self, name) is not None]
        if self.url is not None and foreign:
            raise typer.BadParameter(f"{', '.join(foreign)}: the server at --url has its own")
        return self.url
