"""A photographer's picture has arrived: fetch it, find whose assignment it answers, and store it."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from keyvalue import Table
from watchdog import Event, Failure
from web import fetch


def handle(event: Event) -> Any:
    """Store the picture under its assignment's event, and answer with the input and what was found."""
    body = checked(event)
    with ThreadPoolExecutor(max_workers=1) as pool:
        found = pool.submit(assignment_of, body["From"])
        picture = fetch(body["MediaUrl0"])
        photographer = found.result()
    key = photographer["taskEvent"]
    # As text, because the column holds JSON. The picture can be read back from it byte by byte.
    stored = {"Body": base64.b64encode(picture).decode(), "ContentType": body.get("MediaContentType"), "Metadata": {"from": body["From"]}}
    with Table("storedPhotosTable") as photos:
        photos.put(key, json.dumps(stored))
    return {**body, "photographer": photographer, "image": f"storedPhotosTable/{key}", "success": "true"}


def checked(event: Event) -> dict[str, Any]:
    """The body, when it is one that this function can work with."""
    if event.method != "POST":
        raise Failure(405, "only POST is answered")
    if not isinstance(event.body, dict):
        raise Failure(400, "the body is no JSON object")
    missing = [name for name in ("From", "MediaUrl0") if not isinstance(event.body.get(name), str)]
    if missing:
        raise Failure(400, f"the body has no {' and no '.join(missing)}")
    return event.body


def assignment_of(phone: str) -> dict[str, Any]:
    """What the photographer with this phone number was asked for."""
    with Table("photoAssignmentTable") as assignments:
        value = assignments.get(phone)
    if value is None:
        raise Failure(404, f"photographer {phone} has no assignment")
    return {**json.loads(value), "id": phone}
