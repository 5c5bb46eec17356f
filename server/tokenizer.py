"""The model's own tokenizer: text and chat messages to token ids, ids back to text, whole or token by token."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from server.errors import ChatTemplateUnusable, InvalidField, PromptTooLong
from server.heap import limit_word_cache
from server.types import ChatOptions, TokenizeParams, TokenizerInfo
from steering.chat_template import ChatTemplate, open_chat_template
from steering.errors import ChatTemplateError, ConversationError
from steering.text import lone_surrogate, tokenize, tokenize_pair

Decode = Callable[[Sequence[int]], str]
LONGEST_TOKEN = 64  # characters; a text with more of them for each token that fits is refused without tokenizing it
LONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's names for tokens of single bytes
CONTEXT = 6  # ids of the prompt that are decoded, too: they tell whether the first new token starts with a space
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no whole character
LONGEST_RUN = 64  # ids that may wait for the end of a character; beyond, older ones are decoded no more
LEFT = 8  # ids that are kept of such a run: a new token changes the text of the last few only
WITH_CONTINUATION = "prompt with this continuation"
UNSURE = 3  # replacement characters at the end that may still become a character: UTF-8 has up to four bytes


def _byte_of_character() -> dict[str, int]:
    """What each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, the other way round):
    printable bytes for themselves, the others, in order, for those from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class TokenText(NamedTuple):
    """What one token stands for by itself. A token that is only a part of a character has bytes but no proper text."""

    text: str
    raw: bytes | None  # None: unknown


class Codec:
    """The tokenizer, with input checked: errors name the request's field. Used from several threads."""

    def __init__(self, tokenizer: Any, *, vocab: int, context: int | None) -> None:
        """`vocab`: how many tokens the model knows; `context`: how many a text may have, None: no limit is known."""
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._token_texts: dict[int, TokenText] = {}
        self.context = context
        # The first call may set the tokenizer up; later ones only read it.
        tokenizer("warm")
        limit_word_cache(tokenizer)
        self.chat = open_chat_template(tokenizer)

    def encode(
        self,
        prompt: str | tuple[int, ...],
        param: str,
        what: str = "prompt",
        *,
        add_special_tokens: bool | None = None,
    ) -> tuple[int, ...]:
        """The prompt's ids, with the special tokens that come before it (`steering.text.tokenize`); a prompt of ids is
        only checked.

        `param`: the request's field, `what`: the prompt's name, both for errors. Raises InvalidField, PromptTooLong.
        """
        if not isinstance(prompt, str):
            return self._checked(prompt, param, what)
        self._check_text(prompt, param)
        self._check_length(len(prompt), param, what)
        return self._checked(self._ids(prompt, add_special_tokens), param, what)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        param: str,
        options: ChatOptions | None = None,
        *,
        add_special_tokens: bool | None = None,
    ) -> tuple[int, ...]:
        """The ids of a conversation in the tokenizer's chat template, up to where the next answer begins or goes on.
        The template writes special tokens itself: more come only where `add_special_tokens` is True.

        Raises InvalidField where there is no template, or it refuses the messages; ChatTemplateUnusable; PromptTooLong.
        """
        text = self._rendered(messages, param, options or ChatOptions())
        return self._checked(self._ids(text, bool(add_special_tokens)), param, "messages")

    def encode_any(self, params: TokenizeParams) -> tuple[int, ...]:
        """The ids of a text or a conversation, of any length, as `encode` and `encode_chat` make them; of an empty text
        what comes before every text. Raises InvalidField, ChatTemplateUnusable."""
        if params.prompt is None:
            text = self._rendered(params.messages, "messages", params.chat, limited=False)
            return self._ids(text, bool(params.add_special_tokens))
        self._check_text(params.prompt, "prompt")
        return self._ids(params.prompt, params.add_special_tokens)

    def encode_pair(
        self, prompt: str, continuation: str, param: str, *, add_special_tokens: bool | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of a prompt, and those of its continuation (`steering.text.tokenize_pair`).

        Raises InvalidField, PromptTooLong.
        """
        self._check_text(prompt, "prompt")
        self._check_text(continuation, param)
        self._check_length(len(prompt), "prompt")
        self._check_length(len(prompt) + len(continuation), param, WITH_CONTINUATION)
        before, after = tokenize_pair(self._tokenizer, prompt, continuation, add_special_tokens=add_special_tokens)
        if before:
            self._checked(before, "prompt")
        self._checked(before + after, param, WITH_CONTINUATION)
        if not after:
            raise InvalidField("The continuation adds no token to the prompt.", param=param)
        if not before:
            raise InvalidField(
                "The prompt and this continuation begin with one token that holds both, before which there is nothing "
                "to predict it from.",
                param=param,
            )
        return before, after

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], param: str, options: ChatOptions, *, limited: bool = True
    ) -> str:
        if self.chat is None:
            raise InvalidField("This model has no chat template; send 'prompt' instead of 'messages'.", param=param)
        length = 0
        for index, message in enumerate(messages):
            for text in texts_of(message.get("content")):
                self._check_text(text, f"{param}.{index}.content")
                length += len(text)
        if limited:
            self._check_length(length, param, "messages")
        rendered = _render(self.chat, messages, options, param)
        self._check_text(rendered, param)
        if limited:
            self._check_length(len(rendered), param, "messages")
        return rendered

    def _ids(self, text: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        return tokenize(self._tokenizer, text, add_special_tokens=add_special_tokens).ids

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises InvalidField where one of them is no token of the model's."""
        for index, token in enumerate(ids):
            self.check_id(token, f"{param}.{index}")

    def token_names(self, ids: Sequence[int]) -> list[str]:
        """As the vocabulary has them."""
        return [str(name) for name in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def describe(self) -> TokenizerInfo:
        """What a client needs to know to make texts for it."""
        tokenizer = self._tokenizer
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=len(tokenizer),
            special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            chat_template=self.chat.source if self.chat and self.chat.problem is None else None,
        )

    def check_id(self, token: int, param: str) -> None:
        """Raises InvalidField where the model has no such token; `param`: the field that names it."""
        if token >= self._vocab:
            raise InvalidField(
                f"There is no token {token}: the model knows {self._vocab} tokens, from 0 on.", param=param
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._decode(ids, skip_special_tokens=True)

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._decode(ids, skip_special_tokens=False)

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token: int) -> TokenText:
        """One token by itself, special tokens included."""
        found = self._token_texts.get(token)
        if found is None:
            text = self.decode_all([token])
            found = TokenText(text, self._token_bytes(token) if INCOMPLETE in text else text.encode())
            self._token_texts[token] = found
        return found

    def _token_bytes(self, token: int) -> bytes | None:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if lone := LONE_BYTE.fullmatch(name):
            return bytes.fromhex(lone[1])
        if all(character in BYTE_OF_CHARACTER for character in name):
            return bytes(BYTE_OF_CHARACTER[character] for character in name)
        return None

    @staticmethod
    def _check_text(text: str, param: str) -> None:
        """Half a surrogate pair is valid in JSON and in Python, but no tokenizer can read it."""
        if lone_surrogate(text):
            raise InvalidField("The text holds half of a surrogate pair, which is no character.", param=param)

    def _check_length(self, characters: int, param: str, what: str = "prompt") -> None:
        if self.context is not None and characters > LONGEST_TOKEN * self.context:
            raise PromptTooLong.of(self.context, f"{characters} characters", what, param=param)

    def _checked(self, ids: Sequence[int], param: str, what: str = "prompt") -> tuple[int, ...]:
        if not ids:
            raise InvalidField(f"The {what} {_have(what)} no tokens.", param=param)
        if max(ids) >= self._vocab:
            raise InvalidField(
                f"The {what} {_have(what)} token {max(ids)}, but the model knows {self._vocab} tokens only.",
                param=param,
            )
        if self.context is not None and len(ids) >= self.context:
            raise PromptTooLong.of(self.context, f"{len(ids)} tokens", what, param=param)
        return tuple(ids)


def _render(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], options: ChatOptions, param: str) -> str:
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


