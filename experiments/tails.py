"""Logs of the site's services, followed while a task runs: one file on one host, or the same file on every host of a group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments import machine
from experiments.errors import ExperimentError, RunRefused
from experiments.machine import Machine
from experiments.site import Host

HERE = Host("localhost", "local")


class LogTail:
    """The lines that a service appends to its log from now on; `host` is where the file is."""

    def __init__(self, path: Path, host: Host = HERE) -> None:
        self.path = path
        self._machine: Machine = machine.of(host)
        self.offset, _ = self._machine.read_from(path, FAR)

    def __str__(self) -> str:
        return str(self.path) if self._machine.host.is_local else f"{self.path} on host {self._machine.host}"

    def new_lines(self) -> list[bytes]:
        """Whole lines written since the last call, oldest first; a line still being written is left for the next call."""
        size, data = self._machine.read_from(self.path, self.offset)
        if size < self.offset:
            raise ExperimentError(
                "hostfiles.log_cut",
                f"follow {self}",
                "it became shorter while it was read",
                "run the task again; nothing may rotate or empty the service's logs during a run",
            )
        end = data.rfind(b"\n") + 1
        self.offset += end
        return data[:end].splitlines()

    def new_records(self) -> list[dict[str, Any]]:
        """`new_lines` of a log that has one JSON object a line. Raises RunRefused for another line."""
        records = []
        for line in self.new_lines():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RunRefused(
                    "hostfiles.malformed", f"read a line of {self}", f"{error}: {line[:200]!r}", "report it: the agent writes one JSON object a line"
                ) from error
            if isinstance(record, dict):
                records.append(record)
        return records


class LogTails:
    """The same log of several hosts, each followed by itself and all asked at the same time."""

    def __init__(self, path: Path, hosts: Sequence[Host]) -> None:
        self.tails = machine.each(hosts, lambda one: LogTail(path, one.host))

    def __str__(self) -> str:
        return ", ".join(map(str, self.tails))

    def new_records(self) -> list[dict[str, Any]]:
        """Records written since the last call: of one host in its own order, of several by their `time_ms`."""
        if len(self.tails) == 1:
            return self.tails[0].new_records()
        with ThreadPoolExecutor(min(machine.AT_ONCE_MAX, len(self.tails))) as pool:
            parts = list(pool.map(LogTail.new_records, self.tails))
        # Stable: two records of one host with the same time stay as they were written.
        return sorted((record for part in parts for record in part), key=lambda record: int(record.get("time_ms") or 0))


FAR = 1 << 62  # an offset behind the end of every file: only its size is asked for
