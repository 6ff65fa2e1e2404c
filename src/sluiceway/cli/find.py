"""Finding the app: an argument, the environment, pyproject.toml, or the one module here that makes one."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import os
import sys
import tomllib
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import click
from msgspec import Struct

from ..app import App
from ..consumer import ConsumerDef
from ..errors import SluicewayError, unknown
from .exits import BROKER, Fault

ENVIRONMENT = "SLUICEWAY_APP"
URL_ENVIRONMENT = "SLUICEWAY_URL"
HOW = "name the app, like shop:app"
FIRST = ("app", "main")  # of several modules that make an app, these win
MOST_MODULES = 500
MOST_BYTES = 1_000_000


class Found(Struct, frozen=True):
    """An app, what it is called (`module:attribute`), and how it was found."""

    app: App
    reference: str
    how: str


def find_app(given: str | None, url: str | None = None) -> Found:
    """The app to run. Its broker is `url`, else SLUICEWAY_URL, else its own. Raises Fault that says what was tried."""
    named = _named(given)
    if named is None:
        named = _by_convention()
    return _load_app(*named, url)


def find_broker(given: str | None, url: str | None, *, consumers: bool = False) -> App:
    """The app whose broker a command talks to; an app without consumers when there is only a URL, or nothing at all.

    In this order: `url`, SLUICEWAY_URL, the app that is named or found, `sqlite:///sluiceway.db`. With `consumers` the
    app is wanted for what it declares too, also when there is a URL. That none of several apps was taken is said on
    standard error.
    """
    url = url or os.environ.get(URL_ENVIRONMENT) or None
    if url and not given and not consumers:
        return App(url)
    named = _named(given)
    if named is None:
        found = _makers(Path.cwd())[0]
        chosen = _choose(found)
        if chosen is None:
            app = App(url) if url else App()
            if found:
                text = (
                    f"there are {len(found)} apps here ({_listed(found)}) and none is named with --app: on {app.broker}"
                )
                click.echo(text, err=True)
            return app
        named = (f"{chosen}:app", f"by convention, {chosen}.py")
    return _load_app(*named, url).app


def app_once(argument: str | None, option: str | None) -> str | None:
    """The app that is named as an argument or with --app. Raises UsageError when both say something else."""
    if argument and option and argument != option:
        raise click.UsageError(f"the app is named twice: {argument} and --app {option}")
    return argument or option


def wanted(app: App, only: Sequence[str]) -> list[ConsumerDef]:
    """The consumers that `--only` names; all of them when it names none. Raises Fault and OptionError."""
    if not app.consumers:
        raise Fault("the app has no consumers; declare one with @app.consumer(topic)")
    for name in only:
        if name not in app.consumers:
            raise unknown("--only", name, app.consumers, "consumer")
    return [app.consumers[name] for name in only or app.consumers]


def check_shared(app: App, what: str) -> None:
    """Raise Fault when this process cannot see `what` of other processes, or when nothing is there yet."""
    if is_private(app):
        raise Fault(f"{app.broker} lives inside one process, so nobody else sees {what}; give a --url")
    path = getattr(app.transport, "path", None)
    if path is not None and not Path(path).exists():
        raise Fault(f"{app.broker} is not there ({path}): nothing was published yet, or not from this folder", BROKER)


def is_private(app: App) -> bool:
    """Whether the app's broker lives inside the process, so that no other process can share it."""
    if app.url is None:
        return type(app.transport).__module__.startswith("sluiceway.transports.memory")
    return app.url.startswith("memory:")


def _named(given: str | None) -> tuple[str, str] | None:
    """The reference that somebody wrote down, and where."""
    _put_on_path(Path.cwd())
    if given:
        return given, "as named"
    if os.environ.get(ENVIRONMENT):
        return os.environ[ENVIRONMENT], ENVIRONMENT
    return _from_pyproject()


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _from_pyproject() -> tuple[str, str] | None:
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / "pyproject.toml"
        if not file.is_file():
            continue
        try:
            tool = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise Fault(f"{file} cannot be read: {error}; mend it, or {HOW}") from None
        reference = tool.get("sluiceway", {}).get("app")
        if reference is None:
            continue
        if not isinstance(reference, str):
            raise Fault(f'{file}: [tool.sluiceway] app must be a string like "shop:app", got {reference!r}')
        if folder != here:
            sys.path.append(str(folder))
        return reference, str(file)
    return None


def _by_convention() -> tuple[str, str]:
    found, looked = _makers(Path.cwd())
    chosen = _choose(found)
    if chosen is not None:
        return f"{chosen}:app", f"by convention, {chosen}.py"
    tried = f"Tried: {ENVIRONMENT} (not set), [tool.sluiceway] app in pyproject.toml (none here or above), "
    if found:
        raise Fault(f"there are {len(found)} apps here: {_listed(found)}; {HOW}")
    modules = ", ".join(f"{name}.py" for name in looked[:8]) + (", …" if len(looked) > 8 else "")
    raise Fault(f"no app was found; {HOW}. {tried}`app = App(...)` in {modules or 'a module here (there is none)'}")


def _listed(found: list[str]) -> str:
    return ", ".join(f"{name}:app" for name in found[:8]) + (", …" if len(found) > 8 else "")


def _choose(found: list[str]) -> str | None:
    if len(found) == 1:
        return found[0]
    return next((name for name in FIRST if name in found), None)


