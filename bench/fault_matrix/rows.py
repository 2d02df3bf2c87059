"""One row of the matrix: what is done, by whom and when, and what each format is promised for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from .callers import Caller
from .cells import Promises
from .chain import Chain
from .model import WHOLE, Script, good


def nothing(chain: Chain) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Row:
    """`deed` is done once, when all six callers have their first piece; `leave` by each of them, `at` a moment.

    `around` holds from before the questions until all slots were asked for. `at`: piece, asked, refused (the model
    said no and will be asked again). `from_deed`: seconds count from the deed, not from the upstream's mark.
    """

    name: str
    done: str
    promises: Promises
    scripts: tuple[Script, ...] = (good,)
    plan: str = "main"
    own: bool = False  # servers of its own, which do not outlive it
    deed: Callable[[Chain], None] | None = None
    leave: Callable[[Caller], None] | None = None
    at: str = "piece"
    around: Callable[[Chain], AbstractContextManager[None]] = nothing
    keyed: bool = False  # with an Idempotency-Key
    stalls: bool = False  # callers that read nothing until they are given up
    elsewhere: bool = False  # the slot is asked for at the second server
    whole: str = WHOLE
    headers: Mapping[str, str] = field(default_factory=dict)
