"""How much memory live calls take: begins so many with so many open branches each, and prints what the process grew by.

    python -m control.memory CALLS BRANCHES POLICIES KEY_FILE

A branch is a live invocation: the front's own and those of the leaves that it has invoked.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path

from kalium.controller.calls import MemoryCalls
from kalium.controller.limits import LIMITS
from kalium.controller.registry import Registry
from kalium.controller.state import State
from kalium.policy.envelope import public_key, verify
from kalium.protocol.frames import Answer, InstanceInvoke, InstanceStart, Register

PER_INSTANCE = LIMITS.invocations_per_instance
BOUNDLESS = replace(LIMITS, calls=10**8, invocations=10**9, tokens=10**9)  # a population may be larger than a site's tables


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Population:
    """A state, and instances enough for all invocations."""

    def __init__(self, policies: Path, key_file: Path) -> None:
        registry = Registry()
        self.state = State(registry, MemoryCalls(held=registry.held, mint=lambda: secrets.token_hex(16), limits=BOUNDLESS))
        key = public_key(key_file.read_bytes(), str(key_file))
        envelope = (policies / "bench.signed.json").read_bytes()
        registry.install(verify(envelope, key), envelope, now_ns=self.now())
        self.registry = registry
        self._step = 0
        self._used = {"front": 0, "leaf": 0}
        self._agents = 0
        self._on_agent = LIMITS.instances_per_agent
        self._key: object = None
        self.keys: dict[str, object] = {}  # by instance

    @staticmethod
    def now() -> int:
        """Time stands still: nothing expires however long the making takes."""
        return 0

    def instance(self, function: str) -> str:
        """One with room for another invocation."""
        number, used = divmod(self._used[function], PER_INSTANCE)
        name = f"{function}-{number}"
        if used == 0:
            if self._on_agent == LIMITS.instances_per_agent:
                self._agents += 1
                self._on_agent = 0
                self._key = object()
                self.registry.agent_hello(self._key, node=f"node{self._agents}", run="0" * 16, now_ns=self.now())
            self._on_agent += 1
            answer = self.state.register(self._key, Register(name, "bench", function, "image"), now_ns=self.now())
            assert isinstance(answer, Answer) and answer.allowed, answer
            self.keys[name] = self._key
        self._used[function] += 1
        return name

    def step(self) -> str:
        self._step += 1
        return f"{self._step:016x}"

    def start(self, function: str, token: str = "") -> tuple[str, Answer]:
        """Begin an invocation."""
        name = self.instance(function)
        said = InstanceStart(self.step(), token, "", 1, name, "bench", function)
        answer = self.state.start(self.keys[name], said, now_ns=self.now())
        assert isinstance(answer, Answer) and answer.allowed, answer
        return name, answer

    def call(self, branches: int) -> None:
        """A call with so many live invocations."""
        front, begun = self.start("front")
        for _ in range(branches - 1):
            said = InstanceInvoke(self.step(), begun.call, begun.invocation, "leaf", 1, front, "bench", "front")
            granted = self.state.invoke(self.keys[front], said, now_ns=self.now())
            assert isinstance(granted, Answer) and granted.allowed, granted
            self.start("leaf", granted.token)


def main() -> None:
    calls, branches = int(sys.argv[1]), int(sys.argv[2])
    population = Population(Path(sys.argv[3]), Path(sys.argv[4]))
    population.call(branches)
    gc.collect()
    gc.freeze()
    before = resident_bytes()
    for _ in range(calls):
        population.call(branches)
    gc.collect()
    live, invocations = population.state.calls.counts()
    assert (live, invocations) == (calls + 1, (calls + 1) * branches), (live, invocations)
    print(json.dumps({"bytes_per_call": (resident_bytes() - before) / calls}))


if __name__ == "__main__":
    main()
