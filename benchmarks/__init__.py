"""Speed, side by side in one run: `python -m benchmarks.engine --help`. Ratios count; seconds are one machine's."""
