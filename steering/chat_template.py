"""A model's chat template: which form of content it reads, and a conversation as the text that it makes.

A tokenizer of transformers is taken, and nothing of transformers imported.

A template is a program of the model's author, or of the user (`--chat-template`). Some read a message's content as a
string, some loop over a list of parts and make nothing of a string. Which form one reads is found out when it is
opened, by rendering a word in either: vLLM calls it `chat_template_content_format`. It writes special tokens itself, so
its texts are tokenized with `add_special_tokens=False`.
"""

import difflib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from steering.errors import ChatTemplateError, ConversationError

Message = Mapping[str, Any]
FIRST, SECOND = "Firstword", "Secondword"  # what is looked for in a rendered text
AS_DATA = re.compile(rf"""['"]text['"]:\s*['"]{FIRST}""")  # a list of parts, printed as it is
ARGUMENTS = {"key": SECOND}
CALL_ID = "abcdef123"  # nine letters and digits: Mistral's templates insist on it
ROLES = ("user", "assistant", "system", "developer", "tool")


@dataclass(frozen=True)
class ContentForm:
    """What a template shows of a message's content."""

    string: bool  # one that is a string
    parts: bool  # one that is a list of text parts, all of them
    one_part: bool  # of a list the first part at least


STRING = ContentForm(string=True, parts=False, one_part=False)
NEITHER = ContentForm(string=False, parts=False, one_part=False)


def open_chat_template(tokenizer: Any) -> "ChatTemplate | None":
    """A tokenizer's chat template; None where it has none."""
    return ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None


