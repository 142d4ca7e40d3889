"""Starts the page: `python app.py`, then open http://127.0.0.1:7860."""

import sys

from sdlora.errors import UserError
from sdlora.ui import page
from sdlora.ui.roots import Roots

if __name__ == "__main__":
    try:
        page.launch(Roots())
    except UserError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
