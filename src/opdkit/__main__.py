"""`python -m opdkit` is the `opd` command; launchers of several processes want a module."""

from opdkit.cli import app

app()
