"""What callers do, and what happens to gunicorn and nginx while answers run."""

from __future__ import annotations

from tests.fake_upstream import Hang, Step, error, head, text

from .callers import Caller
from .cells import JSON, STREAMED, amid, before, changed, finished, left
from .deeds import (
    cancel_elsewhere,
    kill_nginx,
    kill_worker,
    reload_master,
    reload_nginx,
    stop_master,
    stop_nginx,
    stop_worker,
    with_full_worker,
)
from .model import FIRST, flood, lasting, words
from .rows import Row

LEASE = 2.0  # seconds; chain.PLANS
REAPED = LEASE + 5  # docs/resume.md: a killed worker's answers are settled within the lease and 5 s
DRAIN = 2.0  # seconds of the 8 of `grace` after which answers that still run are told
SWEEP = 1.0  # the stop is seen, and answers are told, once a second each
WRITE = 3.0  # seconds; chain.LIMITS
LONG = 1.5  # seconds that an answer still takes when a server is told to stop: within DRAIN
NO_HEAD = "no reply"  # application/json has no head before its end: the connection just closes


def silent(mark: Step) -> Step:
    return [head(), text(FIRST), Hang()]


def hang(mark: Step) -> Step:
    return Hang()


def endless(mark: Step) -> Step:
    """Pieces for longer than any deed takes, so that the limit between pieces is not what ends the answer."""
    return lasting(20)(mark)


ENDLESS, SOON = "".join(words(20)), "".join(words(LONG))
GONE = left()
HALF = changed(left(saw="broken"), [JSON], saw=NO_HEAD)
STALLED = changed(
    left("caller_stalled", WRITE + 2 * SWEEP, saw="broken"), [JSON], told=("completed",), kept=("completed",)
)
KILLED = changed(
    changed(amid("interrupted", 500), STREAMED, saw="broken"), told=(), kept=("interrupted",), freed=REAPED
)
HOP_GONE = changed(left(saw="broken", within=0.5), [JSON], saw=NO_HEAD)
DRAINED = amid("draining", 503, DRAIN + 2 * SWEEP)

CALLERS = (
    Row(
        "hang-up in the opening",
        "The caller closes before the model has sent headers.",
        GONE,
        (hang,),
        leave=Caller.close,
        at="asked",
    ),
    Row(
        "hang-up before a retry",
        "The caller closes after the model's first 500, before it is asked again.",
        GONE,
        (lambda mark: [error(500), mark],),
        leave=Caller.close,
        at="refused",
    ),
    Row("hang-up by FIN", "The caller closes after the first piece.", GONE, (silent,), leave=Caller.close),
    Row("hang-up by RST", "The caller resets after the first piece.", GONE, (silent,), leave=Caller.reset),
    Row(
        "half-close",
        "The caller closes its sending side after the first piece and reads on: a leaving caller.",
        HALF,
        (silent,),
        leave=Caller.half_close,
    ),
    Row(
        "stops reading",
        f"The caller reads nothing of 8 MB; a piece may lie unread for {WRITE:.0f} s.",
        STALLED,
        (flood,),
        stalls=True,
        whole=FIRST + ("x" * 1023 + " ") * 8192,
    ),
    Row(
        "cancelled elsewhere",
        "The answer's user stops it at another server over the same log.",
        amid("cancelled", 409, 1.0),
        (endless,),
        deed=cancel_elsewhere,
        whole=ENDLESS,
    ),
    Row(
        "worker full",
        "The worker runs as many answers as it may.",
        changed(
            before(503, "overloaded", posts=0, within=0.1),
            told=(),
            kept=(),
            notes=frozenset({"Retry-After"}),
            freed=1.0,
        ),
        plan="full",
        around=with_full_worker,
    ),
)

SERVERS = (
    Row(
        "worker killed",
        "kill -9 of the gunicorn worker after the first piece.",
        changed(KILLED, [JSON], saw="502 nginx"),
        (endless,),
        deed=kill_worker,
        whole=ENDLESS,
    ),
    Row(
        "worker told to stop, time enough",
        "SIGTERM to the worker; the answers still take 1.5 s.",
        finished(),
        (lasting(LONG),),
        deed=stop_worker,
        own=True,
        elsewhere=True,
        whole=SOON,
    ),
    Row(
        "worker told to stop, no end",
        f"SIGTERM to the worker; the answers would go on. They are told after {DRAIN:.0f} of {4 * DRAIN:.0f} s.",
        DRAINED,
        (endless,),
        deed=stop_worker,
        own=True,
        elsewhere=True,
        whole=ENDLESS,
    ),
    Row(
        "gunicorn told to stop, time enough",
        "SIGTERM to the master; the answers still take 1.5 s.",
        finished(),
        (lasting(LONG),),
        deed=stop_master,
        own=True,
        elsewhere=True,
        whole=SOON,
    ),
    Row(
        "gunicorn told to stop, no end",
        "SIGTERM to the master; the answers would go on.",
        DRAINED,
        (endless,),
        deed=stop_master,
        own=True,
        elsewhere=True,
        whole=ENDLESS,
    ),
    Row(
        "gunicorn reloaded",
        "SIGHUP to the master; the answers still take 1.5 s.",
        finished(),
        (lasting(LONG),),
        deed=reload_master,
        own=True,
        whole=SOON,
    ),
    Row(
        "nginx reloaded",
        "SIGHUP to nginx; the answers still take 1.5 s.",
        finished(),
        (lasting(LONG),),
        deed=reload_nginx,
        own=True,
        whole=SOON,
    ),
    Row(
        "nginx killed",
        "kill -9 of nginx's workers after the first piece.",
        HOP_GONE,
        (endless,),
        deed=kill_nginx,
        own=True,
        whole=ENDLESS,
    ),
    Row(
        "nginx stopped",
        "nginx is told to stop at once.",
        HOP_GONE,
        (endless,),
        deed=stop_nginx,
        own=True,
        whole=ENDLESS,
    ),
)
