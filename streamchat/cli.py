"""`flask streamchat ...`: what an operator asks of an app from its shell."""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import AppGroup

from .mount import Mount
from .settings import TABLE, key

commands = AppGroup("streamchat", help="Look at the streamchat blueprints of this app.")


@commands.command("settings")
def show_settings() -> None:
    """Show every setting of every mounted blueprint, with its value. Secrets are not shown."""
    mounts: dict[str, Mount] = current_app.extensions.get("streamchat", {})
    for name, mount in mounts.items():
        click.echo(f"# blueprint {name}")
        for setting in TABLE.values():
            click.echo(f"{key(setting.name):34} {_shown(mount, setting.name):24} {setting.metadata['help']}")


def _shown(mount: Mount, name: str) -> str:
    value = getattr(mount.settings, name)
    if TABLE[name].metadata["secret"]:
        return "(set)" if value else "(not set)"
    return repr(list(value) if isinstance(value, tuple) else value)
