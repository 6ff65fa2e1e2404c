"""The settler: every delivery ends here, once, in as few calls to the broker as can be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from typing import Any

from .._decisions.backoff import reconnect_delay
from .._decisions.occupancy import Occupancy
from .._decisions.policy import settle_success
from ..errors import AppError, LeaseLost, RoutingError
from ..message import QUEUED, RUNNING, SETTLED, Message, Outcome, Refused, Settlement, with_headers
from ..source import Source
from ..telemetry import Published, Settled, SettleRefused, Telemetry
from .acknowledgers import Acknowledgers, cancelled_from_outside
from .chance import draw
from .owners import Later
from .spec import PipelineSpec
from .unset import nothing

log = logging.getLogger("sluiceway.settler")


class PipelineSettler:
    """Gathers settlements and sends them: one call of acks in flight, and apart from it one of everything else.

    `held` are the deliveries received and not settled; a message leaves it when its settle *returned*. A settle that
    raises is sent again until the broker takes it; meanwhile what it holds keeps demand down.
    """

    def __init__(self, spec: PipelineSpec, source: Source, telemetry: Telemetry) -> None:
        self.spec = spec
        self.source = source
        self.telemetry = telemetry
        self.held: set[Message[Any]] = set()
        self.acks: list[Message[Any]] = []
        self.scheduled = False
        self.following: Sized = ()  # messages that wait to be handled next
        self.overdue: set[Message[Any]] = set()  # held while a handler runs on though its time is up; only with order
        self.finished = 0  # deliveries that ended, in all
        self.occupancy = Occupancy(asyncio.get_running_loop().time(), processors=spec.concurrency)
        self.stuck: list[Settlement] = []  # what the broker rejected; while there is one, demand stops
        self.on_stuck: Callable[[], None] = nothing  # that has begun or ended
        self.on_freed: Callable[[], None] = nothing
        self.on_settlement: Callable[[Settlement], None] | None = None  # for lanes: a delivery is about to end so
        self.on_ended: Callable[[Sequence[Message[Any]]], None] | None = None  # for lanes: these have ended
        self.acknowledgers = Acknowledgers(spec.name, spec.acknowledgers) if spec.acknowledgers else None
        self._at_once = getattr(source, "settles_at_once", False) and not spec.acknowledgers
        self._others: list[Settlement] = []
        self._late: list[Settlement] = []  # what one of several sources could not settle yet; demand goes on
        self._late_tries = 0
        self._late_timer: asyncio.TimerHandle | None = None
        self._try_stuck = False
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._troubles: dict[str, str] = {}  # by what cannot be sent: why
        self._early: set[Message[Any]] = set()  # settled by `message.ack()` while their handler runs on
        self._sending = 0
        self._waiters: dict[Message[Any], asyncio.Future[None]] = {}
        self._ack_wake = asyncio.Event()
        self._other_wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    # -- what processors call ------------------------------------------------------------------------------------

    def ack(self, message: Message[Any]) -> None:
        """End a delivery as a success. Called once per delivery, by whoever moves it to SETTLED."""
        if message.outputs is None:
            message.state = SETTLED
            self.acks.append(message)
        else:
            self._succeed(message)
        if not self.scheduled:
            self.schedule()

    def _succeed(self, message: Message[Any]) -> None:
        settlement = settle_success(message, self.spec.rules, now=time.time())
        message.state = SETTLED
        if settlement is None:
            self.acks.append(message)
        else:
            self._add(settlement)

    def _add(self, settlement: Settlement) -> None:
        self._others.append(settlement)
        if self.on_settlement is not None:
            self.on_settlement(settlement)

    def ack_batch(self, messages: Sequence[Message[Any]], error: BaseException | None) -> list[Message[Any]]:
        """End the messages of a batch that did not fail as successes; returns the others, with their `error` set.

        `error` is what the batch handler raised; it fails all that did not fail by themselves.
        """
        rest: Sequence[Message[Any]] = messages
        if error is None:
            rest = []
            for message in messages:  # nearly always there is nothing to it
                if message.error is None and message.state == RUNNING and message.outputs is None:
                    message.state = SETTLED
                else:
                    rest.append(message)
            others = set(rest)
            self.acks += [message for message in messages if message not in others] if rest else messages
        failed = []
        for message in rest:
            if error is not None or message.error is not None:
                message.error = error if message.error is None else message.error
                failed.append(message)
            elif message.state >= SETTLED:
                self.handler_ended(message)
            else:
                self.ack(message)
        if self.acks and not self.scheduled:
            self.schedule()
        return failed

    def schedule(self) -> None:
        """Send what has gathered: a turn of the loop later when more is about to follow, else at once."""
        if self.following:
            self.scheduled = True
            self._loop.call_soon(self._wake)
        elif not (self._at_once and self.acks and self._settle_at_once()):
            self._wake()

    def _settle_at_once(self) -> bool:
        """Settle acks where we stand: a broker in this process never waits, and a turn of the loop takes 5 µs."""
        batch, self.acks = self.acks, []
        try:
            self.source.settle(batch, ()).send(None)
        except StopIteration as done:
            self._acked(batch, done.value)
            return not self._others
        except Exception:
            self.acks = batch  # the usual way says so and tries again
            return False
        raise RuntimeError(f"{self.spec.name}: a source that settles at once has waited")

    def _acked(self, batch: list[Message[Any]], refused: Sequence[Refused]) -> None:
        if refused and (rejected := _rejected(refused)):
            self._keep([Settlement(message, "ack") for message in batch if id(message) in rejected], refused)
            batch = [message for message in batch if id(message) not in rejected]
        self._ended(batch, refused)
        if Settled in self.telemetry.attached and (taken := len(batch) - sum(one.kind == "lost" for one in refused)):
            self.telemetry.emit(Settled(consumer=self.spec.name, outcome="ack", count=taken))

    def settle(self, settlement: Settlement) -> None:
        """End a delivery in another way than a plain ack. Ignored when the message is settled already."""
        if settlement.message.state >= SETTLED:
            return
        settlement.message.state = SETTLED
        if settlement.outcome in ("park", "release"):
            self.out_of_sight((settlement.message,))
        self._add(settlement)
        if not self.scheduled:
            self.schedule()

    def out_of_sight(self, messages: Collection[Message[Any]]) -> None:
        """Tell gates that wait for the end of one of these that they will not see it."""
        for watch in self.spec.watches:
            try:
                watch.gone(messages)
            except Exception:
                log.exception("%s: a gate raised on a message that goes back", self.spec.name)

    async def settle_now(self, messages: Sequence[Message[Any]]) -> None:
        """End deliveries as successes while their handler runs on; return when the broker has them.

        Raises LeaseLost, when all have ended, if one is another consumer's.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise AppError(
                f"{self.spec.name}: message.ack() works in the pipeline's own loop: in an `async def` handler"
            )
        waiters = []
        for message in messages:
            waiters.append(self._loop.create_future())
            self._waiters[message] = waiters[-1]
            self._early.add(message)
            self._succeed(message)
        if not self.scheduled:
            self.schedule()
        for lost in await asyncio.gather(*waiters, return_exceptions=True):
            if lost is not None:
                raise lost

    def handler_ended(self, message: Message[Any]) -> None:
        """The handler of a message that was settled before has ended: only now may the next one of its key start."""
        if message in self._early:
            self._early.discard(message)
            if message not in self.held and self.on_ended is not None:
                self.on_ended((message,))

    def encode(self, payload: Any) -> bytes:
        return self.spec.encode(payload)

    def with_headers(self, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
        return with_headers(self.spec.publish_headers, headers)

    def check_batcher(self, name: str) -> None:
        if name not in self.spec.batchers:
            known = ", ".join(map(repr, self.spec.batchers)) or "none"
            raise RoutingError(f"{self.spec.name}: there is no batcher {name!r}; its batchers: {known}")

    def forget(self, messages: Sequence[Message[Any]]) -> None:
        """Deliveries whose lease or scope is gone: those that have not started never will; the others' settles are
        refused by the broker."""
        for message in messages:
            if message.state == QUEUED:
                message.state = SETTLED
                self.held.discard(message)
                self.finished += 1
                self.occupancy.finished(self._loop.time(), 1, len(self.held))
                if self.on_ended is not None:
                    self.on_ended((message,))
        self.on_freed()

    # -- loops ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send_acks(), name=f"{self.spec.name}: acks")
            group.create_task(self._send_others(), name=f"{self.spec.name}: settlements")

    @property
    def trouble(self) -> str | None:
        """Why the broker does not take some settlements at present; None when it takes all."""
        return next(iter(self._troubles.values()), None)

    def close(self) -> None:
        """Try what the broker rejected no more."""
        for timer in (self._stuck_timer, self._late_timer):
            if timer is not None:
                timer.cancel()

    @property
    def unsent(self) -> int:
        """Settlements that the broker does not have yet, but for those it rejects."""
        return len(self.acks) + len(self._others) + len(self._late) + self._sending

    def _wake(self) -> None:
        self.scheduled = False
        if self.acks:
            self._ack_wake.set()
        if self._others:
            self._other_wake.set()

    async def _send_acks(self) -> None:
        while True:
            await self._ack_wake.wait()
            self._ack_wake.clear()
            if self.acks:
                batch, self.acks = self.acks, []
                self._acked(batch, await self._insist("acks", batch, ()))
                if self.acks:
                    self._ack_wake.set()

    async def _send_others(self) -> None:
        while True:
            await self._other_wake.wait()
            self._other_wake.clear()
            again, self._try_stuck = self._try_stuck, False
            tried = len(self.stuck) if again else 0
            batch, self._others = [*self._others, *(self.stuck if again else ())], []
            if batch:
                refused = await self._insist("settlements", (), batch)
                rejected = _rejected(refused)
                del self.stuck[:tried]  # what was rejected meanwhile is behind those, and stays
                self._keep([one for one in batch if id(one.message) in rejected], refused)
                batch = [one for one in batch if id(one.message) not in rejected]
                self._ended([one.message for one in batch], refused)
                lost = {id(one.message) for one in refused}
                self._tell([one for one in batch if id(one.message) not in lost])
                for one in batch:  # an error leads to its message through the handler's frame: no circle for the gc
                    one.message.error = None
                if self._others:
                    self._other_wake.set()

    async def _insist(self, what: str, acks: Sequence[Message[Any]], others: Sequence[Settlement]) -> Sequence[Refused]:
        """Settle, again and again while it raises."""
        tries = 0
        count = len(acks) + len(others)
        unsettled = self.occupancy.unsettled
        self._sending += count
        unsettled.step(self._loop.time(), self.unsent + len(self.stuck))
        try:
            if self.acknowledgers is not None:
                await self.acknowledgers.before(acks, others)
            while True:
                try:
                    refused = await self.source.settle(acks, others)
                except (Exception, asyncio.CancelledError) as error:
                    if cancelled_from_outside(error):
                        raise
                    delay = reconnect_delay(tries, draw())
                    tries += 1
                    text = self._troubles[what] = f"settling {count} messages failed: {type(error).__name__}: {error}"
                    log.warning("%s: %s; trying again in %.2f s", self.spec.name, text, delay)
                    await asyncio.sleep(delay)
                else:
                    break
            self._troubles.pop(what, None)
            if self.acknowledgers is not None:
                await self.acknowledgers.after(acks, others, refused)
            return refused
        finally:
            now = self._loop.time()
            unsettled.drift(now, self.unsent + len(self.stuck))  # what finished meanwhile waits for the next call
            self._sending -= count
            unsettled.step(now, self.unsent + len(self.stuck))

    def _ended(self, messages: list[Message[Any]], refused: Sequence[Refused]) -> None:
        self.held.difference_update(messages)
        self.finished += len(messages)
        self.occupancy.finished(self._loop.time(), len(messages), len(self.held))
        for one in refused:
            if not isinstance(one, Later):
                self._say_refused(one)
        if self._waiters:
            self._answer(messages, {id(one.message) for one in refused})
        if self.on_ended is not None:
            self.on_ended([one for one in messages if one not in self._early] if self._early else messages)
        self.on_freed()

    def _answer(self, messages: list[Message[Any]], refused: set[int]) -> None:
        for message in messages:
            waiter = self._waiters.pop(message, None)
            if waiter is None or waiter.done():
                continue
            if id(message) in refused:
                waiter.set_exception(LeaseLost(f"message {message.id} of {message.topic!r} is another consumer's now"))
            else:
                waiter.set_result(None)

    def _say_refused(self, one: Refused) -> None:
        message = one.message
        next_step = (
            "its lease was lost and another consumer handles it again"
            if one.kind == "lost"
            else "it stays unsettled and demand stops until the broker takes it"
        )
        if one.kind == "rejected":
            self._troubles["rejected"] = f"the broker rejected what belongs to message {message.id}: {one.detail}"
        log.warning(
            "%s: the broker refused to settle message %s of %r%s; %s",
            self.spec.name, message.id, message.topic, f" ({one.detail})" if one.detail else "", next_step,
        )  # fmt: skip
        if self.telemetry.wants(SettleRefused):
            self.telemetry.emit(
                SettleRefused(
                    consumer=self.spec.name, topic=message.topic, id=message.id, kind=one.kind, detail=one.detail
                )
            )

    def _keep(self, rejected: list[Settlement], refused: Sequence[Refused]) -> None:
        """Try what the broker rejected again in a while; until then it stays held and unsettled."""
        late = {id(one.message): one for one in refused if isinstance(one, Later)}
        self._put_off([one for one in rejected if id(one.message) in late], next(iter(late.values()), None))
        self.stuck.extend(one for one in rejected if id(one.message) not in late)
        if not self.stuck:
            if self._troubles.pop("rejected", None):
                self.on_stuck()
            return
        self.occupancy.unsettled.step(self._loop.time(), self.unsent + len(self.stuck))
        if self._stuck_timer is None:
            self._stuck_timer = self._loop.call_later(reconnect_delay(6, draw()), self._retry_stuck)
            self.on_stuck()

    def _put_off(self, settlements: list[Settlement], why: Later | None) -> None:
        """Settle what one of several sources could not settle again, soon."""
        self._late += settlements
        if not self._late:
            self._late_tries = 0
            self._troubles.pop("late", None)
        elif self._late_timer is None and why is not None:
            delay = reconnect_delay(self._late_tries, draw())
            self._late_tries += 1
            text = self._troubles["late"] = f"settling {len(self._late)} messages failed: {why.detail}"
            log.warning("%s: %s; trying again in %.2f s", self.spec.name, text, delay)
            self._late_timer = self._loop.call_later(delay, self._retry_late)
        self.occupancy.unsettled.step(self._loop.time(), self.unsent + len(self.stuck))

    def _retry_late(self) -> None:
        self._late_timer = None
        self._others += self._late
        self._late = []
        self._other_wake.set()

    def _retry_stuck(self) -> None:
        self._stuck_timer = None
        self._try_stuck = True
        self._other_wake.set()

    def _tell(self, batch: Sequence[Settlement]) -> None:
        if self.telemetry.wants(Settled):
            outcomes: set[Outcome] = {one.outcome for one in batch}
            for outcome in outcomes:
                count = sum(one.outcome == outcome for one in batch)
                self.telemetry.emit(Settled(consumer=self.spec.name, outcome=outcome, count=count))
        if self.telemetry.wants(Published):
            topics = Counter(outgoing.topic for one in batch if one.outcome == "ack" for outgoing in one.outputs)
            for topic, count in topics.items():
                self.telemetry.emit(Published(consumer=self.spec.name, topic=topic, count=count))


def _rejected(refused: Sequence[Refused]) -> set[int]:
    return {id(one.message) for one in refused if one.kind == "rejected"}
