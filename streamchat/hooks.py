"""What a shop may override in a mount, as plain functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Request

from .ledger import Record
from .schema import ChatRequest
from .upstream import ClientFactory


@dataclass(frozen=True)
class Hooks:
    """Each runs in the request's context, but `on_finish`, which has an app context, as all that a worker calls has."""

    authorize: Callable[[Request], str | None] | None = None
    build_messages: Callable[[ChatRequest, str | None], Sequence[Any]] | None = None
    before_wait: Callable[[], None] | None = None
    client_factory: ClientFactory | None = None
    on_finish: Callable[[Record, str], None] | None = None
    error_text: Callable[[str, str | None], str | None] | None = None
    make_id: Callable[[], str] | None = None
    enqueue: Callable[[str], None] | None = None
