"""Scenario 2d: the exploited function invokes product-photos-4-success by itself, twice, before the application does."""

from experiments.attacks.case import Case, Match
from experiments.entries import RECEIVE

CASE = Case(
    name="invoke-twice",
    category="scenario-2",
    claim="product-photos-4-success is invoked twice by a function that may not invoke it",
    exploits={
        RECEIVE: """
            import requests
            marker = "@REVERSED@"[::-1]
            for attempt in range(2):
                try:
                    requests.post("http://gateway:8080/function/product-photos-4-success", timeout=10,
                                  json={"photographer": {"id": "200494"}, "marker": marker})
                except requests.RequestException:
                    pass
        """,
    },
    denied=Match(("invoke", "http"), "product-photos-4-success"),
    at_receiver=None,
)
