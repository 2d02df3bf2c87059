"""`python -m streamchat` is the worker. gevent's own start runs this file: the module is imported before it."""

from __future__ import annotations

from .worker import main

if __name__ == "__main__":
    main()
