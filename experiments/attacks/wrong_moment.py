"""Scenario 1b: the exploited function sends to a server that it may use, when its policy expects something else."""

from experiments.attacks.case import Case, Match
from experiments.entries import RECEIVE

# The policy allows one request to the image server in an invocation. The exploit spends it as the function would, and then
# sends a second one, on a connection of its own.
CASE = Case(
    name="wrong-moment",
    category="scenario-1",
    claim="a second request goes to the image server, which the function may ask only once",
    exploits={
        RECEIVE: """
            import requests
            marker = "@REVERSED@"[::-1]
            requests.get("@IMAGE@", verify=False, timeout=10)
            requests.get("@IMAGES@/" + marker, verify=False, timeout=10)
        """,
    },
    allowed_first=Match(("https",)),
    denied=Match(("https",)),
    at_receiver=lambda evidence, marker: evidence.imageserver(marker),
)
