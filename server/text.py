"""Text to token ids and back, with the model's own tokenizer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from server.detokenizer import INCOMPLETE, Detokenizer
from server.errors import InvalidField, PromptTooLong

# A text with more characters a token than this is refused unread: tokenizing it would take long, and be for nothing.
LONGEST_TOKEN = 64
LONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # as SentencePiece names the tokens of single bytes


def _byte_of_character() -> dict[str, int]:
    """What each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, the other way round):
    printable bytes for themselves, the others, in order, for those from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class Spelling(NamedTuple):
    """One token's text, and the bytes it stands for: of a token that is part of a character the text cannot be told,
    but the bytes can. None: they cannot either."""

    text: str
    raw: bytes | None


class Codec:
    """A tokenizer that answers bad input with an error naming the field. Used from several threads."""

    def __init__(self, tokenizer: Any, *, vocab: int, context: int | None) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._spelled: dict[int, Spelling] = {}
        self.context = context
        # The first call may set the tokenizer up; later ones only read it.
        tokenizer("warm")

    def encode(self, prompt: str | tuple[int, ...], param: str, what: str = "prompt") -> tuple[int, ...]:
        """The prompt's ids, with the special tokens that the tokenizer puts around a text; ids stay as they are.
        `what`: its name in errors."""
        if not isinstance(prompt, str):
            return self._checked(prompt, param, what)
        self._check_text(prompt, param)
        self._check_length(len(prompt), param, what)
        return self._checked(self._tokenizer(prompt)["input_ids"], param, what)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], param: str) -> tuple[int, ...]:
        """The ids of a conversation under the tokenizer's chat template, open for the next answer."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidField("This model has no chat template; send 'prompt' instead of 'messages'.", param=param)
        for index, message in enumerate(messages):
            self._check_text(message["content"], f"{param}.{index}.content")
        self._check_length(sum(len(message["content"]) for message in messages), param)
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs: they refuse by raising whatever they like
            raise InvalidField(f"The model's chat template refuses these messages: {error}", param=param) from error
        return self._checked(self._tokenizer(text, add_special_tokens=False)["input_ids"], param)

    def split(self, prompt: str, continuation: str, param: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of a prompt and of what continues it. They are those of the whole text, so that the continuation is
        spelled as the model knows it; where its beginning melts into the prompt's last token, that one belongs to it.
        """
        self._check_text(continuation, param)
        before = self.encode(prompt, "prompt")
        whole = self.encode(prompt + continuation, param, "prompt with this continuation")
        common = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        if not 0 < common < len(whole):
            raise InvalidField("The continuation adds no token to the prompt.", param=param)
        return whole[:common], whole[common:]

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

    def spell(self, token: int) -> Spelling:
        """One token, special ones included."""
        spelling = self._spelled.get(token)
        if spelling is None:
            text = self.decode_all([token])
            spelling = Spelling(text, self._bytes(token) if INCOMPLETE in text else text.encode())
            self._spelled[token] = spelling
        return spelling

    def _bytes(self, token: int) -> bytes | None:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if lone := LONE_BYTE.fullmatch(name):
            return bytes.fromhex(lone[1])
        if all(character in BYTE_OF_CHARACTER for character in name):
            return bytes(BYTE_OF_CHARACTER[character] for character in name)
        return None

    @staticmethod
    def _check_text(text: str, param: str) -> None:
        """Half a surrogate pair is valid in JSON and in Python, but no tokenizer can read it."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidField("The text holds half of a surrogate pair, which is no character.", param=param) from None

    def _check_length(self, characters: int, param: str, what: str = "prompt") -> None:
        if self.context is not None and characters > LONGEST_TOKEN * self.context:
            raise PromptTooLong(
                f"The {what} has {characters} characters, more than fit: prompt and answer together may have "
                f"{self.context} tokens.",
                param=param,
            )

    def _checked(self, ids: Sequence[int], param: str, what: str = "prompt") -> tuple[int, ...]:
        if not ids:
            raise InvalidField(f"The {what} has no tokens.", param=param)
        if max(ids) >= self._vocab:
            raise InvalidField(
                f"The {what} has token {max(ids)}, but the model knows {self._vocab} tokens only.", param=param
            )
        if self.context is not None and len(ids) >= self.context:
            raise PromptTooLong(
                f"The {what} has {len(ids)} tokens; prompt and answer together may have {self.context}, "
                f"so a prompt may have {self.context - 1}.",
                param=param,
            )
        return tuple(ids)


class Offsets:
    """Where the tokens of a text begin, in its characters, told one after the other."""

    def __init__(self, codec: Codec, before: Sequence[int], *, special: bool = False) -> None:
        """`before`: the tokens before the text; `special`: it shows special tokens, too."""
        self._codec = codec
        self._detokenizer = Detokenizer(codec.decode_all if special else codec.decode, before)
        self._at = 0

    def next(self, token: int) -> int:
        """How many characters of the text stand before this token."""
        before = self._at
        self._detokenizer.push(token)
        piece = self._detokenizer.read()
        self._at += len(piece)
        own = self._codec.spell(token).text
        # Bytes that have turned out to be no character are shown now, before the token that shows it.
        return self._at - len(own) if INCOMPLETE in piece and piece.endswith(own) else before
