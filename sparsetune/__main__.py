"""`python -m sparsetune` is the command `sparsetune`."""

from sparsetune.cli.main import main

main()
