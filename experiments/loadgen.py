# ruff: noqa: UP006, UP032, UP035 - this file runs on the client host with that host's own python3, from 3.6 on
"""The load generator: one self-contained program that needs nothing but Python's standard library.

It reads a plan (one JSON object) on standard input, sends the planned requests one after the other, each on a connection
of its own as curl would, and writes one JSON object a line to standard output: a sample for each request in the order
sent, then `{"type": "end", "samples": N}`. A plan that ends without that line has lost samples. It stops at the first
request whose answer is not what the plan expects, because such a run is refused as a whole.

Plan: {"seconds_max": S, "series": [{"entry", "via", "url", "body", "expect": [[path...], value]..., "requests",
"first_is_cold", "call_prefix"}]}. A sample: {"type", "entry", "via", "seq", "status", "seconds", "warm", "call_id",
"problem"}; `seconds` runs on the monotonic clock from before connect until the last byte of the answer, and `status` is 0
when there was no answer.
"""

import http.client
import json
import sys
import time
from typing import Any, Dict, Iterator, List, Tuple
from urllib.parse import urlsplit

EXCERPT_BYTES = 300


def at(document: Any, path: List[Any]) -> Any:
    """The value at `path` (keys and indexes) of a JSON document; None where the path leads nowhere."""
    for step in path:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return None
    return document


def problem_with(status: int, body: bytes, expect: List[Any]) -> str:
    """Why this answer must not be counted; empty when it is what the plan expects."""
    excerpt = body[:EXCERPT_BYTES].decode("utf-8", "replace")
    if not 200 <= status <= 299:
        return "status {}: {!r}".format(status, excerpt)
    try:
        document = json.loads(body.decode("utf-8"))
    except ValueError as error:
        return "body is not JSON ({}): {!r}".format(error, excerpt)
    for path, value in expect:
        found = at(document, path)
        if found != value:
            return "body: {} is {!r}, expected {!r}".format("/".join(str(step) for step in path), found, value)
    return ""


def request(url: str, body: bytes, call_id: str, seconds_max: float) -> Tuple[int, float, bytes, str]:
    """POST `body` once on a fresh connection: status (0: no answer), seconds, the answer's body, what went wrong."""
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json", "X-Call-Id": call_id, "Connection": "close"}
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=seconds_max)
    begin = time.perf_counter()
    try:
        connection.request("POST", parts.path or "/", body=body, headers=headers)
        response = connection.getresponse()
        answer = response.read()
        return response.status, time.perf_counter() - begin, answer, ""
    except (OSError, http.client.HTTPException) as error:
        return 0, time.perf_counter() - begin, b"", "{}: {}".format(type(error).__name__, error)
    finally:
        connection.close()


def samples_of(series: Dict[str, Any], seconds_max: float) -> Iterator[Dict[str, Any]]:
    """Send the requests of one series and yield their samples."""
    body = json.dumps(series["body"]).encode("utf-8")
    for seq in range(series["requests"]):
        call_id = "{}-{}".format(series["call_prefix"], seq)
        status, seconds, answer, problem = request(series["url"], body, call_id, seconds_max)
        yield {
            "type": "sample",
            "entry": series["entry"],
            "via": series["via"],
            "seq": seq,
            "status": status,
            "seconds": round(seconds, 9),
            "warm": not (series["first_is_cold"] and seq == 0),
            "call_id": call_id,
            "problem": problem or problem_with(status, answer, series["expect"]),
        }


def main() -> int:
    """Run the plan on standard input; 0 also when it stopped early, since the samples say so."""
    plan = json.load(sys.stdin)
    count = 0
    for series in plan["series"]:
        for sample in samples_of(series, plan["seconds_max"]):
            count += 1
            print(json.dumps(sample), flush=True)
            if sample["problem"]:
                return 0
    print(json.dumps({"type": "end", "samples": count}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
