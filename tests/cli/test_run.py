"""`sluiceway run` in one process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.cli.kit import Shell, environment, eventually, total

Command = Callable[..., tuple[int, str, str]]


def test_the_quick_start_says_hello(shell: Shell) -> None:
    shell.write(
        "hello.py",
        "from sluiceway import App, Message\n\napp = App()\n\n\n@app.consumer('greetings')\n"
        "async def greet(message: Message[str]) -> None:\n    print(f'Hello, {message.payload}!')\n",
    )
    assert shell("publish", "greetings", '"Ada"').returncode == 0
    done = shell("run", "hello:app", "--until-empty")
    assert (done.returncode, done.stdout) == (0, "Hello, Ada!\n")


def test_until_empty_handles_all_and_waits_for_retries(shell: Shell) -> None:
    shell.shop()
    shell("publish", "payments.created", "--", "1", "2", "-1", "13")
    running = shell.start("run", "--until-empty", "--json")
    stopped = running.until("stopped")
    assert running.end() == 0
    assert shell.handled() == [1, 2]
    counts = ("handled", "failed", "retried", "dead_lettered")
    assert [stopped[name] for name in counts] == [2, 3, 1, 2]


def test_the_last_status_says_that_nothing_waits_when_that_was_waited_for(shell: Shell) -> None:
    shell.shop()
    shell("publish", "payments.created", "--delay", "3", "--", "1", "2", "3")
    running = shell.start("run", "--until-empty", "--json")
    running.until("status", lambda event: event["consumers"][0]["waiting"] == 3)
    running.until("stopped")
    last = [event for event in running.events if event["event"] == "status"][-1]
    assert last["consumers"][0]["waiting"] == 0


def test_the_last_status_before_a_signals_end_does_not_say_what_it_does_not_know(shell: Shell) -> None:
    shell.shop(sleep=60, shutdown=0.1)
    shell("publish", "payments.created", *map(str, range(20)))
    running = shell.start("run", "--json", "--set", "payments.max_demand=10")
    running.until("status", lambda event: event["consumers"][0]["waiting"] == 10)
    running.signal(signal.SIGTERM)
    running.until("stopped")
    last = [event for event in running.events if event["event"] == "status"][-1]
    assert last["consumers"][0]["waiting"] is None


SENT = """
from sluiceway import App, Message

app = App("sqlite:///shop.db")


@app.consumer("t")
async def sort(message: Message[int]) -> None:
    if message.payload:
        message.configure(on_success="dead_letter")
