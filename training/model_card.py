"""The model card of a checkpoint: everything in it comes from the run that made it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from steering.column import Column, attribute_names
from steering.types import Gate
from training.data.samples import Form
from training.evaluation.evaluator import GateMeans
from training.evaluation.report import markdown
from training.evaluation.results import Evaluation
from training.evaluation.tasks import METRICS
from training.methods import METHODS


def render_card(
    *,
    name: str,
    version: str,
    method: str,
    base_model: str,
    columns: Sequence[Column],
    training: Mapping[str, Any],
    gates: Sequence[GateMeans],
    evaluation: Evaluation | None,
    positions: str,
) -> str:
    """The card as Markdown."""
    attributes = attribute_names(columns)
    title = METHODS[method].title if method in METHODS else method
    sites = ", ".join(dict.fromkeys(str(column.site) for column in columns))
    parts = [
        f"---\nbase_model: {base_model}\ntags: [activation-steering, {method}]\n---\n",
        f"# {name}, version {version}\n",
        f"Steers **{', '.join(attributes)}** of `{base_model}` at `{sites}`. Method: {title}. "
        f"Steered positions: {positions}.{_form(training)}{_searched(training)}\n",
        _data(training),
        "## Hyperparameters\n",
        _table(["setting", "value"], [[key, value] for key, value in training["hyperparameters"].items()]),
        "## Vectors\n",
        _vectors(columns),
        _gates(gates),
        _evaluation(evaluation),
        _usage(name, version, columns, training),
        _limits(base_model, sites),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _form(training: Mapping[str, Any]) -> str:
    """In words; nothing where it is not known, as for imported features."""
    forms = {
        Form.CHAT: f" Trained on conversations, as {_template(training)} renders them: steer chats with it.",
        Form.PLAIN: " Trained on plain text, without a chat template: steer texts that are continued with it.",
    }
    return forms[Form(training["form"])] if "form" in training else ""


def _searched(training: Mapping[str, Any]) -> str:
    """How the place was come by, where it was not given."""
    return f" Place and strength were looked for on {training['searched']}." if "searched" in training else ""


def _template(training: Mapping[str, Any]) -> str:
    """Which chat template, in words."""
    about = training.get("chat_template", {"file": None, "kwargs": {}})
    which = "the model's chat template"
    if about["file"]:
        which = f"the chat template `{about['file']}` (sha256 `{about['sha256'][:12]}`), not the model's own,"
    return f"{which} with `{json.dumps(about['kwargs'])}`" if about["kwargs"] else which


def _data(training: Mapping[str, Any]) -> str:
    files = [[d["name"], f"`{d['path']}`", f"`{d['sha256'][:12]}`"] for d in training["data"]]
    counts = [
        [c["attribute"], c["split"], c["positive"], c["negative"], c["groups"]] for c in training["splits"]["counts"]
    ]
    return "\n".join(
        [
            "## Data and splits\n",
            *([_table(["data", "file", "sha256"], files)] if files else ()),
            _table(["attribute", "split", "positive", "negative", "groups"], counts),
            f"Split by group; where the data names no split, by seed {training['seed']}. Only train is fitted on.\n",
        ]
    )


def _vectors(columns: Sequence[Column]) -> str:
    """A line for all columns that an attribute has at one site."""
    together: dict[tuple[str, str], list[Column]] = {}
    for column in columns:
        together.setdefault((column.attribute, str(column.site)), []).append(column)
    rows = [
        [name, site, own[0].gate_and_site, _norms(own), f"{own[0].default_multiplier:g}",
         f"{own[0].range[0]:g} to {own[0].range[1]:g}"]
        for (name, site), own in together.items()
    ]  # fmt: skip
    return _table(["attribute", "site", "gate", "norm of the vector", "default multiplier", "range"], rows)


def _norms(columns: Sequence[Column]) -> str:
    if clamp := columns[0].clamp:
        return f"1, projection set to {clamp.origin + columns[0].default_multiplier * clamp.value:.3f}"
    norms = sorted(float(column.vector.norm()) for column in columns)
    return f"{norms[0]:.3f}" if len(norms) == 1 else f"{len(norms)} of {norms[0]:.3f} to {norms[-1]:.3f}"


def _gates(gates: Sequence[GateMeans]) -> str:
    if not gates:
        return ""
    rows = [
        [g.attribute, g.site, g.split, f"{g.positive:.3f}", f"{g.negative:.3f}",
         f"{g.negative / g.positive:.1f}" if g.positive > 0 else "-"]
        for g in gates
    ]  # fmt: skip
    header = ["attribute", "site", "split", "mean gate on positives", "on negatives", "negatives / positives"]
    return "## Gates\n\n" + _table(header, rows)


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "## Evaluation\n\nNone: there was neither a judge nor a prompt with answers of both labels.\n"
    settings = ", ".join(f"{key} {value}" for key, value in evaluation.settings.items())
    how = "Judged generations." if evaluation.kind == "generation" else _metrics(evaluation)
    return f"## Evaluation\n\n{how} Percent, with 95 % intervals.\n\n{markdown(evaluation)}\nSettings: {settings}.\n"


def _metrics(evaluation: Evaluation) -> str:
    names = dict.fromkeys(name.rpartition(" ")[2] for name in evaluation.metrics)
    told = "; ".join(f"`{name}` is {METRICS[name].about}" for name in names if name in METRICS)
    return f"Answers by likelihood: {told}."


def _usage(name: str, version: str, columns: Sequence[Column], training: Mapping[str, Any]) -> str:
    asked = '"prompt": "..."'
    if training.get("form") == Form.CHAT:
        asked = '"messages": [{"role": "user", "content": "..."}]'
        if kwargs := training.get("chat_template", {}).get("kwargs"):
            asked += f', "chat_template_kwargs": {json.dumps(kwargs)}'
    defaults = ", ".join(
        f'"{c.attribute}": {c.default_multiplier:g}' for c in {c.attribute: c for c in columns}.values()
    )
    gated = any(column.gate is Gate.SIGMOID for column in columns)
    return (
        "## How to use\n\n"
        "```bash\n"
        "curl -s localhost:8000/generate -H 'content-type: application/json' -d '{\n"
        f'  {asked}, "checkpoint": "{name}@{version}",\n'
        f'  "attributes": {{{defaults}}}, "baseline": true}}\'\n'
        "```\n\n"
        "A multiplier of 0 leaves an attribute alone; a negative one subtracts the vector"
        + (", but a sigmoid gate is closed on text that is positive already.\n" if gated else ".\n")
    )


def _limits(base_model: str, sites: str) -> str:
    return (
        "## Limits\n\n"
        f"- For `{base_model}` at `{sites}` only; another model has other activations.\n"
        "- The rates hold for prompts like those evaluated on; elsewhere measure again (`matsteer evaluate`).\n"
        "- Large multipliers cost fluency: watch the perplexity ratio.\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
