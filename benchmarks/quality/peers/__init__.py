"""One file per tool.

Each has `POST_TRAINING` (False: the weights are trained for their bits),
`PACKAGES` (whose versions are noted), `LEAVES` (what stays in float32, in
words), `SETTINGS` (name -> arguments) and `build(bench, **arguments)`, which
returns a `stored.System`.
"""
