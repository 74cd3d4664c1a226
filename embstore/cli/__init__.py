"""The command line: options -> config -> one call of the library. Nothing is computed here.

Results go to stdout, messages to stderr; ``--json`` wherever a program may read. Exit codes are core.errors.ExitCode. Each
command has its file; the import below lists them in the order of ``--help``.
"""

import signal

from embstore.cli import build, import_array, inspect, verify, weights, compare, resample, doctor, export  # isort: skip
from embstore.cli.frame import app, replace_unencodable, stop
from embstore.host.signals import STOP_SIGNALS

__all__ = ["app", "build", "compare", "doctor", "export", "import_array", "inspect", "main", "resample", "verify", "weights"]


def main() -> None:
    """Entry point of the ``embstore`` command."""
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    replace_unencodable()
    app()
