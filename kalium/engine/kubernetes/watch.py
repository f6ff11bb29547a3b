"""What the API server has of one kind of object, followed by a watch. `Reflection` is pure: answers go in, changes and the next request come
out. `Watcher` does what it says."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from kalium.engine.kubernetes.api import ApiServer, Object, Rejected, Unavailable
from kalium.engine.limits import TOMBSTONES_MAX, WATCH_PAUSE_SECONDS, WATCH_SECONDS, WATCH_SILENCE_SECONDS_MAX

GONE = 410  # the server has forgotten the version that a watch would begin at
SHORT_SECONDS = 1.0  # a watch that ended sooner is not begun again at once


@dataclass(frozen=True)
class Change:
    """An object as it is now, or as it last was before it went."""

    object: Object
    is_gone: bool = False


def uid_of(found: Object) -> str:
    """The id that no other object ever has. Raises KeyError or TypeError for what is no object."""
    return str(found["metadata"]["uid"])


def _identity(found: Object) -> str:
    """The id of what is a whole object as far as everybody here relies on it. Raises KeyError or TypeError for what is none."""
    if not isinstance(found["metadata"]["name"], str):
        raise TypeError("its name is no text")
    return uid_of(found)


def version_of(found: Object) -> int:
    """How new an object is. Versions of one object grow; one that is no number is as old as any."""
    text = str(found["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


class Reflection:
    """The objects, and where the next watch begins: `version`, or None when everything has to be listed.

    | state | what comes | becomes |
    |---|---|---|
    | list | the list | watch from its version; what it does not have is gone |
    | list | a failure | list, after a pause |
    | watch | an event | watch from its version |
    | watch | the end, or a failure of the connection or of the server | watch from the same version, after a pause |
    | watch | 410, by status or as an event; what is no event | list |
    | watch | another refusal | list, after a pause |
    """

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.version: str | None = None
        self.is_synced = False  # it was listed once
        self._tombstones: dict[str, None] = {}  # what we deleted and may still hear of, oldest first
        self._failures = 0

    def listed(self, document: Object) -> list[Change]:
        """Take a whole list. Raises ValueError when it is none."""
        try:
            version = str(document["metadata"]["resourceVersion"])
            found = {_identity(item): item for item in document.get("items") or ()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"it answered what is no list: {error!r}") from error
        # What an answer of ours told of after the list was made is not in it, and not gone.
        listed = int(version) if version.isdigit() else 0
        gone = [Change(known, is_gone=True) for uid, known in self.objects.items() if uid not in found and version_of(known) <= listed]
        for change in gone:
            del self.objects[uid_of(change.object)]
        for uid in [uid for uid in self._tombstones if uid not in found]:
            del self._tombstones[uid]
        self.version, self.is_synced, self._failures = version, True, 0
        return [*gone, *(change for item in found.values() for change in self.apply(item))]

    def event(self, document: Object) -> list[Change]:
        """Take one event of a watch. What is none makes it list again."""
        try:
            kind, found = document["type"], document["object"]
            if kind == "ERROR":
                self._forget_version(found.get("code") == GONE)
                return []
            version = str(found["metadata"]["resourceVersion"])
            changes = [] if kind == "BOOKMARK" else self._removed(_identity(found), found) if kind == "DELETED" else self.apply(found)
        except (KeyError, TypeError, AttributeError):
            self._forget_version(False)
            return []
        self.version, self._failures = version, 0
        return changes

    def apply(self, found: Object) -> list[Change]:
        """Take an object as an answer to our own request gave it; an older one than is known is not news.

        Raises KeyError or TypeError for what is no object.
        """
        uid = _identity(found)
        known = self.objects.get(uid)
        if uid in self._tombstones or (known is not None and version_of(found) < version_of(known)):
            return []
        if known is not None and version_of(found) == version_of(known) != 0:
            return []
        found["metadata"].pop("managedFields", None)  # half of the size, and nobody's business here
        self.objects[uid] = found
        return [Change(found)]

    def forget(self, uid: str) -> list[Change]:
        """We deleted it. What is still told of it is from before that."""
        self._tombstones[uid] = None
        while len(self._tombstones) > TOMBSTONES_MAX:
            del self._tombstones[next(iter(self._tombstones))]
        known = self.objects.pop(uid, None)
        return [] if known is None else [Change(known, is_gone=True)]

    def _removed(self, uid: str, found: Object) -> list[Change]:
        self._tombstones.pop(uid, None)
        return [Change(found, is_gone=True)] if self.objects.pop(uid, None) is not None else []

    def ended(self, seconds: float) -> float:
        """The watch ended by itself after so long. Returns the pause before the next request."""
        if seconds >= SHORT_SECONDS:
            self._failures = 0
            return 0.0
        return self._pause()

    def failed(self, status: int) -> float:
        """The request failed: by a refusal with that status, or 0 for every other reason. Returns the pause before the next."""
        if status == GONE and self.version is not None:
            self._forget_version(True)
            return 0.0
        if status:
            self.version = None
        return self._pause()

    def _forget_version(self, is_expected: bool) -> None:
        self.version = None
        if not is_expected:
            self._failures += 1

    def _pause(self) -> float:
        self._failures += 1
        first, longest = WATCH_PAUSE_SECONDS
        return float(min(first * 2 ** min(self._failures - 1, 16), longest))


class Watcher:
    """Keeps a Reflection as the API server has it, for ever."""

    def __init__(
        self,
        api: ApiServer,
        path: str,
        selector: Mapping[str, str],
        take: Callable[[Iterable[Change]], None],
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.reflection = Reflection()
        self.lost = "it has not been asked yet"  # why it cannot be asked; "" when it was, the last time
        self.synced = asyncio.Event()
        self._api = api
        self._path = path
        self._selector = selector
        self._take = take
        self._tell = tell  # that `lost` has changed

    def apply(self, found: Object) -> None:
        """Take an object as an answer to our own request gave it. Raises Unavailable when it is none."""
        try:
            changes = self.reflection.apply(found)
        except (KeyError, TypeError) as error:
            raise Unavailable(f"it answered what is no object: {error!r}") from error
        self._take(changes)

    def forget(self, uid: str) -> None:
        """We deleted an object."""
        self._take(self.reflection.forget(uid))

    async def run(self) -> None:
        """List and watch until cancelled."""
        while True:
            begin, status = time.monotonic(), 0
            try:
                if self.reflection.version is None:
                    self._take(self.reflection.listed(await self._api.ask("GET", self._path, query=self._selector)))
                    self._reached("")
                    self.synced.set()
                    pause = 0.0
                else:
                    await self._watch()
                    pause = self.reflection.ended(time.monotonic() - begin)
            except (Unavailable, ValueError) as error:
                pause = self.reflection.failed(0)
                self._reached(str(error))
            except Rejected as error:
                status = error.status
                pause = self.reflection.failed(status)
                if status != GONE:
                    self._reached(f"it refuses: {error}")
            await asyncio.sleep(pause)

    async def _watch(self) -> None:
        """Take events until the watch ends, or everything has to be listed again."""
        query = {
            **self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self.reflection.version or "",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        async with aclosing(self._api.lines(self._path, query, silence_seconds_max=WATCH_SILENCE_SECONDS_MAX)) as lines:
            async for line in lines:
                self._reached("")
                if line:
                    self._take(self.reflection.event(_event(line)))
                if self.reflection.version is None:
                    return

    def _reached(self, lost: str) -> None:
        if lost != self.lost:
            self.lost = lost
            if self._tell is not None:
                self._tell(lost)


def _event(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
