"""``python -m graphq`` is the ``graphq`` command."""

from graphq.cli import main

if __name__ == "__main__":
    main()
