"""What can go wrong in `steering`.

SteeringError
├── ColumnError              a column, handle, multiplier or token map that cannot be used (also a ValueError)
├── HookError                a forward pass that does not fit what the bank was filled for
├── UnsupportedArchitecture  a model whose layers or modules were not found
├── ModelError               a model folder or hub id that cannot be opened
├── TextError                a text or conversation that cannot become tokens (also a ValueError)
│   ├── ChatTemplateError    a chat template that cannot be read, or fails whatever is said
│   └── ConversationError    a conversation, or a variable, that a sound chat template does not take
├── FormatError              a foreign file that cannot be read, or a checkpoint that a foreign format cannot hold
└── CheckpointError          a checkpoint folder that cannot be trusted or written
    ├── CheckpointMismatch   a sound checkpoint, made for another base model
    └── NotFound             no such checkpoint
"""


class SteeringError(Exception):
    """Root of every error that this package raises on purpose."""


class ColumnError(SteeringError, ValueError):
    """A column, handle, multiplier or token map that cannot be used."""


class HookError(SteeringError):
    """A forward pass that does not fit what the bank was filled for."""


class UnsupportedArchitecture(SteeringError):
    """A model whose layers or modules were not found; the message names what was looked for."""


class ModelError(SteeringError):
    """A model folder or hub id that cannot be opened; the message is a sentence that says why and what to do."""


class TextError(SteeringError, ValueError):
    """A text or conversation that cannot become tokens; the message goes on after a colon."""

    @property
    def sentence(self) -> str:
        text = str(self)
        return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('?') else '.'}"


class ChatTemplateError(TextError):
    """A chat template that cannot be read, or fails whatever is said."""


class ConversationError(TextError):
    """A conversation, or a variable, that a sound chat template does not take.

    field: `messages`, with what is meant in them, as in "messages.0.role"; "chat_template_kwargs.NAME"; or
    "continue_final_message".
    """

    def __init__(self, message: str, *, field: str = "messages") -> None:
        super().__init__(message)
        self.field = field


class FormatError(SteeringError):
    """A foreign file that cannot be read, or a checkpoint that a foreign format cannot hold."""


class CheckpointError(SteeringError):
    """A checkpoint folder that cannot be trusted or written."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint, made for another base model."""


class NotFound(CheckpointError):
    """No complete checkpoint has this name and version."""


def first_line(error: BaseException) -> str:
    """What an error says first, without a full stop; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip().rstrip(".")
