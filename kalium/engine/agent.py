"""Registering instances with the node's agent, before their first instruction: its sandboxes get a policy only for what we told it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from kalium.engine.deadline import within
from kalium.engine.limits import AGENT_LINE_BYTES_MAX, AGENT_SECONDS_MAX, ERROR_CHARACTERS_MAX


class AgentUnavailable(Exception):
    """The agent cannot be asked, or cannot ask its controller; later it may."""


class RegistrationRefused(Exception):
    """The agent's answer is no: `code` is its reason."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code


# What a later try may change; every other refusal is about what was asked.
LATER = frozenset({"controller_unavailable"})


class Agent:
    """The agent behind its registration socket: one JSON object a line, answered by one."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def register(self, container: str, app: str, function: str, image: str) -> None:
        """Tell who `container` is. Raises RegistrationRefused or AgentUnavailable."""
        answer = await self._ask({"op": "register", "container": container, "app": app, "function": function, "image": image})
        if answer.get("ok") is not True:
            code, detail = str(answer.get("error") or "refused"), str(answer.get("detail") or "")[:ERROR_CHARACTERS_MAX]
            if code in LATER:
                raise AgentUnavailable(f"{code}: {detail}")
            raise RegistrationRefused(code, detail)

    async def unregister(self, container: str) -> None:
        """Tell that `container` is gone; one that the agent does not know is gone too. Raises AgentUnavailable."""
        answer = await self._ask({"op": "unregister", "container": container})
        if answer.get("ok") is not True:
            raise AgentUnavailable(f"it answered {json.dumps(answer)[:ERROR_CHARACTERS_MAX]}")

    async def registered(self) -> frozenset[str]:
        """The containers that the agent has registered and its controller has acknowledged. Raises AgentUnavailable."""
        answer = await self._ask({"op": "list"})
        containers = answer.get("containers")
        if answer.get("ok") is not True or not isinstance(containers, list) or not all(isinstance(container, str) for container in containers):
            raise AgentUnavailable(f"it answered {json.dumps(answer)[:ERROR_CHARACTERS_MAX]}")
        return frozenset(containers)

    async def _ask(self, question: dict[str, str]) -> dict[str, Any]:
        try:
            line = await within(AGENT_SECONDS_MAX, self._exchange(json.dumps(question).encode("utf-8") + b"\n"))
            answer = json.loads(line)
        except asyncio.TimeoutError as error:
            raise AgentUnavailable(f"{self._socket} did not answer within {AGENT_SECONDS_MAX:.0f} s") from error
        except (OSError, ValueError) as error:
            raise AgentUnavailable(f"{self._socket}: {error}") from error
        if not isinstance(answer, dict):
            raise AgentUnavailable(f"{self._socket} answered no object")
        return answer

    async def _exchange(self, line: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self._socket), limit=AGENT_LINE_BYTES_MAX)
        try:
            writer.write(line)
            return await reader.readline()
        finally:
            writer.close()
