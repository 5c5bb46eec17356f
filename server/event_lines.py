"""Lines of server-sent events (WHATWG HTML, section 9.2), as they come over HTTP."""


class EventLines:
    """Makes lines of pieces of text. Only a line feed ends one, after a carriage return or not: httpx's `iter_lines`
    cuts at all that ends a line for `str.splitlines`, such as U+2028, which may stand in a text in JSON."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[str]:
        """The lines that end in this piece."""
        *lines, self._rest = (self._rest + text).split("\n")
        return [line.removesuffix("\r") for line in lines]
