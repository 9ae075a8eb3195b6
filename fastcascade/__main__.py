"""``python -m fastcascade``: the same as the ``fastcascade`` command; launchers such as torchrun need it."""

from fastcascade.cli import main

if __name__ == "__main__":
    main()
