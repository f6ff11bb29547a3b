"""The systems under comparison: how each is asked for when a function is deployed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RUNTIME_LABEL = "kalium.io/runtime"
APP_ANNOTATION = "kalium.io/app"
TIMERS_ANNOTATION = "kalium.io/timers"


@dataclass(frozen=True)
class System:
    """A system as results name it; `app` and `mode` are empty for one without a guard. `timed` makes the guard measure itself."""

    name: str
    runtime: str
    app: str = ""
    mode: str = ""
    timed: bool = False

    @property
    def is_guarded(self) -> bool:
        return bool(self.app)

    @property
    def labels(self) -> Mapping[str, str]:
        return {RUNTIME_LABEL: self.runtime, "com.openfaas.scale.min": "1"}

    @property
    def annotations(self) -> Mapping[str, str]:
        return ({APP_ANNOTATION: self.app} if self.app else {}) | ({TIMERS_ANNOTATION: "on"} if self.timed else {})


STOCK = System("stock", "stock")
STOCK_B = System("stock-b", "stock")  # a second deployment of the baseline: what a difference of nothing looks like
KALIUM_AUDIT = System("kalium-audit", "kalium", "hello-retail-audit", "audit")
KALIUM_ENFORCE = System("kalium-enforce", "kalium", "hello-retail", "enforce")
KALIUM_STRICT = System("kalium-enforce", "kalium", "hello-retail-strict", "enforce")  # the attack suite: one entry only
E2_ENFORCE = System("kalium-enforce", "kalium", "e2", "enforce", timed=True)
E2_OFF = System("kalium-off", "kalium", "e2", "off", timed=True)
E1_SYSTEMS = (STOCK, STOCK_B, KALIUM_AUDIT, KALIUM_ENFORCE)
