"""`python -m revox.cli`."""

from revox.cli.main import main

main()
