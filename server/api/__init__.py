"""HTTP: routes, responses, keys and errors. Nothing here imports torch."""
