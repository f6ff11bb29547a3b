"""How many bytes has the picture? Asks for it once, and a second time when the input says so."""

import http.client
import ssl
from typing import Any

from watchdog import Event, Failure

SECONDS_MAX = 10

# The certificate of a local site comes from an authority that nobody else knows.
ANY_CERTIFICATE = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
ANY_CERTIFICATE.check_hostname = False
ANY_CERTIFICATE.verify_mode = ssl.CERT_NONE


def handle(event: Event) -> Any:
    """Answer with the picture's size."""
    size = size_of_picture()
    if isinstance(event.body, dict) and event.body.get("again"):
        size_of_picture()
    return {"bytes": size}


def size_of_picture() -> int:
    """Fetch the picture and count its bytes. Raises Failure when that cannot be done."""
    server = http.client.HTTPSConnection("images.kalium.test", 4443, timeout=SECONDS_MAX, context=ANY_CERTIFICATE)
    try:
        server.request("GET", "/image.jpg")
        return len(server.getresponse().read())
    except (OSError, http.client.HTTPException) as error:
        raise Failure(502, f"cannot fetch the picture: {error}") from error
    finally:
        server.close()
