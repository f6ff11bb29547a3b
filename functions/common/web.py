"""The two HTTP requests that the functions make. Each opens a connection of its own and closes it."""

from __future__ import annotations

import ssl
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from watchdog import Failure

CALL_SECONDS_MAX = 30
TEXT_CHARACTERS_MAX = 200


class _AnyCertificate(HTTPAdapter):
    """HTTPS without a look at the certificate, as the application was published.

    `verify=False` alone still loads the machine's certificate authorities for each connection, which takes longer than the
    request; so the settings are made once.
    """

    settings = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    settings.check_hostname = False
    settings.verify_mode = ssl.CERT_NONE

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Use the settings for every connection of this adapter."""
        super().init_poolmanager(*args, ssl_context=self.settings, **options)


urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy and no .netrc to look for in a function
    return session


def fetch(url: str) -> bytes:
    """What `url` holds. Raises Failure when the server cannot be reached or answers anything but 2xx."""
    try:
        with _session() as session:
            session.mount("https://", _AnyCertificate())
            answer = session.get(url, verify=False, timeout=CALL_SECONDS_MAX)
    except requests.RequestException as error:
        raise Failure(502, f"cannot fetch {url}: {error}") from error
    if not answer.ok:
        raise Failure(502, f"cannot fetch {url}: it answered {answer.status_code}")
    return answer.content


def post(url: str, body: Any) -> Any:
    """The JSON that `url` answers to `body`. Raises Failure when it cannot be reached or answers anything but 2xx JSON."""
    try:
        with _session() as session:
            answer = session.post(url, json=body, timeout=2 * CALL_SECONDS_MAX)
        if answer.ok:
            return answer.json()
    except requests.RequestException as error:
        raise Failure(502, f"cannot post to {url}: {error}") from error
    raise Failure(502, f"cannot post to {url}: it answered {answer.status_code}: {answer.text[:TEXT_CHARACTERS_MAX]}")
