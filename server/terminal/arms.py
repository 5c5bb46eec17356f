"""Answers side by side."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from rich.columns import Columns
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from server.api.bodies import CompareResponse, ComparisonBody, GenerateResponse, PartBody, ResultBody, SteeringBody
from server.terminal import terminal

COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


def show_arms(prompt: str, answer: GenerateResponse | CompareResponse) -> None:
    """The arms' texts side by side, with how far each is from the one that it is compared with."""
    if isinstance(answer, CompareResponse):
        arms = [(arm.name, arm.results[0], arm.comparison) for arm in answer.arms]
    else:
        arms = [("steered", answer.results[0], answer.comparison)]
        arms += [("baseline", result, None) for result in answer.baseline or []]
    attributes = list(dict.fromkeys(name for _, result, _ in arms for name in _traced(result)))
    colours = dict(zip(attributes, cycle(COLOURS), strict=False))
    console = terminal()
    console.print(Text(prompt, style="bold"))
    width = max(24, console.width // len(arms) - 1)
    console.print(Columns([_panel(name, result, comparison, colours, width) for name, result, comparison in arms]))
    if colours:
        legend = Text("moved most by ")
        for name, colour in colours.items():
            legend.append(f" {name} ", style=f"black on {colour}").append(" ")
        console.print(legend)


def _panel(title: str, result: ResultBody, comparison: object, colours: Mapping[str, str], width: int) -> Panel:
    steering = result.steering
    parts: Sequence[PartBody | SteeringBody] = steering.parts or [steering]
    used = [
        f"{part.checkpoint}@{part.version} {name}={value:g}"
        for part in parts
        for name, value in part.attributes.items()
    ]
    lines = [_coloured(result, colours), Text()]
    if isinstance(comparison, ComparisonBody):
        where = "never" if comparison.first_divergence is None else f"at token {comparison.first_divergence}"
        lines.append(
            Text(
                f"parts {where}; KL a token {comparison.kl_per_token:.3f} nats; "
                f"perplexity ratio {comparison.perplexity_ratio:.2f}",
                style="dim",
            )
        )
    lines.append(Text(f"{', '.join(used) or 'no steering'}; {steering.steered_tokens} steered tokens", style="dim"))
    return Panel(Group(*lines), title=Text(title), width=width)


def _traced(result: ResultBody) -> list[str]:
    return [touch.attribute for token in result.trace or () for touch in token.columns if touch.strength]


def _coloured(result: ResultBody, colours: Mapping[str, str]) -> Text:
    """Each token by the attribute whose strength is the greatest, from a tenth on; the text alone without a trace."""
    if not any(token.columns for token in result.trace or ()):
        return Text(result.text)
    text = Text()
    for token in result.trace or ():
        most = max(token.columns, key=lambda touch: abs(touch.strength), default=None)
        shown = most is not None and abs(most.strength) >= 0.1
        text.append(token.token, style=f"black on {colours[most.attribute]}" if shown and most else "")
    return text
