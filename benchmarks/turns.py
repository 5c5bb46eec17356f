"""Whose turn it is."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """All of them; every round begins with another one, since who comes after whom makes a difference."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]
