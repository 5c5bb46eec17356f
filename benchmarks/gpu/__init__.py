"""The check of a GPU: `python -m benchmarks.gpu --help`. What is measured is listed in `plan.py`."""
