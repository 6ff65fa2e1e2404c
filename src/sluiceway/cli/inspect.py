"""`sluiceway inspect`: what an app would run, without connecting to anything."""

from __future__ import annotations

import click
import msgspec

from ..app import App
from ..assembly import check_start
from ..consumer import ConsumerDef
from .find import app_once, find_app
from .run import prepare
from .topology import ConsumerView, describe, group_of
from .words import heading, many

EPILOG = """\b
Examples:
  sluiceway inspect shop:app
  sluiceway inspect shop:app --set payments.concurrency=20
  sluiceway inspect shop:app --json | jq '.consumers[].window'

Nothing is connected to and no handler is called; the app's module is imported
and its middleware is made. What a start would refuse is refused here too."""


@click.command(epilog=EPILOG, short_help="Show consumers, options and guarantees, offline.")
@click.argument("reference", metavar="[MODULE:APP]", required=False)
@click.option("named", "--app", metavar="MODULE:APP", help="The app; the same as the argument.")
@click.option(
    "sets", "--set", multiple=True, metavar="CONSUMER.OPTION=VALUE", help="As if `run` were given it. Repeatable."
)
@click.option("--url", metavar="URL", help="The broker, instead of SLUICEWAY_URL and the app's own.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")
def inspect(reference: str | None, named: str | None, sets: tuple[str, ...], url: str | None, as_json: bool) -> None:
    """Show each consumer, every effective option with its origin, and what is guaranteed. Offline."""
    found = find_app(app_once(reference, named), url)
    prepare(found.app, sets, ())
    views = [_checked(found.app, one) for one in found.app.consumers.values()]
    if as_json:
        features = found.app.transport.features
        whole = {"app": found.reference, "how": found.how, "broker": found.app.broker}
        click.echo(msgspec.json.encode({**whole, "features": features, "consumers": views}).decode())
        return
    click.echo(f"{heading(found.reference)} ({found.how}) on {found.app.broker}: {many(len(views), 'consumer')}")
    for view in views:
        click.echo()
        _show(view)


def _checked(app: App, definition: ConsumerDef) -> ConsumerView:
    """A consumer's view. Raises what its start would, but for what only the broker itself can refuse."""
    check_start(
        definition,
        group=group_of(app, definition),
        features=app.transport.features,
        lifespan=app.lifespan,
        middleware=app.middleware,
        batch_middleware=app.batch_middleware,
    )
    return describe(app, definition)


def _show(view: ConsumerView) -> None:
    click.echo(heading(view.name))
    click.echo(f"  {', '.join(view.topics)} → group {view.group} → {view.payload} → {view.concurrency} {view.runs_on}")
    for batcher in view.batchers:
        click.echo(f"    → batches {batcher}")
    for what, names in (("middleware", view.middleware), ("batch middleware", view.batch_middleware)):
        if names:
            click.echo(f"    → {what} {', '.join(names)}")
    for gate in view.gates:
        click.echo(f"    → gate {gate}")
    click.echo(f"    → dead letters {', '.join(view.dead_letters)}")
    click.echo("\n  Guarantees")
    _rows([(name, text, "") for name, text in view.guarantees.items()])
    click.echo("\n  Options")
    _rows([(name, str(one.value), one.origin) for name, one in view.options.items()])


def _rows(rows: list[tuple[str, str, str]]) -> None:
    first = max(len(name) for name, _, _ in rows)
    second = max((len(text) for _, text, more in rows if more), default=0)
    for name, text, more in rows:
        styled = click.style(more, dim=True) if more == "default" else heading(more)
        click.echo(
            f"    {name:<{first}}  {text:<{second}}  {styled}".rstrip() if more else f"    {name:<{first}}  {text}"
        )
