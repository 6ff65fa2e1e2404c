"""`sluiceway run --workers`: processes that are replaced, drained and never left behind."""

from __future__ import annotations

import os
import signal

from sluiceway.cli.events import ConsumerStatus, together
from sluiceway.cli.workers import EARLY, GIVE_UP_EARLY, GIVE_UP_STARTING, RespawnRule
from tests.cli.kit import Shell, eventually, is_alive, total


def test_workers_share_the_work_and_end_when_nothing_waits(shell: Shell) -> None:
    shell.shop(sleep=0.01)
    shell("publish", "payments.created", *map(str, range(20, 320)))
    running = shell.start("run", "shop:app", "--workers", "2", "--until-empty", "--json")
    started = running.until("started")
    assert len(set(started["workers"])) == 2
    stopped = running.until("stopped")
    assert running.end() == 0
    assert shell.handled() == list(range(20, 320))
    assert stopped["handled"] == 300
    assert [one["code"] for one in running.events if one["event"] == "worker" and one["state"] == "ended"] == [0, 0]


def test_a_killed_worker_is_replaced_and_nothing_is_lost(shell: Shell) -> None:
    shell.shop(sleep=0.02)
    running = shell.start("run", "shop:app", "--workers", "2", "--json")
    first, second = running.until("started")["workers"]
    shell("publish", "payments.created", *map(str, range(20, 420)))
    running.until("status", lambda event: total(event, "handled") > 20)
    os.kill(first, signal.SIGKILL)
    assert running.until("worker", lambda event: event["state"] == "ended")["code"] == -signal.SIGKILL
    replacement = running.until("worker", lambda event: event["state"] == "started")["pid"]
    assert replacement not in (first, second)
    eventually(lambda: set(shell.handled()) == set(range(20, 420)), "all are handled")
    running.signal(signal.SIGTERM)
    assert running.end() == 0


def test_one_ctrl_c_drains_every_worker_once_and_a_second_hurries_them(shell: Shell) -> None:
    shell.shop(sleep=600)
    shell("publish", "payments.created", *map(str, range(20, 28)))
    running = shell.start("run", "shop:app", "--workers", "2", "--json")
    running.until("started")
    eventually(lambda: len(shell.handled()) == 8, "all handlers run")
    running.signal(signal.SIGINT)
    eventually(lambda: running.said().count("SIGINT: draining") == 2, "both workers drain")
    assert "SIGINT again" not in running.said()
    running.signal(signal.SIGINT)
    stopped = running.until("stopped")
    assert running.end() == 130
    assert (stopped["cancelled"], stopped["handled"]) == (8, 0)


def test_workers_drain_and_end_when_their_parent_is_killed(shell: Shell) -> None:
    shell.shop(sleep=0.3)
    running = shell.start("run", "shop:app", "--workers", "2", "--json")
    workers = running.until("started")["workers"]
    shell("publish", "payments.created", *map(str, range(20, 60)))
    eventually(lambda: len(shell.handled()) >= 8, "both are busy")
    running.signal(signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, workers)), "the workers have ended")
    assert running.said().count("the parent process is gone: draining") == 2
    shell.shop()
    shell("run", "--until-empty")
    assert shell.handled() == list(range(20, 60))  # drained, so nothing was handled twice


def test_workers_with_a_blocked_loop_end_too_when_their_parent_is_killed(shell: Shell) -> None:
    shell.shop(shutdown=0.1)
    with (shell.folder / "shop.py").open("a") as file:
        file.write(
            "\nimport time, sluiceway.cli.lifeline as line, sluiceway.cli.serve as serve\nserve.CLOSING = 0.2\n\n\n"
            "@app.consumer('block')\nasync def block(message):\n    print('blocked', flush=True)\n    time.sleep(600)\n"
        )
    shell("publish", "block", "1", "--app", "shop:app")
    running = shell.start("run", "shop:app", "--workers", "1", "--json")
    (worker,) = running.until("started")["workers"]
    eventually(lambda: "blocked" in running.said(), "the loop is blocked")
    running.signal(signal.SIGKILL)
    eventually(lambda: not is_alive(worker), "the worker has ended")


def test_a_worker_that_cannot_start_is_given_up_with_its_code(shell: Shell) -> None:
    shell.shop()
    shell.write("shop.db", "this is a letter to a friend of mine, and no database" * 100)
    running = shell.start("run", "shop:app", "--workers", "1", "--json")
    stopped = running.until("stopped")
    assert running.end() == 3
    assert "worker 1 ended with exit code 3 (" in stopped["reason"]
    assert "it is given up" in stopped["reason"]
    assert sum(one["event"] == "worker" and one["state"] == "started" for one in running.events) == GIVE_UP_STARTING


def test_a_worker_that_dies_early_again_and_again_is_given_up_later() -> None:
    rule = RespawnRule()
    delays = [rule.died(started=True, lived=0.5, draw=0.0) for _ in range(GIVE_UP_EARLY)]
    assert delays[0] == 0.05
    assert delays[-1] is None
    known = [one for one in delays if one is not None]
    assert known == sorted(known)
    assert max(known) <= 5.0


def test_a_worker_that_lived_for_a_while_starts_with_a_clean_slate() -> None:
    rule = RespawnRule()
    for _ in range(GIVE_UP_EARLY - 1):
        rule.died(started=True, lived=0.5, draw=0.0)
    assert rule.died(started=True, lived=EARLY, draw=0.0) == 0.05
    assert rule.died(started=True, lived=0.5, draw=0.0) == 0.05


def test_three_deaths_before_the_start_are_enough() -> None:
    rule = RespawnRule()
    assert rule.died(started=False, lived=0.2, draw=0.0) is not None
    assert rule.died(started=False, lived=0.2, draw=0.0) is not None
    assert rule.died(started=False, lived=0.2, draw=0.0) is None


def test_the_status_of_several_workers_adds_up_and_shows_the_worst_state() -> None:
    one = ConsumerStatus(consumer="a", state="running", handled=3, in_hand=1, waiting=7)
    other = ConsumerStatus(consumer="a", state="blocked", reason="full disk", handled=4, waiting=None)
    both = together((one, other))
    assert (both.state, both.reason, both.handled, both.in_hand, both.waiting) == ("blocked", "full disk", 7, 1, 7)