def _have(what: str) -> str:
    return "have" if what == "messages" else "has"


def texts_of(content: Any) -> Sequence[str]:
    """The texts of a message's content, be it a string, a list of parts, or absent."""
    if content is None:
        return ()
    return [content] if isinstance(content, str) else [part["text"] for part in content]


class Detokenizer:
    """Incremental decoding of one sequence's new tokens: the strings that `read` returns, put together, are its text.

    Each is the difference of two decodings that start a few tokens earlier, because a token's text depends on its
    neighbours (leading spaces, characters of several tokens).
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT:])
        self._start = 0  # index of the id at which both decodings start
        self._done = len(self._ids)  # the text of the ids before this index has been returned whole
        self._given = 0  # characters that have been returned of the text of the ids from there on

    def fork(self, decode: Decode) -> "Detokenizer":
        """Another one that goes on from here, and decodes in another way."""
        forked = Detokenizer(decode, ())
        forked._ids = list(self._ids)
        forked._start, forked._done, forked._given = self._start, self._done, self._given
        return forked

    def push(self, token: int) -> None:
        self._ids.append(token)

    def read(self, *, final: bool = False) -> str:
        """The text since the last call, without an unfinished character at its end, unless `final`."""
        before = self._decode(self._ids[self._start : self._done])
        after = self._decode(self._ids[self._start :])
        given = len(before) + self._given
        if len(after) <= given:
            return ""
        if after.endswith(INCOMPLETE) and not final:
            waiting = min(UNSURE, len(after) - len(after.rstrip(INCOMPLETE)))
            piece = after[given : len(after) - waiting]
            self._given += len(piece)
            if len(self._ids) - self._done > LONGEST_RUN:
                self._move_on(after, len(after) - waiting)
            return piece
        self._start, self._done, self._given = self._done, len(self._ids), 0
        return after[given:]

    def _move_on(self, text: str, given: int) -> None:
        """Let both decodings start later, where that changes nothing, so that a long run of bytes that never become
        characters is not decoded again for each token. `text`: decoded from where they start now; the first `given`
        characters of it have been returned."""
        done = len(self._ids) - LEFT
        start = done - CONTEXT
        known, before = self._decode(self._ids[self._start : done]), self._decode(self._ids[start:done])
        if len(known) <= given and known + self._decode(self._ids[start:])[len(before) :] == text:
            self._start, self._done, self._given = start, done, given - len(known)


class TextOffsets:
    """Where each token of a text begins, in characters of the text; the tokens are given in order."""

    def __init__(self, codec: Codec, before: Sequence[int], *, special: bool = False) -> None:
        """`before`: the tokens before the text; `special`: the text shows special tokens, too."""
        self._codec = codec
        self._detokenizer = Detokenizer(codec.decode_all if special else codec.decode, before)
        self._at = 0

    def next(self, token: int) -> int:
        """How many characters of the text stand before this token."""
        before = self._at
        self._detokenizer.push(token)
        new = self._detokenizer.read()
        self._at += len(new)
        own = self._codec.token_text(token).text
        # Bytes that turned out to be no character appear in the text now, before the token that showed it.
        return self._at - len(own) if INCOMPLETE in new and new.endswith(own) else before