def _makers(folder: Path) -> tuple[list[str], list[str]]:
    """Modules in `folder` that say `app = App(...)` at their top level, and all that were read. None is imported."""
    files = [*folder.glob("*.py"), *folder.glob("*/__init__.py")]
    looked = {file.stem if file.parent == folder else file.parent.name: file for file in sorted(files)[:MOST_MODULES]}
    return [name for name, file in looked.items() if name.isidentifier() and _makes_app(file)], list(looked)


def _makes_app(file: Path) -> bool:
    try:
        if file.stat().st_size > MOST_BYTES:
            return False
        source = file.read_bytes()
        if b"App(" not in source or b"sluiceway" not in source:
            return False
        body = ast.parse(source).body
    except (OSError, SyntaxError, ValueError):  # no module, so no app
        return False
    return any(_is_app_statement(one) for one in body)


def _is_app_statement(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        targets: list[ast.expr] = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return False
    call = statement.value
    if not isinstance(call, ast.Call) or not any(isinstance(one, ast.Name) and one.id == "app" for one in targets):
        return False
    return (isinstance(call.func, ast.Name) and call.func.id == "App") or (
        isinstance(call.func, ast.Attribute) and call.func.attr == "App"
    )


# -- loading ---------------------------------------------------------------------------------------------------------


def _load_app(reference: str, how: str, url: str | None) -> Found:
    module_name, colon, attribute = reference.partition(":")
    origin = "" if how == "as named" else f" ({how})"
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise Fault(f"{reference!r}{origin} is a file; name the module: {dotted}:{attribute or 'app'}")
    if not module_name or (colon and not attribute):
        raise Fault(f"{reference!r}{origin} is not module:app")
    module = _load(module_name, origin)
    if not attribute:
        attribute = _only_app(module)
    app = _attribute(module, attribute)
    url = url or os.environ.get(URL_ENVIRONMENT)
    if url:
        app.use(url)
    return Found(app, f"{module_name}:{attribute}", how)


def _load(name: str, origin: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(missing + "."):
            raise _inside(name, error) from None
        here = [
            *{file.stem for file in Path.cwd().glob("*.py")},
            *{file.parent.name for file in Path.cwd().glob("*/*.py")},
        ]
        near = difflib.get_close_matches(missing, here, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it was looked for in {Path.cwd()} and on Python's path"
        raise Fault(f"there is no module {missing!r}{origin}{hint}") from None
    except SluicewayError as error:
        place = _last_place(error)
        raise Fault(f"{place}{error}") from None
    except SystemExit as error:
        raise Fault(f"module {name!r} exits when it is imported (code {error.code!r})") from None
    except Exception as error:
        raise _inside(name, error) from None


def _inside(name: str, error: Exception) -> Fault:
    """An error in the user's own module: its traceback goes to standard error, from the user's first line on."""
    click.echo("".join(traceback.format_exception(type(error), error, users_part(error))), err=True, nl=False)
    return Fault(f"module {name!r} cannot be imported; its own error is above")


def users_part(error: BaseException) -> TracebackType | None:
    """An error's traceback from the first line on that is not ours."""
    step = error.__traceback__
    while step is not None and _is_machinery(step.tb_frame.f_code.co_filename):
        step = step.tb_next
    return step


def _last_place(error: BaseException) -> str:
    """`file:line: ` of the user's line that an error of ours came from."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not _is_machinery(one.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""


def _is_machinery(file: str) -> bool:
    path = Path(file)
    return (
        file.startswith("<frozen")
        or file == contextlib.__file__
        or "importlib" in path.parts
        or path.is_relative_to(_PACKAGE)
    )


_PACKAGE = Path(__file__).resolve().parent.parent


def _only_app(module: ModuleType) -> str:
    apps = [name for name, value in vars(module).items() if isinstance(value, App)]
    if "app" in apps or not apps:
        return "app"
    if len(apps) > 1:
        raise Fault(
            f"module {module.__name__!r} has {len(apps)} apps: {', '.join(apps)}; "
            f"say which, like {module.__name__}:{apps[0]}"
        )
    return apps[0]


def _attribute(module: ModuleType, path: str) -> App:
    value: Any = module
    for step in path.split("."):
        if not hasattr(value, step):
            raise _no_attribute(module, value, step, path)
        value = getattr(value, step)
    if isinstance(value, App):
        return value
    apps = [name for name, other in vars(module).items() if isinstance(other, App)]
    hint = f"; the module's App is {apps[0]!r}" if apps else ""
    raise Fault(f"{module.__name__}:{path} is no App but {type(value).__name__}{hint}")


def _no_attribute(module: ModuleType, holder: Any, step: str, path: str) -> Fault:
    apps = (
        [name for name, other in vars(holder).items() if isinstance(other, App)] if hasattr(holder, "__dict__") else []
    )
    names = [name for name in dir(holder) if not name.startswith("_")]
    near = difflib.get_close_matches(step, apps, n=1) or apps[:1] or difflib.get_close_matches(step, names, n=1)
    near = [name for name in near if not isinstance(getattr(holder, name, None), type)]  # the class App is no app
    hint = f"; did you mean {near[0]!r}?" if near else ", and no App at all"
    where = getattr(module, "__file__", None)
    return Fault(f"module {module.__name__!r} ({where or 'built in'}) has no {path!r}{hint}")
