"""Serve steered text: HTTP in front, one engine thread behind, one batch for every mix of steering."""
