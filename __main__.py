"""`python -m orthoact`."""

from .cli import main

main(prog_name="orthoact")
