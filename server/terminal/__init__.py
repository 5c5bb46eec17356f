"""What the commands of the terminal do and print."""

import os

from rich.console import Console

WIDTH = 160  # characters a line where nobody says how many there are


def terminal() -> Console:
    """Standard output for tables and panels; where it is no terminal, wide enough for them."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)
