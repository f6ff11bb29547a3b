"""Asking a running image server whether it is what its configuration says."""

from __future__ import annotations

import http.client
import ssl

from kalium.errors import EXIT_NO, KaliumError
from kalium.imageserver.config import Config

ASK_SECONDS_MAX = 5.0
NEXT = "see /var/log/kalium/imageserver.log"


def check(config: Config, path: str) -> str:
    """Ask for `path` over TLS and compare with the file; returns a sentence.

    Raises KaliumError with exit code 3 when the server cannot be asked, and 1 when it gives another certificate or other bytes than
    the configuration names.
    """
    where = f"{config.host}:{config.port}"
    attempted = f"cannot get https://{where}{path}"
    # Who signed the certificate is for the functions' side to judge; here it is compared with the file itself.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection(config.host, config.port, timeout=ASK_SECONDS_MAX, context=context)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert isinstance(connection.sock, ssl.SSLSocket)
        served, version = connection.sock.getpeercert(binary_form=True), connection.sock.version()
        chain = config.certificate.read_text(encoding="ascii")
        wanted = (config.root / path.lstrip("/")).read_bytes()
    except (OSError, http.client.HTTPException) as error:
        raise KaliumError("imageserver.unreachable", attempted, str(error) or type(error).__name__, NEXT) from error
    finally:
        connection.close()
    if answer.status != 200 or body != wanted:
        raise KaliumError("imageserver.wrong", attempted, f"status {answer.status} and {len(body)} bytes that are not the file's", NEXT, EXIT_NO)
    begin, end = (chain.find(line) for line in ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"))
    if begin < 0 or served != ssl.PEM_cert_to_DER_cert(chain[begin : end + len("-----END CERTIFICATE-----")]):
        raise KaliumError("imageserver.certificate", attempted, f"its certificate is not that of {config.certificate}", NEXT, EXIT_NO)
    return f"{where} serves {path}, {len(body)} bytes, over {version}"
