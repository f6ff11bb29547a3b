"""The rules of calls, which tests/unit holds against MemoryCalls, held against RedisCalls: the same tests, another store."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import controller_samples
import pytest
import test_controller_state
import test_controller_state_edges

from control.store import Stores

# What looks into MemoryCalls or measures it.
OF_MEMORY = {
    "test_a_call_that_is_over_leaves_no_memory_behind",
    "test_a_live_call_with_8_open_branches_takes_at_most_1200_bytes",
    "test_a_place_is_used_as_often_as_its_number_has_room_for",
    "test_the_memory_of_starts_has_a_bound_and_forgets_the_oldest",  # which is another one here: test_store_shared.py
    "test_the_places_of_a_call_are_used_again",
    "test_many_evictions_come_in_portions",  # the bound is an argument there
    "test_whatever_happens_nothing_is_left_when_everything_is_over",  # test_store_same.py has its twin
}


def cases_of(rule: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The arguments of each case that pytest would make of the rule."""
    choices: list[list[dict[str, Any]]] = []
    for mark in getattr(rule, "pytestmark", []):
        names, values = mark.args[:2]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        choices.append([dict(zip(names, [value] if len(names) == 1 else value, strict=True)) for value in values])
    for parts in itertools.product(*choices):
        yield {name: value for part in parts for name, value in part.items()}


def rules() -> list[Any]:
    """Every rule with every case."""
    found = []
    for module in (test_controller_state, test_controller_state_edges):
        for name, rule in sorted(vars(module).items()):
            if name.startswith("test_") and name not in OF_MEMORY:
                found += [pytest.param(module, rule, case, id=f"{name}-{number}") for number, case in enumerate(cases_of(rule))]
    return found


@pytest.mark.parametrize(("module", "rule", "case"), rules())
def test_a_rule_of_calls_holds_in_redis(
    module: Any, rule: Callable[..., None], case: dict[str, Any], stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(inspect.signature(rule).parameters) == set(case), "it takes a fixture: give it one here, or a place in OF_MEMORY"
    for place in (controller_samples, module):
        if hasattr(place, "state_of"):
            monkeypatch.setattr(place, "state_of", stores.state_of)

    rule(**case)


def test_what_is_left_out_is_there() -> None:
    assert {name for name in OF_MEMORY if hasattr(test_controller_state, name) or hasattr(test_controller_state_edges, name)} == OF_MEMORY
