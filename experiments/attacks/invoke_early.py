"""Scenario 2e: the exploited function invokes product-photos-6-report before product-photos-4-success has run."""

from experiments.attacks.case import Case, Match
from experiments.entries import RECEIVE

CASE = Case(
    name="invoke-early",
    category="scenario-2",
    claim="product-photos-6-report is invoked before product-photos-4-success",
    exploits={
        RECEIVE: """
            import requests
            marker = "@REVERSED@"[::-1]
            try:
                requests.post("http://gateway:8080/function/product-photos-6-report", timeout=10,
                              json={"data": {"id": 1}, "photographer": {"id": "200494"}, "photographers": ["1"], "marker": marker})
            except requests.RequestException:
                pass
        """,
    },
    denied=Match(("invoke", "http"), "product-photos-6-report"),
    at_receiver=None,
)
