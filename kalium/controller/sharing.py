"""What a controller does for the others that share its store: says that it is there and whom it hears, renews the claims of its
instances, and gives and takes the newest policies.

A policy that comes from the store is verified like one from the directory: the store is a carrier and no authority.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kalium.controller.redis_calls import BEAT_EVERY_S, BEAT_MS, CLAIM_EVERY_S, RedisCalls
from kalium.controller.redis_link import Link
from kalium.controller.registry import NS_PER_MS, Registry
from kalium.controller.store import Found
from kalium.errors import KaliumError
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.envelope import verify
from kalium.protocol.limits import ENVELOPE_BYTES_MAX

CATCH_UP_S = 3.0  # that a controller waits for its store at the start, so that it does not begin with a policy of yesterday
REFUSED_MAX = 256  # contents that were refused and said


class Sharing:
    """Of one controller. `take` installs what was found and verified, or says why not."""

    def __init__(self, link: Link, calls: RedisCalls, registry: Registry, key: Ed25519PublicKey, *, take: Callable[[Found], None]) -> None:
        self._link = link
        self._calls = calls
        self._registry = registry
        self._key = key
        self._take = take
        self._refused: dict[str, None] = {}

    async def run(self) -> None:
        """For ever."""
        claim_s = time.monotonic() + CLAIM_EVERY_S
        while True:
            self._calls.beat(self._registry.heard_since(time.monotonic_ns() - BEAT_MS * NS_PER_MS))
            if time.monotonic() >= claim_s:
                claim_s += CLAIM_EVERY_S
                self._calls.renew_claims()
            await self.exchange_policies()
            await asyncio.sleep(BEAT_EVERY_S)

    async def catch_up(self) -> None:
        """Take what the others have, before anybody is served. A store that stays away is not waited for."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._link.connected.wait(), CATCH_UP_S)
        await self.exchange_policies()

    async def exchange_policies(self) -> None:
        """Take the policies of the store that are newer, and give those of ours that it lacks."""
        held = {app: published.policy.version for app, published in self._registry.newest().items()}
        answer: asyncio.Future[tuple[dict[str, bytes], list[str]]] = asyncio.get_running_loop().create_future()
        self._calls.ask_policies(held, lambda newer, lacking: None if answer.done() else answer.set_result((newer, lacking)))
        newer, lacking = await answer
        for app in lacking:
            published = self._registry.newest()[app]
            self._calls.offer_policy(published.policy, published.envelope)
        for app, envelope in newer.items():
            digest = hashlib.sha256(envelope).hexdigest()
            if digest in self._refused:
                continue
            found = await asyncio.to_thread(self._judge, app, envelope)
            self._take(found)
            if found.policy is None:
                self._refused[digest] = None
                if len(self._refused) > REFUSED_MAX:
                    del self._refused[next(iter(self._refused))]
                self._replace(app, envelope)

    def _judge(self, app: str, envelope: bytes) -> Found:
        file = f"the store, app {app}"
        try:
            if len(envelope) > ENVELOPE_BYTES_MAX:
                raise _refusal(app, f"more than {ENVELOPE_BYTES_MAX} bytes")
            policy: CompiledPolicy = verify(envelope, self._key)
            if policy.app != app:
                raise _refusal(app, f"it holds the policy of app {policy.app}")
        except KaliumError as error:
            return Found(file, envelope, None, error)
        return Found(file, envelope, policy, None)

    def _replace(self, app: str, bad: bytes) -> None:
        """Put ours in the place of one that does not verify, whatever version it claims: it would keep good ones out."""
        published = self._registry.newest().get(app)
        if published is not None:
            self._calls.offer_policy(published.policy, published.envelope, bad=hashlib.sha1(bad, usedforsecurity=False).hexdigest())


def _refusal(app: str, found: str) -> KaliumError:
    return KaliumError("controller.shared_policy", f"cannot take the policy of {app} from the store", found, "look who else writes to the store")
