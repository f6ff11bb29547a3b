"""The program of a sandbox under test: a watchdog-like server on port 8080 that does in an invocation what its request says.

Only the standard library, and any Python from 3.10 on. A request is one JSON object:

* `{"python": CODE}` runs CODE in this process; what it assigns to `result` comes back, and `fields` are those of the request.
* `{"argv": [...], "env": {...}, "stdin": TEXT, "seconds": N}` runs a program; its code, output and errors come back.

A Python exception is an answer, too: `{"error": TYPE, "errno": N, "text": TEXT}`.
"""

import json
import os
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT = 8080
SECONDS_MAX = 120

Job = dict[str, Any]


def run_program(job: Job) -> Job:
    environment = {**os.environ, **job.get("env", {})}
    for name in [name for name, value in environment.items() if value is None]:
        del environment[name]
    done = subprocess.run(
        job["argv"],
        env=environment,
        input=job.get("stdin", ""),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=job.get("seconds", SECONDS_MAX),
        check=False,
    )
    return {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


def run_python(code: str, kept: Job, fields: list[tuple[str, str]]) -> Job:
    """`kept` is the same object for every request, so that a connection can outlive an invocation."""
    names = {"kept": kept, "fields": fields, "result": None}
    exec(compile(code, "<request>", "exec"), names)  # noqa: S102  # running code is what this program is for
    return {"result": names["result"]}


class Handler(BaseHTTPRequestHandler):
    """One request, one job."""

    kept: Job = {}

    def do_GET(self) -> None:  # the library's name
        self._answer({"ok": True})

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            answer = run_python(job["python"], self.kept, self.headers.items()) if "python" in job else run_program(job)
        except BaseException as error:  # noqa: BLE001  # whatever the job raises is its answer
            answer = {"error": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
        self._answer(answer)

    def _answer(self, answer: Job) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at answers and receivers."""


if __name__ == "__main__":
    print("serving", flush=True)
    ThreadingHTTPServer(("", PORT), Handler).serve_forever()
