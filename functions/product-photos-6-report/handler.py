"""The assignment is complete: write it into the photographer's registration."""

import json
import time
from typing import Any

from keyvalue import Table
from watchdog import Event, Failure


def handle(event: Event) -> Any:
    """Update the photographer's registration, and answer with the input and the outcome."""
    try:
        product, phone = str(event.body["data"]["id"]), event.body["photographer"]["id"]
    except (KeyError, TypeError) as error:
        raise Failure(400, "the body has no data.id or no photographer.id") from error
    with Table("photoRegistrationTable") as registrations:
        value = registrations.get(phone)
        if value is None:
            raise Failure(404, f"photographer {phone} is not registered")
        registration = json.loads(value)
        if registration.get("assignment") != product:
            raise Failure(409, f"photographer {phone} has no assignment for product {product}")
        # The registration keeps its assignment: the same input finds it again.
        registration["updated"] = time.time_ns() // 1_000_000
        registrations.put(phone, json.dumps(registration))
    # Its assignment is not deleted either; the connection that would do it is opened and closed.
    with Table("photoAssignmentTable"):
        return {**event.body, "outcome": "photo taken"}
