"""`python -m linearize.cli`, the form that launchers start."""

from linearize.cli import main

main()
