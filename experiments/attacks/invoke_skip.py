"""Scenario 2a: the exploited master leaves out product-photos-4-success and goes on with product-photos-6-report."""

from experiments.attacks.case import Case, Match
from experiments.entries import MASTER

CASE = Case(
    name="invoke-skip",
    category="scenario-2",
    claim="product-photos-6-report is invoked by the function that may, without the step before it",
    exploits={
        MASTER: """
            import os, requests
            marker = "@REVERSED@"[::-1]
            received = requests.post(os.environ["URL_RECEIVE"], json=event.body, timeout=30).json()
            try:
                requests.post(os.environ["URL_REPORT"], timeout=10, json={**received, "assignmentComplete": "true", "marker": marker})
            except requests.RequestException:
                pass
        """,
    },
    attacker=MASTER,
    allowed_first=Match(("invoke",), "product-photos-3-receive"),
    denied=Match(("invoke",), "product-photos-6-report"),
    at_receiver=None,
)
