"""What is done to a running pipeline. Each fault begins while messages flow, and has ended when its function returns.

A fault checks that it took hold: a cut that cut nothing would prove nothing.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable

from msgspec import Struct

from tests.servers.server import Server

from .broker import Broker
from .site import Actor, Site, Stuck

OUTAGE = 3.0  # seconds that a server or a network is away
BUSY = 4  # handlers that a worker runs before something befalls it
SKEW = 3600.0  # seconds by which clocks are wrong
STALL = 12.0  # seconds that nothing flows: longer than heartbeats and the time limits of single requests


class Damage(Struct, frozen=True):
    """What a fault did.

    `over`: when, by time.monotonic(), all was well again. `interruptions`: how often processes may have lost what they
    held; each repeats a window of a worker at most. `forgotten`: messages that are done, and the broker forgot it.
    `deleted`: until then what was at the broker may have been deleted, and so is not lost.
    """

    interruptions: int
    over: float
    forgotten: int = 0
    deleted: float | None = None


class Fault(Struct, frozen=True):
    """`what` it is, in a few words, and how it is done. `fits` says whether a broker can have it."""

    name: str
    what: str
    run: Callable[[Site], Damage]
    fits: Callable[[type[Broker]], bool]


def _over(interruptions: int) -> Damage:
    return Damage(interruptions, time.monotonic())


def _all(site: Site, times: int = 1) -> Damage:
    """It befell all workers."""
    return _over(times * len(site.workers))


# -- the server ------------------------------------------------------------------------------------------------


def restart(site: Site) -> Damage:
    _server(site).stop()
    site.wait(1.0)
    _server(site).start()
    return _all(site)


def kill(site: Site) -> Damage:
    _server(site).kill()
    site.wait(1.0)
    _server(site).start()
    return _all(site)


def freeze(site: Site) -> Damage:
    _server(site).pause()
    try:
        site.wait(STALL)
    finally:
        _server(site).resume()
    return _all(site)


# -- the network -----------------------------------------------------------------------------------------------


def cut(site: Site) -> Damage:
    cuts = 0
    for turn in range(5):
        cuts += sum(proxy.cut(reset=turn % 2 == 0) for proxy in site.proxies())
        site.wait(random.uniform(0.2, 0.6))
    _require(cuts > 0, "no connection was open to be cut")
    return _all(site, 5)


def cut_midway(site: Site) -> Damage:
    before = _taken(site)
    for _ in range(5):
        for proxy in site.proxies():
            proxy.cut_after(random.randrange(1, 3_000), random.choice(("requests", "replies")))
        site.wait(random.uniform(0.2, 0.6))
    _heal(site)
    _require(_taken(site) > before, "no connection was cut")
    return _all(site, 5)


def lose_replies(site: Site) -> Damage:
    cuts = 0
    for _ in range(4):
        for proxy in site.proxies():
            proxy.stall("replies")
        site.wait(random.uniform(0.1, 0.4))
        cuts += sum(proxy.cut() for proxy in site.proxies())
        _heal(site)
        site.wait(0.5)
    _require(cuts > 0, "no connection was open to be cut")
    return _all(site, 4)


def stall(site: Site) -> Damage:
    for proxy in site.proxies():
        proxy.stall()
    site.wait(STALL)
    _heal(site)
    return _all(site)


def slow(site: Site) -> Damage:
    for proxy in site.proxies():
        proxy.slow(0.05, 200_000)
    site.wait(4.0)
    _heal(site)
    return _over(0)


def refuse(site: Site) -> Damage:
    for proxy in site.proxies():
        proxy.refuse()
        proxy.cut()
    site.wait(OUTAGE)
    _heal(site)
    return _all(site)


# -- a worker --------------------------------------------------------------------------------------------------


def kill_worker(site: Site) -> Damage:
    victim = _busy_worker(site)
    site.workers.remove(victim)
    victim.signal(signal.SIGKILL)
    victim.process.wait(10)
    damage = _over(1)
    site.wait(1.0)
    another = site.start_worker()
    site.until("the new worker is up", lambda: another.pid in site.book.pids)
    return damage


def stop_worker(site: Site) -> Damage:
    victim = _busy_worker(site)
    site.broker.freeze(victim.pid)
    try:
        site.wait(_past_hold(site))
    finally:
        victim.signal(signal.SIGCONT)
    return _over(1)


def cut_off_worker(site: Site) -> Damage:
    proxy = _busy_worker(site).proxy
    assert proxy is not None
    proxy.stall()
    site.wait(_past_hold(site))
    proxy.heal()
    return _over(1)


def skew_clocks(site: Site) -> Damage:
    honest = list(site.workers)
    for seconds in (SKEW, -SKEW):
        site.start_worker(skew=seconds)
    site.until_up()
    site.end_workers(honest)
    site.wait(5.0)
    return _over(0)


# -- what is at the broker -------------------------------------------------------------------------------------


def delete_topic(site: Site) -> Damage:
    over, _ = _delete(site, site.broker.delete_topic)
    return Damage(len(site.workers), over, deleted=over)


def delete_group(site: Site) -> Damage:
    over, done_behind = _delete(site, site.broker.delete_group)
    return Damage(len(site.workers), over, forgotten=done_behind)


def _delete(site: Site, delete: Callable[[str], int]) -> tuple[float, int]:
    """Delete while messages wait at the broker: for a moment all workers stand still. Returns when it was over, and how
    many messages were done that a group made anew does not know of: what stands behind the first that was not done, and
    what was done since the broker was last asked."""
    for worker in site.workers:
        site.broker.freeze(worker.pid)
    try:
        site.wait(0.5)
        _require(delete(site.topic) > 0, "nothing was there to be deleted")
        first, now = min(site.book.missing(), default=math.inf), time.monotonic()
        return now, sum(n > first or at > now - site.broker.forgets for n, at in site.book.ended.items())
    finally:
        for worker in site.workers:
            worker.signal(signal.SIGCONT)


def fill(site: Site) -> Damage:
    site.broker.fill(site.topic)
    try:
        accepted = len(site.book.accepted)
        site.until("publishes are refused or wait", lambda: bool(site.book.refused) or _rests(site, 1.0), 8.0)
        _require(len(site.book.accepted) < accepted + 2 * site.rate, "a full broker took what was published")
        site.wait(OUTAGE)
    finally:
        site.broker.free(site.topic)
    return _all(site)


def lock_out(site: Site) -> Damage:
    site.broker.lock_out()
    try:
        for proxy in site.proxies():
            proxy.cut()
        site.until("nobody is let in", lambda: bool(site.book.refused) or _rests(site, 1.0), 8.0)
        site.wait(OUTAGE)
    finally:
        site.broker.let_in()
    return _all(site)


def lock_file(site: Site) -> Damage:
    with site.broker.locked():
        site.wait(STALL)
    return _all(site)  # no lease can be renewed meanwhile


FAULTS = (
    Fault("restart", "the server is stopped in good order and started again after 1 s", restart, lambda b: b.is_server),
    Fault("kill", "the server is killed with SIGKILL and started again after 1 s", kill,
          lambda b: b.is_server and b.survives_kill),
    Fault("freeze", f"the server stands still for {STALL:g} s (SIGSTOP)", freeze, lambda b: b.is_server),
    Fault("cut", "all connections are cut five times within 2 s, by RST and by FIN", cut, lambda b: b.is_server),
    Fault("cut midway", "connections are reset in the midst of a frame, five times", cut_midway, lambda b: b.is_server),
    Fault("replies lost", "requests arrive, their replies are lost, and the connection is reset; four times",
          lose_replies, lambda b: b.is_server),
    Fault("stall", f"connections stay open and nothing flows for {STALL:g} s", stall, lambda b: b.is_server),
    Fault("slow", "each read takes 50 ms longer, and no more than 200 kB/s pass, for 4 s", slow, lambda b: b.is_server),
    Fault("refuse", f"connections are cut, and new ones refused for {OUTAGE:g} s", refuse, lambda b: b.is_server),
    Fault("kill worker", "a worker is killed with SIGKILL; after 1 s there is a new one", kill_worker,
          lambda b: True),
    Fault("stop worker", "a worker stands still until its leases have run out (SIGSTOP), then goes on",
          stop_worker, lambda b: True),
    Fault("cut off worker", "nothing flows between a worker and the server until its leases have run out",
          cut_off_worker, lambda b: b.is_server),
    Fault("skewed clocks", "the clock of one of two workers is an hour ahead, that of the other an hour behind",
          skew_clocks, lambda b: b.is_server and b.workers > 1),
    Fault("delete topic", "the stream or queue is deleted, with what is in it", delete_topic,
          lambda b: "topic" in b.deletes),
    Fault("delete group", "the group or consumer is deleted; the messages stay", delete_group,
          lambda b: "group" in b.deletes),
    Fault("full", f"the broker has no room for {OUTAGE:g} s", fill, lambda b: b.fills),
    Fault("lock out", f"the password is changed and connections are cut; after {OUTAGE:g} s it is the old one again",
          lock_out, lambda b: b.locks_out),
    Fault("locked file", f"another process has the file locked for {STALL:g} s", lock_file, lambda b: not b.is_server),
)  # fmt: skip


def _server(site: Site) -> Server:
    assert site.broker.server is not None
    return site.broker.server


def _busy_worker(site: Site) -> Actor:
    """One that has something to lose."""
    running = site.book.running
    site.until("a worker is busy", lambda: any(running[worker.pid] >= BUSY for worker in site.workers))
    return max(site.workers, key=lambda worker: running[worker.pid])


def _heal(site: Site) -> None:
    for proxy in site.proxies():
        proxy.heal()


def _taken(site: Site) -> int:
    return sum(proxy.taken for proxy in site.proxies())


def _past_hold(site: Site) -> float:
    return 1.5 * site.broker.hold + 1.0


def _rests(site: Site, seconds: float) -> bool:
    """Whether nothing was accepted in the last `seconds`."""
    return time.monotonic() - max(site.book.accepted.values(), default=0.0) > seconds


def _require(happened: bool, otherwise: str) -> None:
    if not happened:
        raise Stuck(f"the fault did not take hold: {otherwise}")