"""


def test_what_a_handler_sends_to_dead_letters_is_counted_though_nothing_failed(shell: Shell) -> None:
    shell.write("shop.py", SENT)
    shell("publish", "t", "0", "1", "2")
    done = shell("run", "--until-empty")
    assert "1 message handled in " in done.stderr
    assert ", 2 dead-lettered; drained in " in done.stderr
    assert "failed" not in done.stderr.rpartition("1 message handled")[2]


def test_json_tells_what_runs_where_and_how_it_goes(shell: Shell) -> None:
    shell.shop()
    running = shell.start("run", "shop:app", "--json", "--set", "payments.concurrency=7")
    started = running.until("started")
    assert (started["app"], started["broker"], started["pid"]) == ("shop:app", "sqlite:///shop.db", running.process.pid)
    (consumer,) = started["consumers"]
    assert (consumer["concurrency"], consumer["group"]) == (7, "shop")
    shell("publish", "payments.created", "1", "2", "3")
    status = running.until("status", lambda event: total(event, "handled") == 3)
    assert status["consumers"][0]["state"] == "running"
    running.until("status", lambda event: event["consumers"][0]["waiting"] == 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_signal_drains_and_says_how_it_went(shell: Shell, number: int) -> None:
    shell.shop(sleep=0.5)
    shell("publish", "payments.created", *map(str, range(20, 40)))
    running = shell.start("run", "shop:app", "--json", "--set", "payments.max_demand=20")
    eventually(lambda: len(shell.handled()) == 4, "four handlers run")
    running.signal(number)
    stopped = running.until("stopped")
    assert running.end() == 0
    assert stopped["handled"] == 4
    assert stopped["drain_released"] == 16
    assert (stopped["cancelled"], stopped["unsettled"]) == (0, 0)
    assert "draining, up to 25 s" in running.said()
    shell.shop()
    assert shell("run", "--until-empty").returncode == 0
    assert shell.handled() == list(range(20, 40))  # nothing lost, nothing twice


def test_a_second_ctrl_c_cancels_what_runs_and_ends_with_130(shell: Shell) -> None:
    shell.shop(sleep=600)
    shell("publish", "payments.created", "1", "2")
    running = shell.start("run", "shop:app", "--json")
    eventually(lambda: len(shell.handled()) == 2, "both handlers run")
    running.signal(signal.SIGINT)
    eventually(lambda: "SIGINT: draining" in running.said(), "the first one is heard")
    running.signal(signal.SIGINT)
    stopped = running.until("stopped")
    assert running.end() == 130
    assert (stopped["handled"], stopped["cancelled"], stopped["failed"]) == (0, 2, 0)


def test_the_first_screen_in_a_log_says_what_runs_where_without_control_codes(shell: Shell) -> None:
    shell.shop()
    shell("publish", "payments.created", "5")
    said = shell("run", "shop:app", "--until-empty").stderr
    for part in (
        f"shop:app on sqlite:///shop.db ({shell.folder / 'shop.db'}), process ",
        "payments: payments.created → group shop",
        "4 at once, as tasks; 2 attempts",
        "then dead letter to payments.created.shop.dead",
        "1 message handled in",
        "; drained in 0.",
    ):
        assert part in said
    assert "\x1b" not in said


def test_only_the_named_consumers_run(shell: Shell) -> None:
    shell.shop()
    with (shell.folder / "shop.py").open("a") as file:
        file.write("\n\n@app.consumer('other')\nasync def other(message): ...\n")
    running = shell.start("run", "shop:app", "--only", "other", "--json")
    assert [one["name"] for one in running.until("started")["consumers"]] == ["other"]
    assert [one["consumer"] for one in running.until("status")["consumers"]] == ["other"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "paymets"], "there is no consumer 'paymets'; did you mean 'payments'?"),
        (["--set", "payments.concurrency=-1"], "payments: concurrency must be a whole number, 1 or more; got -1"),
        (["--url", "mongo://x"], "there is no transport for 'mongo://x'"),
        (["--url", "memory://", "--workers", "2"], "memory:// is made anew in each process"),
        (["--workers", "0"], "0 is not in the range"),
    ],
)
def test_wrong_use_ends_with_2_before_anything_starts(shell: Shell, arguments: list[str], text: str) -> None:
    shell.shop()
    done = shell("run", "shop:app", *arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (shell.folder / "shop.db").exists()


def test_an_app_without_consumers_is_refused(shell: Shell) -> None:
    shell.write("empty.py", "from sluiceway import App\napp = App()\n")
    done = shell("run")
    assert (done.returncode, done.stderr) == (
        2,
        "Error: the app has no consumers; declare one with @app.consumer(topic)\n",
    )


def test_a_broker_that_cannot_be_trusted_ends_with_3(shell: Shell) -> None:
    shell.shop()
    shell.write("shop.db", "this is a letter to a friend of mine, and no database" * 100)
    done = shell("run", "shop:app")
    assert done.returncode == 3
    assert "shop.db" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_lifespan_that_fails_shows_its_traceback_and_ends_with_1(shell: Shell) -> None:
    shell.shop()
    with (shell.folder / "shop.py").open("a") as file:
        file.write(
            "\n\nfrom contextlib import asynccontextmanager\n\n\n@asynccontextmanager\nasync def lifespan():\n"
            "    raise OSError('no ledger')\n    yield\n\n\napp.lifespan = lifespan\n"
        )
    done = shell("run", "shop:app")
    assert done.returncode == 1
    assert "OSError: no ledger" in done.stderr
    assert 'shop.py", line' in done.stderr


def test_a_handler_that_exits_ends_the_app_with_its_code_and_loses_nothing(shell: Shell) -> None:
    shell.write(
        "quits.py",
        "from sluiceway import App\napp = App()\n@app.consumer('a')\nasync def a(message):\n    raise SystemExit(7)\n",
    )
    shell("publish", "a", "1")
    assert shell("run", "quits:app").returncode == 7
    shell.write("quits.py", "from sluiceway import App\napp = App()\n@app.consumer('a')\nasync def a(message): ...\n")
    assert "1 message handled in" in shell("run", "--until-empty").stderr


def test_a_handler_that_exits_while_the_queue_is_emptied_drains_too_and_it_is_said_how_it_went(shell: Shell) -> None:
    shell.write(
        "quits.py",
        "import asyncio, sys\nfrom sluiceway import App\napp = App()\n@app.consumer('a')\nasync def a(message):\n"
        "    if message.payload == 1:\n        sys.exit('enough')\n    await asyncio.sleep(0.2)\n",
    )
    shell("publish", "a", "1", "2", "3")
    done = shell("run", "quits:app", "--until-empty", "--json")
    assert done.returncode == 1
    stopped = json.loads(done.stdout.splitlines()[-1])
    assert stopped["event"] == "stopped"
    assert (stopped["reason"], stopped["handled"], stopped["cancelled"]) == ("a handler exits the app: enough", 2, 0)


def test_the_command_line_tunes_the_collector_unless_told_not_to(shell: Shell) -> None:
    shell.write(
        "tuned.py",
        "import gc\nfrom sluiceway import App\napp = App()\n@app.consumer('a')\n"
        "async def a(message): print(gc.get_threshold()[0], gc.get_freeze_count() > 0)\n",
    )
    shell("publish", "a", "1")
    assert shell("run", "--until-empty").stdout == "50000 True\n"
    shell("publish", "a", "1")
    assert shell("run", "--until-empty", "--no-gc-tuning").stdout == "700 False\n"


def test_the_environment_says_which_broker(shell: Shell) -> None:
    shell.shop()
    assert shell("publish", "payments.created", "8", SLUICEWAY_URL="sqlite:///other.db").returncode == 0
    done = shell("run", "shop:app", "--until-empty", SLUICEWAY_URL="sqlite:///other.db")
    assert "on sqlite:///other.db" in done.stderr
    assert shell.handled() == [8]


def test_what_handlers_print_does_not_disturb_json(shell: Shell) -> None:
    shell.write("talks.py", "from sluiceway import App\napp = App()\n@app.consumer('a')\nasync def a(m): print('hi')\n")
    shell("publish", "a", "1")
    done = shell("run", "--until-empty", "--json")
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["started", "status", "stopped"]
    assert "hi\n" in done.stderr


def test_nobody_reading_the_events_drains_and_loses_nothing(shell: Shell) -> None:
    shell.shop()
    shell("publish", "payments.created", *map(str, range(20, 40)))
    with (shell.folder / "shop.py").open("a") as file:  # the last word of the app, on standard error
        file.write("\n\nimport atexit, sys\natexit.register(lambda: print('goodbye', file=sys.stderr))\n")
    script = f"{sys.executable} -m sluiceway run shop:app --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=shell.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[1] == "141"
    assert "nobody reads the events any more: draining" in done.stderr
    assert "goodbye" in done.stderr  # standard error is still there
    assert "Traceback" not in done.stderr
    shell("run", "--until-empty")
    assert shell.handled() == list(range(20, 40))


def test_a_thread_of_the_handlers_that_never_ends_does_not_keep_the_process(shell: Shell) -> None:
    shell.write(
        "stuck.py",
        "import asyncio, time\nfrom sluiceway import App\napp = App(shutdown_timeout=0.2)\n@app.consumer('a')\n"
        "async def a(message):\n    print('in', flush=True)\n    await asyncio.to_thread(time.sleep, 600)\n",
    )
    shell("publish", "a", "1")
    running = shell.start("run", "stuck:app", "--json")
    eventually(lambda: "in\n" in running.said(), "the handler runs")
    began = time.monotonic()
    running.signal(signal.SIGTERM)
    assert running.until("stopped")["cancelled"] == 1
    assert running.end() == 0
    assert time.monotonic() - began < 10
    assert "1 threads that handlers started still run" in running.said()
