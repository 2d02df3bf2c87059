"""`flask streamchat webhooks ...`: the letters of the outbox, as an operator sees them and sends them again."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from urllib.parse import urlsplit

import click
from flask.cli import AppGroup

from .letters import Letter, State
from .opened_logs import chosen_logs, of_mount, opened

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
    for names, (settings, *_) in chosen_logs(mount).items():
        with opened(names, settings) as store:
            letters = store.outbox.letters(state, limit)
        click.echo(f"# {names}: {len(letters)} shown")
        if letters:
            click.echo(ROW.format("ID", "STATE", "ATTEMPTS", "NEXT (UTC)", "LAST", "HOST").rstrip())
        for letter in letters:
            click.echo(_row(letter))


@webhooks.command("show")
@click.argument("id")
@of_mount
def show_letter(id: str, mount: str | None) -> None:
    """Show one webhook as JSON: where it goes, what was tried, and its body."""
    for names, (settings, *_) in chosen_logs(mount).items():
        with opened(names, settings) as store:
            letter = store.outbox.find(id)
        if letter is not None:
            click.echo(json.dumps(_document(letter), indent=2))
            return
    raise click.ClickException(f"There is no webhook {id}: `flask streamchat webhooks list` shows those that are kept.")


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
    unknown = set(ids)
    count = 0
    for names, (settings, *_) in chosen_logs(mount).items():
        with opened(names, settings) as store:
            wanted = [each.id for each in store.outbox.letters("dead", MOST_AT_ONCE)] if dead else ids
            replayed = [id for id in wanted if store.outbox.replay(id, time.time())]
        count += len(replayed)
        unknown -= set(replayed)
    click.echo(f"{count:,} {'webhook' if count == 1 else 'webhooks'} to be delivered again")
    if unknown:
        raise click.ClickException(f"There is no webhook {', '.join(sorted(unknown))}.")


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