def read_chat_template(file: Path) -> str:
    """Raises ChatTemplateError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ChatTemplateError(f"the chat template {str(file)!r} cannot be read: {why}") from error


class _Refused(Exception):
    """The template raises an error of its own, as templates do for turns that they do not take."""


class ChatTemplate:
    """A tokenizer's chat template, tried out when this is made. Used from several threads.

    source: the template, in Jinja.
    file: the name of the file that it came in; None: it is the tokenizer's own.
    variables: those that every conversation is rendered with, unless it has others.
    problem: why no conversation can be rendered at all, in words; None: it can.
    dropped: the roles whose text the template leaves out without a word.
    shows_tool_calls: whether an assistant's `tool_calls` appear.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.problem: str | None = None
        self.source = ""
        self.file: str | None = None
        self.variables: Mapping[str, Any] = {}
        self.dropped: tuple[str, ...] = ()
        self.shows_tool_calls = True
        self._variables: frozenset[str] = frozenset()
        self._forms: dict[str, ContentForm] = {"user": STRING}
        self._arguments_are_strings = False
        self._content_may_be_absent = True
        # What the tokenizer's method takes by name is no variable of a template.
        self._reserved = {
            name
            for name, about in inspect.signature(tokenizer.apply_chat_template).parameters.items()
            if about.kind is not inspect.Parameter.VAR_KEYWORD
        } - {"documents", "tools"} | {"messages"}
        try:
            self.source = str(tokenizer.get_chat_template())
            self._variables = _variables(self.source)
            self._try_out()
        except Exception as error:  # templates are programs: they fail in whatever way they like
            self.problem = f"it fails on a single message of a user ({_told(error)})"

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation, up to where the next answer begins, or where the last message goes on.

        `messages`: as OpenAI has them, content a string or text parts. `variables`: of the template.
        `add_generation_prompt`: with what begins an answer; None: unless the last message goes on. Raises
        ConversationError for what the messages or the variables are to blame for, and ChatTemplateError where the
        template itself is at fault.
        """
        if self.problem is not None:
            raise ChatTemplateError(f"the chat template cannot be used: {self.problem}")
        variables = {**self.variables, **(variables or {})}
        self.check_variables(variables)
        turns = [self._turn(message, f"messages.{index}") for index, message in enumerate(messages)]
        if continue_final_message and not turns[-1].get("content"):
            raise ConversationError(
                "'continue_final_message' needs a last message with text", field="continue_final_message"
            )
        begins = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        try:
            return self._apply(turns, variables, begins, continue_final_message)
        except Exception as error:
            raise self._failure(error, turns, continued=continue_final_message) from error

    def describe(self) -> dict[str, Any]:
        """What tells it from others, for JSON."""
        digest = sha256(self.source.encode()).hexdigest()
        return {"file": self.file, "sha256": digest, "kwargs": dict(self.variables)}

    def check_variables(self, given: Mapping[str, Any]) -> None:
        """A variable that the template does not read would be lost; one that is false asks for nothing. Raises
        ConversationError."""
        for name, value in given.items():
            field = f"chat_template_kwargs.{name}"
            if name in self._reserved:
                raise ConversationError(f"{name!r} is no variable of the chat template that may be set", field=field)
            if value and name not in self._variables:
                close = difflib.get_close_matches(name[:80], self._variables, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConversationError(f"the model's chat template has no variable {name[:80]!r}{hint}", field=field)

    def _apply(
        self,
        turns: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{name: value for name, value in (variables or {}).items() if name in self._variables},
        )
        return text

    def _failure(
        self, error: Exception, turns: Sequence[Message], *, continued: bool
    ) -> ChatTemplateError | ConversationError:
        """Whose fault it is: what the template raises itself, it raises for the messages, and a last message that
        cannot be continued is theirs, too. Any other error is the template's own where it comes for plain texts in
        turns of the same roles as well."""
        if _is_refusal(error) or (continued and isinstance(error, ValueError)):
            return ConversationError(f"the model's chat template refuses these messages: {str(error).rstrip('.')}")
        plain = [{"role": turn["role"], "content": self._given("a", turn["role"])} for turn in turns]
        try:
            self._apply(plain)
        except Exception as again:
            if not _is_refusal(again):
                roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
                return ChatTemplateError(
                    f"the chat template fails on a conversation of these roles ({roles}): {_told(error)}"
                )
        return ConversationError(f"the model's chat template cannot show these messages: {_told(error)}")

    # --- a message as the template wants it ---

    def _turn(self, message: Message, field: str) -> dict[str, Any]:
        turn = {name: value for name, value in message.items() if value is not None}
        if turn["role"] == "developer" and not self._knows_developer:
            turn["role"] = "system"
        role, content = turn["role"], turn.get("content")
        if role in self.dropped and content:
            raise ConversationError(
                f"the model's chat template leaves out what turns of role {message['role']!r} say; put it into a turn "
                "of the user",
                field=f"{field}.role",
            )
        if turn.get("tool_calls") and not self.shows_tool_calls:
            raise ConversationError(
                "the model's chat template does not show 'tool_calls': this model was not made for tools",
                field=f"{field}.tool_calls",
            )
        if turn.get("tool_calls"):
            turn["tool_calls"] = [self._call(call) for call in turn["tool_calls"]]
        if content is not None:
            turn["content"] = self._given(content, role)
        elif not (turn.get("tool_calls") and self._content_may_be_absent):
            turn["content"] = self._given("", role)
        return turn

    def _given(self, content: str | Sequence[Message], role: str) -> str | list[dict[str, Any]]:
        form = self._forms.get(role, self._forms["user"])
        if isinstance(content, str):
            return content if form.string or not (form.parts or form.one_part) else [_part(content)]
        if form.parts:
            return [dict(part) for part in content]
        joined = "".join(part["text"] for part in content)
        return [_part(joined)] if form.one_part and not form.string else joined

    def _call(self, call: Message) -> dict[str, Any]:
        """A call of a tool; its arguments, which come in JSON, parsed where the template wants to write them itself."""
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str) and not self._arguments_are_strings:
            try:
                parsed = json.loads(function["arguments"])
            except ValueError:
                parsed = None
            if isinstance(parsed, dict):
                function["arguments"] = parsed
        return {**call, "function": function}

    @property
    def _knows_developer(self) -> bool:
        return "developer" in self.source

    # --- trying it out ---

    def _try_out(self) -> None:
        user = self._form("user")
        if user == NEITHER:
            self.problem = "it shows the text of a user's message neither from a string nor from a list of parts"
            return
        self._forms["user"] = user or STRING
        dropped = []
        for role in ROLES[1:]:
            try:
                form = self._form(role)
            except Exception:  # found at start, but no request may ever have such a turn
                continue
            if form == NEITHER:
                dropped.append(role)
            elif form is not None:
                self._forms[role] = form
        self.dropped = tuple(role for role in dropped if role != "developer" or self._knows_developer)
        self._try_tool_calls()

    def _form(self, role: str) -> ContentForm | None:
        """None: the template refuses such turns. Raises what it raises for both forms."""
        found: list[bool] = []
        errors: list[Exception] = []
        for content, words in (
            (FIRST, [FIRST]),
            ([_part(FIRST), _part(SECOND)], [FIRST, SECOND]),
            ([_part(FIRST)], [FIRST]),
        ):
            try:
                text = self._rendered(role, content)
            except Exception as error:
                errors.append(error)
                found.append(False)
            else:
                found.append(all(word in text for word in words) and not AS_DATA.search(text))
        if any(found) or not errors:
            return ContentForm(*found)
        if all(isinstance(error, _Refused) for error in errors):
            return None
        if len(errors) == len(found):
            raise errors[0]
        return NEITHER

    def _rendered(self, role: str, content: Any) -> str:
        """A conversation in which a turn of this role has this content."""
        turn = {"role": role, "content": content}
        if role == "user":
            return self._first_taken([[turn], [{"role": "system", "content": "a"}, turn]])
        asked = {"role": "user", "content": self._given("a", "user")}
        if role == "assistant":
            return self._first_taken([[asked, turn, asked]])
        if role == "tool":
            return self._first_taken([[asked, _calling(ARGUMENTS), {**turn, "tool_call_id": CALL_ID}]])
        return self._first_taken([[turn, asked]])

    def _first_taken(self, conversations: Sequence[Sequence[Message]]) -> str:
        """The first of them that the template does not refuse."""
        refusal: Exception | None = None
        for turns in conversations:
            try:
                return self._apply(turns)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                refusal = error
        raise _Refused(str(refusal))

    def _try_tool_calls(self) -> None:
        asked = {"role": "user", "content": self._given("a", "user")}
        texts = list(self._with_calls(asked))
        if texts:
            self.shows_tool_calls = any(FIRST in text for text in texts)
        in_json = json.dumps(ARGUMENTS)
        try:
            self._arguments_are_strings = in_json in self._apply([asked, _calling(in_json)])
        except Exception:  # such a template wants to write them itself
            self._arguments_are_strings = False
        try:
            call = _calling(in_json if self._arguments_are_strings else ARGUMENTS)
            self._content_may_be_absent = "None" not in self._apply([asked, call])
        except Exception:
            self._content_may_be_absent = False

    def _with_calls(self, asked: Message) -> Iterator[str]:
        for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)):
            for content in ({}, {"content": ""}):
                try:
                    yield self._apply([asked, {**_calling(arguments), **content}])
                except Exception:
                    continue


def _variables(source: str) -> frozenset[str]:
    """The names that a template reads and does not set itself; it is parsed, not rendered. Where it has
    statements that only transformers knows, all its words."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)  # nosec B701
    except TemplateSyntaxError:
        return frozenset(re.findall(r"[A-Za-z_]\w*", source))
    return frozenset(find_undeclared_variables(tree))


def _calling(arguments: Any) -> dict[str, Any]:
    """An assistant's turn that calls a tool."""
    function = {"name": FIRST, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": CALL_ID, "type": "function", "function": function}]}


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _is_refusal(error: Exception) -> bool:
    """Whether a template said so itself, by `raise_exception`: Jinja's own errors are of classes below this one."""
    return isinstance(error, _Refused) or type(error) is TemplateError


def _told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    return f"{type(error).__name__}{where}: {lines[0].rstrip('.')}" if lines else type(error).__name__
