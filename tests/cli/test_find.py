"""Finding the app, and what is said when it cannot be found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sluiceway import App
from sluiceway.cli.exits import Fault
from sluiceway.cli.find import find_app, find_broker

ONE = "from sluiceway import App\napp = App('memory://')\n"


def refused(reference: str | None) -> str:
    with pytest.raises(Fault) as caught:
        find_app(reference)
    assert caught.value.code == 2
    return caught.value.message


def test_the_argument_wins_over_environment_and_project(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "first.py").write_text(ONE)
    (here / "pyproject.toml").write_text('[tool.sluiceway]\napp = "nowhere:app"\n')
    monkeypatch.setenv("SLUICEWAY_APP", "nowhere:app")
    found = find_app("first:app")
    assert (found.reference, found.how) == ("first:app", "as named")


def test_the_environment_wins_over_the_project(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "first.py").write_text(ONE)
    (here / "pyproject.toml").write_text('[tool.sluiceway]\napp = "nowhere:app"\n')
    monkeypatch.setenv("SLUICEWAY_APP", "first:app")
    assert find_app(None).how == "SLUICEWAY_APP"


def test_a_project_above_the_folder_names_the_app_of_the_project(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "pyproject.toml").write_text('[tool.sluiceway]\napp = "above:app"\n')
    (here / "above.py").write_text(ONE)
    (here / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(here / "deep" / "deeper")
    found = find_app(None)
    assert found.reference == "above:app"
    assert found.how == str(here / "pyproject.toml")


def test_the_only_module_here_that_makes_an_app_is_taken_and_no_other_is_imported(here: Path) -> None:
    (here / "hello.py").write_text(ONE)
    (here / "other.py").write_text("# sluiceway App(\nraise SystemExit('imported')\n")
    found = find_app(None)
    assert (found.reference, found.how) == ("hello:app", "by convention, hello.py")


def test_of_several_modules_the_one_called_app_or_main_is_taken(here: Path) -> None:
    (here / "hello.py").write_text(ONE)
    (here / "main.py").write_text(ONE)
    assert find_app(None).reference == "main:app"


def test_several_apps_of_equal_standing_are_listed(here: Path) -> None:
    (here / "one.py").write_text(ONE)
    (here / "two.py").write_text(ONE)
    assert refused(None) == "there are 2 apps here: one:app, two:app; name the app, like shop:app"


def test_a_command_that_takes_none_of_several_apps_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (here / f"{name}.py").write_text(ONE)
    assert find_broker(None, None).broker == "sqlite:///sluiceway.db"
    said = "there are 2 apps here (one:app, two:app) and none is named with --app: on sqlite:///sluiceway.db\n"
    assert capsys.readouterr().err == said


def test_without_any_app_it_is_said_what_was_tried(here: Path) -> None:
    (here / "notes.py").write_text("")
    text = refused(None)
    for tried in ("SLUICEWAY_APP (not set)", "pyproject.toml (none here or above)", "in notes.py"):
        assert tried in text


def test_a_missing_module_is_named_with_the_nearest_one_here(here: Path) -> None:
    (here / "hello.py").write_text(ONE)
    assert refused("helo:app") == "there is no module 'helo'; did you mean 'hello'?"


def test_a_missing_module_that_the_project_names_is_said_to_be_of_the_project(here: Path) -> None:
    (here / "pyproject.toml").write_text('[tool.sluiceway]\napp = "nowhere:app"\n')
    assert f"there is no module 'nowhere' ({here / 'pyproject.toml'})" in refused(None)


def test_a_failing_import_inside_the_module_shows_the_users_own_traceback(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "broken.py").write_text("import no_such_thing\n")
    assert refused("broken:app") == "module 'broken' cannot be imported; its own error is above"
    shown = capfd.readouterr().err
    assert "ModuleNotFoundError: No module named 'no_such_thing'" in shown
    assert 'broken.py", line 1' in shown
    assert "importlib" not in shown
    assert "sluiceway/cli" not in shown


def test_a_wrong_option_in_the_module_is_one_line_with_its_place(here: Path) -> None:
    (here / "wrong.py").write_text(ONE + "\n@app.consumer('a', concurency=3)\nasync def a(message): ...\n")
    text = refused("wrong:app")
    assert text.startswith("wrong.py:4: ")
    assert "did you mean 'concurrency'?" in text


def test_a_missing_attribute_is_named_with_the_nearest_app(here: Path) -> None:
    (here / "hello.py").write_text(ONE + "apply = 1\n")
    assert refused("hello:appp").endswith("has no 'appp'; did you mean 'app'?")


def test_an_app_under_another_name_is_named_and_not_the_class_that_made_it(here: Path) -> None:
    (here / "hello.py").write_text("from sluiceway import App\nservice = App()\n")
    assert refused("hello:app").endswith("has no 'app'; did you mean 'service'?")


def test_an_attribute_that_is_no_app_is_said_with_the_one_that_is(here: Path) -> None:
    (here / "hello.py").write_text(ONE + "other = 3\n")
    assert refused("hello:other") == "hello:other is no App but int; the module's App is 'app'"


def test_a_module_alone_means_its_only_app(here: Path) -> None:
    (here / "hello.py").write_text(ONE.replace("app =", "shop ="))
    assert find_app("hello").reference == "hello:shop"


@pytest.mark.parametrize("reference", ["hello.py", "./hello.py:app", "hello.py:app"])
def test_a_file_name_is_answered_with_the_module(here: Path, reference: str) -> None:
    assert refused(reference).endswith("is a file; name the module: hello:app")


def test_a_module_that_exits_when_imported_does_not_end_the_command_silently(here: Path) -> None:
    (here / "script.py").write_text("raise SystemExit(0)\n")
    assert refused("script") == "module 'script' exits when it is imported (code 0)"


def test_a_project_file_that_is_no_toml_is_an_error_and_not_skipped(here: Path) -> None:
    (here / "pyproject.toml").write_text("[tool")
    assert "cannot be read" in refused(None)


def test_a_url_wins_over_the_environment_and_that_over_the_app(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "hello.py").write_text(ONE)
    assert find_app("hello").app.broker == "memory://"
    monkeypatch.setenv("SLUICEWAY_URL", "memory://environment")
    assert find_app("hello").app.broker == "memory://environment"
    assert find_app("hello", "memory://option").app.broker == "memory://option"


def test_commands_without_an_app_use_the_broker_that_run_would_use(here: Path) -> None:
    assert find_broker(None, None).broker == "sqlite:///sluiceway.db"
    (here / "hello.py").write_text(ONE.replace("memory://", "memory://mine"))
    assert find_broker(None, None).broker == "memory://mine"


def test_passwords_are_not_shown(here: Path) -> None:
    app = App("memory://")
    app.url = "redis://ada:secret@localhost"
    assert app.broker == "redis://ada:***@localhost"


def test_the_exit_code_for_a_missing_app_is_2(sluiceway: Callable[..., tuple[int, str, str]]) -> None:
    code, out, errors = sluiceway("run", "nowhere:app")
    assert (code, out) == (2, "")
    assert errors.startswith("Error: there is no module 'nowhere'")
