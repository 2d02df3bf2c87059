"""`flask streamchat webhooks ...`: the letters of the outbox, as an operator sees them and sends them again."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from urllib.parse import urlsplit

import click
from flask.cli import AppGroup

from .letters import Letter, State
from .opened_logs import ask_logs, finish, of_mount
from .settings import Settings
from .store import Store

ROW = "{:36}  {:9}  {:>8}  {:19}  {:15}  {}"
MOST_AT_ONCE = 100_000  # letters that one command looks at

webhooks = AppGroup("webhooks", help="Look at the webhooks that tell the ends of background answers; send them again.")


@webhooks.command("list")
@click.option("--state", type=click.Choice(["waiting", "delivered", "dead"]), help="Only these.")
@click.option("--limit", type=click.IntRange(1, MOST_AT_ONCE), default=50, show_default=True, help="The newest.")
@of_mount
def show_letters(state: State | None, limit: int, mount: str | None) -> None:
    """List webhooks, the newest first: what became of each, and when the next attempt is due.

    A dead one is not tried any more: after ten attempts in three days, or because its receiver said so with a 410.
    """

    def show(names: str, store: Store, _: list[Settings]) -> None:
        letters = store.outbox.letters(state, limit)
        click.echo(f"# {names}: {len(letters)} shown")
        if letters:
            click.echo(ROW.format("ID", "STATE", "ATTEMPTS", "NEXT (UTC)", "LAST", "HOST").rstrip())
        for letter in letters:
            click.echo(_row(letter))

    finish(ask_logs(mount, show))


@webhooks.command("show")
@click.argument("id")
@of_mount
def show_letter(id: str, mount: str | None) -> None:
    """Show one webhook as JSON: where it goes, what was tried, and its body."""
    found: list[Letter] = []

    def find(_: str, store: Store, __: list[Settings]) -> None:
        letter = store.outbox.find(id)
        found.extend([letter] if letter is not None else [])

    all_told = ask_logs(mount, find)
    if not found:
        finish(all_told)
        raise click.ClickException(
            f"There is no webhook {id}: `flask streamchat webhooks list` shows those that are kept."
        )
    click.echo(json.dumps(_document(found[0]), indent=2))


@webhooks.command("replay")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--dead", is_flag=True, help="All dead ones.")
@of_mount
def replay(ids: tuple[str, ...], dead: bool, mount: str | None) -> None:
    """Have webhooks delivered once more, with the same id and bytes, from the first attempt on.

    A target that was switched off by a 410 is switched on again. A running worker delivers them.
    """
    if bool(ids) == dead:
        raise click.UsageError("Name the webhooks to replay, or give --dead.")
    replayed: list[str] = []

    def replay_here(_: str, store: Store, __: list[Settings]) -> None:
        wanted = [each.id for each in store.outbox.letters("dead", MOST_AT_ONCE)] if dead else ids
        replayed.extend(id for id in wanted if store.outbox.replay(id, time.time()))

    all_told = ask_logs(mount, replay_here)
    click.echo(f"{len(replayed):,} {'webhook' if len(replayed) == 1 else 'webhooks'} to be delivered again")
    unknown = set(ids) - set(replayed)
    if unknown and all_told:
        raise click.ClickException(f"There is no webhook {', '.join(sorted(unknown))}.")
    finish(all_told)


def _row(letter: Letter) -> str:
    next = _time(letter.due) if letter.state == "waiting" else "-"
    host = urlsplit(letter.target).hostname or "-"  # its path and query may hold a secret
    return ROW.format(letter.id, letter.state, letter.attempts, next, letter.told or "-", host)


def _document(letter: Letter) -> dict[str, object]:
    return {
        "id": letter.id,
        "answer": letter.answer,
        "blueprint": letter.queue,
        "target": letter.target,
        "state": letter.state,
        "attempts": letter.attempts,
        "created_at": _time(letter.created_at),
        "next_attempt": _time(letter.due) if letter.state == "waiting" else None,
        "last_result": letter.told or None,
        "body": json.loads(letter.body),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
