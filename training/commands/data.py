"""`matsteer data`: what data hold."""

from typing import Annotated

import typer

from training import options as o


def show_data(
    data: Annotated[list[str], typer.Argument(metavar="NAME=PATH", help="As after --data.")],
    seed: o.Seed = 0,
) -> None:
    """Show what data hold: samples and groups of each attribute and split, and an example of each side.

    Example: matsteer data truthfulqa=TruthfulQA.csv civility=tone.jsonl
    """
    with o.one_sentence():
        from training.data import load_data, split_samples
        from training.data.summary import count_samples, counts_table, examples_table, missing_sides
        from training.evaluation.report import terminal

        samples = split_samples(load_data(data), seed=seed)
        terminal().print(counts_table(count_samples(samples)), examples_table(samples))
        for sentence in missing_sides(samples):
            o.say(f"warning: {sentence}")
