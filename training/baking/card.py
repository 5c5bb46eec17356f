"""The model card of a baked model."""

from collections.abc import Mapping, Sequence

from steering.checkpoint import Checkpoint
from steering.types import Site


def render(
    base_model: str,
    checkpoint: Checkpoint,
    multipliers: Sequence[float],
    sites: Sequence[Site],
    switched: Mapping[str, bool],
    apart: float,
) -> str:
    """The card as Markdown."""
    config = checkpoint.config
    rows = [
        f"| {column.attribute} | {column.site} | {multiplier:g} |"
        for column, multiplier in zip(checkpoint.columns, multipliers, strict=True)
        if multiplier
    ]
    settings = " and ".join(f"`{name}`" for name in switched)
    changed = f" Its config has {settings} switched on; every other new bias is 0." if switched else ""
    return "\n".join(
        [
            f"---\nbase_model: {base_model}\ntags: [activation-steering, baked]\n---\n",
            f"# {base_model} with {config.name}, version {config.version}, in its weights\n",
            f"`{base_model}` with the steering vectors of the checkpoint `{config.name}@{config.version}` "
            f"({config.method}, sha256 `{config.sha256[:12]}`) added to biases at "
            f"{', '.join(f'`{site}`' for site in sites)}.{changed} No code is needed:\n",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
            "```\n",
            "| attribute | site | multiplier |",
            "| --- | --- | --- |",
            *rows,
            "",
            "## What is different from steering at run time\n",
            "- A bias acts at **every position, the prompt's included**: this model equals the one that is steered at "
            f"positions `all`. The checkpoint's own positions are `{config.positions}`.",
            "- The multipliers are fixed, and so is the steering of every request.",
            f"- When it was written, its logits differed from the run-time hook's by {apart:.2g} of what steering "
            "changes.",
            "- The rates in the checkpoint's card were measured with its own positions: measure this model again.",
            "",
        ]
    )
