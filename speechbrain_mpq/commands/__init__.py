"""The commands of `speechbrain-mpq`, one module each, and what they share.

A command has `HELP` (one line), `EXAMPLE` (command lines), `add_arguments`
(to an argparse parser) and `run` (the parsed options in, exit status out: 0
where all is well). It imports what is heavy inside `run`, so that `--help`
answers at once. What the user can mend is raised as ValueError, OSError or
ImportError, and printed.
"""
