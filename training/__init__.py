"""Training of steering columns: data -> activations -> fit -> evaluate -> checkpoint folder.

Imports `steering`, never `server`.
"""
