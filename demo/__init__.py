"""The embedded demo: a small closed world in plain English, a language model of it, and an exact judge."""
