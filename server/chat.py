"""What HTTP makes of a chat template's refusals: errors that name the request's field and whose fault it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import ChatTemplateUnusable, InvalidField
from server.types import ChatOptions
from steering.chat_template import ChatTemplate
from steering.errors import ChatTemplateError, ConversationError


def render(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], options: ChatOptions, param: str) -> str:
    """The text of a request's conversation (`ChatTemplate.render`).

    `param`: the request's field that has the messages, for errors. Raises InvalidField for what the client can change,
    and ChatTemplateUnusable where the template itself is at fault.
    """
    try:
        return template.render(
            messages,
            options.template_kwargs,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
        )
    except ChatTemplateError as error:
        raise ChatTemplateUnusable(
            f"{error.sentence} The server's operator can set another one (--chat-template); 'prompt' works without.",
            param=param,
        ) from error
    except ConversationError as error:
        field = error.field.removeprefix("messages")
        raise InvalidField(error.sentence, param=error.field if field == error.field else f"{param}{field}") from error
