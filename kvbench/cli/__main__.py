"""`python -m kvbench.cli`."""

from kvbench.cli import main

main()
