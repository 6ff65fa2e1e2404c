"""The groups of an app's consumers at the broker: what they need there, what of it is missing, and making it."""

from __future__ import annotations

import click

from .._decisions.topics import matches
from ..app import App
from ..assembly import window_bounds
from ..consumer import ConsumerDef
from ..source import Subscription
from .topology import group_of


def subscription_of(app: App, definition: ConsumerDef) -> Subscription:
    """What a consumer subscribes to, for those who only look at it."""
    return Subscription(
        topics=definition.topics,
        group=group_of(app, definition),
        window=window_bounds(definition, definition.batchings())[1],
        start=definition.value("start"),
        order_by=definition.value("order_by"),
    )


async def missing(app: App, subscription: Subscription, *, create: bool = False) -> list[str]:
    """What is not there; with `create`, what could not be made."""
    findings = await app.transport.ensure([subscription], create=create)
    return [one.text for one in findings if one.level == "error"]


async def make_groups_of(app: App, topic: str) -> None:
    """Make what the app's consumers of `topic` need, where the broker keeps nothing for groups that are not there.

    So what is published before their first run waits for it, as on other brokers. What was made, or cannot be, is said
    on standard error.
    """
    if app.transport.features.retains:
        return
    for one in app.consumers.values():
        if any(matches(pattern, topic) for pattern in one.topics):
            subscription = subscription_of(app, one)
            if await missing(app, subscription):
                problems = await missing(app, subscription, create=True)
                said = f"cannot be made: {problems[0]}" if problems else "was made: it has not run yet"
                click.echo(f"what {one.name} needs at the broker {said}", err=True)
