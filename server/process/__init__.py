"""The engine in a process of its own, and any number of fronts: messages, both ends of them, supervision."""
