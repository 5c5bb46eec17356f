"""Where to steer, and how strongly: layers x sites x multipliers, measured on dev."""
