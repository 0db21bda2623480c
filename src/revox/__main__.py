"""`python -m revox`."""

from revox.cli.main import main

main()
