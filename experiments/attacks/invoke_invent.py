"""Scenario 2b: the exploited master invokes a function of its own application that no line of its policy names."""

from experiments.attacks.case import Case, Match
from experiments.entries import MASTER

CASE = Case(
    name="invoke-invent",
    category="scenario-2",
    claim="product-photos-1-microbench, which the application has, is invoked by a function whose CFG does not have it",
    exploits={
        MASTER: """
            import os, requests
            marker = "@REVERSED@"[::-1]
            requests.post(os.environ["URL_RECEIVE"], json=event.body, timeout=30)
            try:
                requests.post("http://gateway:8080/function/product-photos-1-microbench", json={**event.body, "marker": marker}, timeout=10)
            except requests.RequestException:
                pass
        """,
    },
    attacker=MASTER,
    allowed_first=Match(("invoke",), "product-photos-3-receive"),
    denied=Match(("invoke",), "product-photos-1-microbench"),
    at_receiver=None,
)
