"""`python -m sdlora` is the same as `sdlora`."""

from sdlora.cli import main

main()
