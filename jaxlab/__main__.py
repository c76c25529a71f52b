"""`python -m jaxlab` is the command line."""

from .cli import main

main()
