"""HTML pages for people, of one file each: they open without a network, run no script, and escape every text."""

from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from training.files import write_bytes

FOLDER = Path(__file__).parent
LANES = 8
"""So many attributes have a colour of their own."""
STEPS = 10
"""From nothing to the strongest colour of a token's strip."""


def render(template: str, **values: Any) -> str:
    """A template of this folder, or one that extends `page.html` from it; `title` is the page's. Generated text is
    shown as it is, whatever it holds."""
    style, policy = _style()
    return _environment().get_template(template).render(style=style, policy=policy, **values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """`render` into a file. Raises OSError."""
    write_bytes(path, render(template, **values).encode())


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["step"] = step
    return found


def step(value: float, most: float = 1.0) -> str:
    """The class of a strip: p0 to p10, away from the attribute n1 to n10."""
    found = round(STEPS * min(1.0, abs(value) / most))
    return f"{'n' if value < 0 and found else 'p'}{found}"


@cache
def _style() -> tuple[Markup, str]:
    """The style sheet, and the Content-Security-Policy that allows it and nothing else."""
    text = (FOLDER / "style.css").read_text(encoding="utf-8") + "".join(_lanes())
    hashed = b64encode(sha256(text.encode()).digest()).decode()
    markup = Markup(text)  # nosec B704: it is this package's own
    return markup, f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"


def _lanes() -> list[str]:
    """A token has one strip for each attribute, coloured by classes: a policy without inline styles allows no more."""
    rules = []
    for lane in range(LANES):
        for number in range(STEPS + 1):
            colour = f"color-mix(in oklab,var(--a{lane}) {100 * number // STEPS}%,var(--lane))"
            rules.append(f".l{lane}p{number}{{--l{lane}:linear-gradient({colour} 0 0)}}")
            striped = f"repeating-linear-gradient(135deg,{colour} 0 2px,var(--lane) 2px 4px)"
            rules.append(f".l{lane}n{number}{{--l{lane}:{striped}}}")
    for count in range(1, LANES + 1):
        images = ",".join(f"var(--l{lane},none)" for lane in range(count))
        places = ",".join(f"0 calc(100% - {5 * (count - 1 - lane)}px)" for lane in range(count))
        placed = f"background-position:{places};padding-bottom:{5 * count + 2}px"
        rules.append(f".lanes{count} .tok{{background-image:{images};{placed}}}")
    return [f"{rule}\n" for rule in rules]
