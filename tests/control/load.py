"""Calls through guards, many at once, by the policy; with attacks in between. What becomes of each is written down."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from control.guards import Guard, History, is_decided
from kalium.policy.automaton import NOWHERE, CompiledPolicy, States
from kalium.protocol.frames import Answer, Start

DECIDED_S = 4.0  # that a guard here asks the same step again before it gives the call up
DEPTH_MAX = 6


class Abandoned(Exception):
    """A step that the policy permits was not granted; the text says what came instead."""


@dataclass
class Call:
    """One call's way. `why` is "" when it was whole."""

    began_s: float
    ended_s: float = 0.0
    why: str = ""


@dataclass
class Load:
    """`guards` are those of each function, on whichever nodes."""

    policy: CompiledPolicy
    guards: dict[str, list[Guard]]
    history: History
    entries: Sequence[str]
    chance: random.Random
    attacks: float = 0.0  # the share of steps that an attack stands before
    calls: list[Call] = field(default_factory=list)
    attacked: Counter[str] = field(default_factory=Counter)
    live: list[tuple[Guard, Answer]] = field(default_factory=list)

    async def run(self, width: int, until: Callable[[], bool]) -> None:
        """`width` calls at a time until the claim holds, and those that have begun to their end."""
        await asyncio.gather(*(self._work(until) for _ in range(width)))

    async def _work(self, until: Callable[[], bool]) -> None:
        while not until():
            call = Call(time.monotonic())
            self.calls.append(call)
            try:
                await self._invocation(self.chance.choice(self.entries), "", 0)
            except Abandoned as abandoned:
                call.why = str(abandoned)
                await asyncio.sleep(0.02)
            call.ended_s = time.monotonic()

    async def _invocation(self, function: str, token: str, depth: int) -> None:
        guard = self.chance.choice([guard for guard in self.guards[function] if guard.is_connected] or self.guards[function])
        grant = await self._decided("start", function, lambda step: guard.start(token, step))
        place = (guard, grant)
        self.live.append(place)
        try:
            await self._walk(guard, grant, function, depth)
        finally:
            self.live.remove(place)
        if grant.hold:
            await self._decided("finish", function, lambda _: guard.finish(grant))
        else:
            guard.end(grant)

    async def _walk(self, guard: Guard, grant: Answer, function: str, depth: int) -> None:
        graph = self.policy.app_cfg[function]
        states: States = graph.start
        while depth < DEPTH_MAX and (choices := graph.expected(states)):
            if self.chance.random() < self.attacks:
                await self._attack(guard, grant, states)
            if self.chance.random() < 0.1:
                return  # a function may stop wherever it likes
            key = self.chance.choice(choices)
            following, _ = graph.step(states, key)
            assert following != NOWHERE
            answer = await self._decided(
                "invoke", function,
                lambda step, key=key: guard.invoke(grant, key.callee, step, asynchronous=key.asynchronous, callback=key.callback),  # type: ignore[misc]
            )  # fmt: skip
            states = following
            await self._invocation(key.callee, answer.token, depth + 1)
            if answer.callback:
                await self._invocation(key.callback, answer.callback, depth + 1)

    async def _decided(self, what: str, function: str, ask: Callable[[str], Awaitable[Answer | None]]) -> Answer:
        """The decision on a step that the policy permits, asked again under the same id until there is one."""
        step, deadline = secrets.token_hex(8), time.monotonic() + DECIDED_S
        while not is_decided(answer := await ask(step)):
            if time.monotonic() > deadline:
                raise Abandoned(f"{what} {function}: undecided, {answer.reason if answer is not None else 'no answer'}")
            await asyncio.sleep(0.02)
        assert answer is not None
        if not answer.allowed:
            raise Abandoned(f"{what} {function}: {answer.reason}")
        return answer

    async def _attack(self, guard: Guard, grant: Answer, states: States) -> None:
        """One thing that the policy forbids; the judge finds what was granted."""
        name = self.chance.choice(("skip", "replay", "foreign", "stranger", "invent"))
        self.attacked[name] += 1
        if name in ("skip", "invent"):
            allowed = {key.callee for key in self.policy.app_cfg[guard.function].expected(states)}
            others = [callee for callee in self.policy.functions if callee not in allowed]
            await guard.invoke(grant, self.chance.choice(others) if name == "skip" else "no-such-function")
        elif name == "foreign" and self.live:
            other, theirs = self.chance.choice(self.live)
            if other is not guard:
                await guard.invoke(theirs, self.chance.choice(tuple(self.policy.functions)))
        elif name == "stranger":
            function = self.chance.choice([function for function in self.guards if function not in self.policy.entries])
            await self.chance.choice(self.guards[function]).start()
        else:
            starts = [each.question for each in self.history.asked[-200:] if each.is_granted and isinstance(each.question, Start)]
            spent = [start.token for start in starts if start.token]
            if spent:
                await guard.start(self.chance.choice(spent))

    def why(self) -> Counter[str]:
        """What became of the calls."""
        return Counter(call.why for call in self.calls)

    def over(self, moment_s: float) -> list[Call]:
        """Calls that were in flight at a moment."""
        return [call for call in self.calls if call.began_s < moment_s < call.ended_s]
