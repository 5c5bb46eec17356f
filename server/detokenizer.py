"""Moved to server/tokenizer.py; `server/engine` still imports it from here."""

from server.tokenizer import Detokenizer

__all__ = ["Detokenizer"]
