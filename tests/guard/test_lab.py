"""The lab itself: what it says of stock gVisor and of an enforced sandbox differs exactly in what the policy refuses."""

from .lab import Lab
from .world import Receiver, http_answer

POLICY = """\
schema: kalium/v1
app: lab
version: 1
mode: enforce
on_unavailable: {app_edge: deny, deadline_ms: 60000}
peers:
  web: {host: web.test, port: 80, protocol: http}
entries: [caller]
functions:
  caller:
    messages:
      - {http: GET, peer: web, path: /allowed}
"""


def test_stock_delivers_what_enforcement_refuses() -> None:
    with Lab({"lab": POLICY}, {"web.test": "10.199.0.2"}) as lab:
        web = Receiver(lab.world, lab.world.address(2), 80, answer=http_answer)
        for runtime, delivered in (("runsc-stock", True), ("runsc-kalium", False)):
            with lab.sandbox("lab", "caller", runtime=runtime) as sandbox:
                web.clear()
                allowed = sandbox.program("curl", "-sS", "-m", "30", "http://web.test/allowed")
                refused = sandbox.program("curl", "-sS", "-m", "30", "http://web.test/refused")
                assert (allowed["code"], allowed["stdout"]) == (0, "ok")
                assert (refused["code"] == 0) is delivered
                assert (b"/refused" in web.received) is delivered
                if not delivered:
                    assert sandbox.denials() == ["http not_in_policy"]
        web.close()
