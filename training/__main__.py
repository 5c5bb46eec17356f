"""`python -m training`: the training commands by themselves."""

from training.cli import app

app()
