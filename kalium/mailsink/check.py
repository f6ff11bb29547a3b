"""Asking a running mail sink whether it takes mail."""

from __future__ import annotations

import smtplib

from kalium.errors import EXIT_NO, KaliumError
from kalium.mailsink.config import Config

ASK_SECONDS_MAX = 5.0
NEXT = "see /var/log/kalium/mailsink.log"


def check(config: Config) -> str:
    """Go as far as naming a recipient, and send no mail; returns a sentence.

    Raises KaliumError with exit code 3 when the sink cannot be asked, and 1 when it refuses.
    """
    where = f"{config.host}:{config.port}"
    attempted = f"cannot hand mail to {where}"
    try:
        with smtplib.SMTP(config.host, config.port, local_hostname="check", timeout=ASK_SECONDS_MAX) as client:
            client.ehlo_or_helo_if_needed()
            for code, said in (client.mail("check@localhost"), client.rcpt("check@localhost"), client.rset()):
                if code != 250:
                    raise KaliumError("mailsink.refused", attempted, f"it answered {code} {said.decode('utf-8', 'replace')}", NEXT, EXIT_NO)
            has_tls = client.has_extn("starttls")
    except (OSError, smtplib.SMTPException) as error:
        raise KaliumError("mailsink.unreachable", attempted, str(error) or type(error).__name__, NEXT) from error
    return f"{where} takes mail, {'with' if has_tls else 'without'} STARTTLS"
