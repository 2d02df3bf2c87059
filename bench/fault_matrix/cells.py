"""One cell of the matrix: what is promised for a fault and a format, what was measured, and where the two differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

SPARE = 0.3  # seconds that processes on a busy machine may take beyond a promised time


@dataclass(frozen=True)
class Promise:
    """`saw` is in the words of `formats`. `told` are the answer's log lines, `kept` its rows in the log's ledger.

    `within`: seconds until the caller knows, or, where it leaves, until the model's connection is closed; None where
    an answer only takes its time. `freed`: seconds after that in which its user may ask again.
    """

    saw: str
    posts: int = 1
    told: tuple[str, ...] = ("completed",)
    kept: tuple[str, ...] = ("completed",)
    within: float | None = None
    freed: float = 0.5
    notes: frozenset[str] = frozenset()


Promises = Mapping[str, Promise]


@dataclass(frozen=True)
class Cell:
    """What came of it. `late` is how long the machine let a sleeping thread wait meanwhile."""

    row: str
    format: str
    promise: Promise
    saw: str
    text: str = ""
    posts: int = 0
    told: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    seconds: float | None = None
    freed: float | None = None
    notes: frozenset[str] = frozenset()
    leaked: tuple[str, ...] = ()
    late: float = 0.0

    def faults(self, whole: str) -> list[str]:
        """Where the cell is not as promised; `whole` is the text of the whole answer."""
        promise = self.promise
        pairs = {
            "saw": (self.saw, promise.saw),
            "upstream calls": (self.posts, promise.posts),
            "log lines": (self.told, promise.told),
            "ledger rows": (self.kept, promise.kept),
            "notes": (sorted(self.notes), sorted(promise.notes)),
        }
        found = [f"{name}: {got}, not {wanted}" for name, (got, wanted) in pairs.items() if got != wanted]
        found += [f"the caller read {word!r}" for word in self.leaked]
        return found + self._text_faults(whole) + self._time_faults()

    def _text_faults(self, whole: str) -> list[str]:
        if self.saw in ("whole", "finish stop") and self.text != whole:
            return [f"whole, but the text is {self.text!r:.80}"]
        return [] if whole.startswith(self.text) else [f"the text is no beginning of the answer: {self.text!r:.80}"]

    def _time_faults(self) -> list[str]:
        times = {
            "seconds": (self.seconds, self.promise.within),
            "slot free after": (self.freed, self.promise.freed),
        }
        return [
            f"{name}: {taken if taken is None else round(taken, 3)}, not {most} s"
            for name, (taken, most) in times.items()
            if most is not None and (taken is None or taken > most + SPARE + self.late)
        ]


# --- promises of whole rows ---------------------------------------------------------------------------------

TEXT, SSE, NDJSON, JSON, UI, OPENAI = "text/plain", "SSE", "NDJSON", "JSON", "UI stream", "OpenAI chunks"
NAMES = (TEXT, SSE, NDJSON, JSON, UI, OPENAI)
STREAMED = (TEXT, SSE, NDJSON, UI, OPENAI)
IN_BAND = (SSE, NDJSON, UI, OPENAI)


def alike(promise: Promise) -> Promises:
    return dict.fromkeys(NAMES, promise)


def changed(promises: Promises, names: Iterable[str] = NAMES, **values: object) -> Promises:
    """The same promises, some values of these formats being others."""
    named = set(names)
    return {
        name: replace(each, **values) if name in named else each  # type: ignore[arg-type]
        for name, each in promises.items()
    }


def _ended(saw: str, outcome: str, within: float | None) -> Promise:
    return Promise(saw, told=(outcome,), kept=(outcome,), within=within)


def before(status: int, code: str, posts: int = 1, within: float = 0.5) -> Promises:
    """Nothing was written yet: the true status in every format (DESIGN.md section 4)."""
    return changed(alike(_ended(f"{status} {code}", code, within)), posts=posts)


def amid(code: str, status: int, within: float | None = 0.5) -> Promises:
    """After the first byte: an error in the format, a broken connection in text/plain; JSON has its true status."""
    error = _ended(f"error {code}", code, within)
    broken = replace(error, saw="broken")
    return dict.fromkeys(IN_BAND, error) | {TEXT: broken, JSON: replace(error, saw=f"{status} {code}")}


def opened(code: str, status: int, within: float) -> Promises:
    """After the status hold, before the first piece: text/plain and JSON have written nothing yet."""
    return {**amid(code, status, within), TEXT: before(status, code, within=within)[TEXT]}


def finished(reason: str = "stop", posts: int = 1) -> Promises:
    """A whole answer: text/plain ends clean, all others say why the model ended."""
    each = alike(Promise(f"finish {reason}", posts=posts))
    return {**each, TEXT: replace(each[TEXT], saw="whole")}


def left(outcome: str = "caller_left", within: float = 0.05, saw: str = "left") -> Promises:
    """Nobody reads any more: the model's connection is closed (DESIGN.md section 5: 50 ms at p99)."""
    return alike(_ended(saw, outcome, within))
