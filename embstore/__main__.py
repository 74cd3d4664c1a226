"""``python -m embstore`` is the ``embstore`` command."""

from embstore.cli import main

main()
