"""What a watch makes of what the API server says, also when it forgets, lies, repeats itself or is not there."""

import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalium.engine.kubernetes.watch import Change, Reflection, uid_of, version_of
from kalium.engine.limits import TOMBSTONES_MAX, WATCH_PAUSE_SECONDS

Object = dict[str, Any]


def thing(uid: str, version: int, **more: Any) -> Object:
    return {"metadata": {"uid": uid, "name": uid, "resourceVersion": str(version), "managedFields": ["x"], **more}}


def a_list(version: int, *items: Object) -> Object:
    return {"metadata": {"resourceVersion": str(version)}, "items": list(items)}


def event(kind: str, found: Object) -> Object:
    return {"type": kind, "object": found}


def told(changes: list[Change]) -> list[tuple[str, int, bool]]:
    return [(uid_of(change.object), version_of(change.object), change.is_gone) for change in changes]


def listed(*items: Object, version: int = 10) -> Reflection:
    reflection = Reflection()
    reflection.listed(a_list(version, *items))
    return reflection


def test_a_list_is_what_there_is_and_where_the_watch_begins() -> None:
    reflection = Reflection()
    assert (reflection.version, reflection.is_synced) == (None, False)

    changes = reflection.listed(a_list(10, thing("a", 3), thing("b", 4)))

    assert told(changes) == [("a", 3, False), ("b", 4, False)]
    assert (reflection.version, reflection.is_synced) == ("10", True)
    assert "managedFields" not in reflection.objects["a"]["metadata"], "what nobody reads is not kept"


def test_events_change_one_object_and_move_the_version() -> None:
    reflection = listed(thing("a", 3))

    assert told(reflection.event(event("ADDED", thing("b", 11)))) == [("b", 11, False)]
    assert told(reflection.event(event("MODIFIED", thing("a", 12)))) == [("a", 12, False)]
    assert told(reflection.event(event("BOOKMARK", thing("", 15)))) == []
    assert reflection.version == "15"
    assert told(reflection.event(event("DELETED", thing("a", 16)))) == [("a", 16, True)]
    assert (set(reflection.objects), reflection.version) == ({"b"}, "16")


def test_what_is_not_in_a_new_list_is_gone_and_the_rest_is_no_news() -> None:
    reflection = listed(thing("a", 3), thing("b", 4))

    changes = reflection.listed(a_list(20, thing("b", 4), thing("c", 19)))

    assert told(changes) == [("a", 3, True), ("c", 19, False)]


def test_an_older_object_than_is_known_is_not_news() -> None:
    """Our own request was answered before the watch told of what came before it."""
    reflection = listed(thing("a", 3))

    assert told(reflection.apply(thing("a", 12))) == [("a", 12, False)]
    assert told(reflection.event(event("MODIFIED", thing("a", 11)))) == []
    assert reflection.version == "11", "the watch goes on behind it"
    assert told(reflection.event(event("MODIFIED", thing("a", 12)))) == [], "and the answer is told once"


def test_what_was_deleted_does_not_come_back_by_what_is_told_late() -> None:
    reflection = listed(thing("a", 3))

    assert told(reflection.forget("a")) == [("a", 3, True)]
    assert told(reflection.event(event("MODIFIED", thing("a", 11)))) == []
    assert told(reflection.event(event("DELETED", thing("a", 12)))) == []
    assert reflection.objects == {}
    assert told(reflection.listed(a_list(20, thing("a2", 19)))) == [("a2", 19, False)]


def test_a_list_from_before_a_deletion_does_not_bring_it_back() -> None:
    reflection = listed(thing("a", 3))
    reflection.forget("a")

    assert told(reflection.listed(a_list(11, thing("a", 3)))) == []
    assert told(reflection.event(event("DELETED", thing("a", 12)))) == []


def test_what_was_made_after_a_list_is_not_gone_because_the_list_has_it_not() -> None:
    reflection = listed(thing("a", 3))
    reflection.apply(thing("b", 12))

    assert told(reflection.listed(a_list(11, thing("a", 3)))) == []
    assert told(reflection.listed(a_list(12, thing("a", 3)))) == [("b", 12, True)]


def test_tombstones_are_bounded() -> None:
    reflection = listed()

    for number in range(TOMBSTONES_MAX + 5):
        reflection.forget(str(number))

    assert len(reflection._tombstones) == TOMBSTONES_MAX
    assert told(reflection.event(event("ADDED", thing("0", 11)))) == [("0", 11, False)], "the oldest is forgotten first"


@pytest.mark.parametrize("by", ["status", "event"])
def test_410_lists_again_at_once_and_keeps_what_is_known(by: str) -> None:
    reflection = listed(thing("a", 3))

    if by == "status":
        pause = reflection.failed(410)
    else:
        assert reflection.event(event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired"})) == []
        pause = 0.0

    assert (pause, reflection.version, set(reflection.objects)) == (0.0, None, {"a"})


def test_a_list_that_is_told_410_is_not_asked_for_without_a_pause() -> None:
    reflection = listed()
    reflection.failed(410)

    assert reflection.failed(410) > 0


def test_a_connection_that_breaks_goes_on_where_it_was_after_growing_pauses() -> None:
    reflection = listed(thing("a", 3))
    first, longest = WATCH_PAUSE_SECONDS

    pauses = [reflection.failed(0) for _ in range(20)]

    assert pauses[:3] == [first, first * 2, first * 4]
    assert max(pauses) == pauses[-1] == longest
    assert (reflection.version, set(reflection.objects)) == ("10", {"a"})
    reflection.event(event("MODIFIED", thing("a", 11)))
    assert reflection.failed(0) == first, "an event shows that it works again"


def test_another_refusal_lists_again_after_a_pause() -> None:
    reflection = listed(thing("a", 3))

    assert reflection.failed(403) > 0
    assert (reflection.version, set(reflection.objects)) == (None, {"a"})


def test_a_watch_that_ends_at_once_is_not_begun_again_at_once() -> None:
    reflection = listed()

    assert reflection.ended(300.0) == 0.0
    assert reflection.ended(0.001) > 0
    assert reflection.version == "10"


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"type": "ADDED"},
        {"type": "ADDED", "object": None},
        {"type": "ADDED", "object": {"metadata": {}}},
        {"type": "MODIFIED", "object": {"metadata": {"resourceVersion": "11"}}},
        {"type": "BOOKMARK", "object": {"metadata": {}}},
        {"type": "ERROR", "object": {"code": 500}},
        {"type": "ERROR", "object": None},
    ],
)
def test_what_is_no_event_lists_again_and_loses_nothing(document: Any) -> None:
    reflection = listed(thing("a", 3))

    assert reflection.event(document) == []
    assert (reflection.version, set(reflection.objects)) == (None, {"a"})


@pytest.mark.parametrize("document", [{}, {"metadata": {}}, {"metadata": {"resourceVersion": "1"}, "items": [{"metadata": {}}]}])
def test_what_is_no_list_is_a_failure_and_loses_nothing(document: Object) -> None:
    reflection = listed(thing("a", 3))

    with pytest.raises(ValueError, match="no list"):
        reflection.listed(document)
    assert set(reflection.objects) == {"a"}


@given(st.randoms(use_true_random=False), st.lists(st.sampled_from(["add", "change", "delete"]), max_size=40))
def test_whatever_fails_it_ends_as_the_server_is(chance: random.Random, history: list[str]) -> None:
    """A server with a history, a watch that breaks, is compacted, repeats and is answered out of turn: at the end both are the same."""
    server: dict[str, Object] = {}
    events: list[Object] = []
    version = 10
    reflection = Reflection()
    seen: dict[str, int] = {}

    def take(changes: list[Change]) -> None:
        for uid, found, is_gone in told(changes):
            assert found >= seen.get(uid, 0), "an object never goes back"
            seen[uid] = found
            assert is_gone or uid in reflection.objects

    def catch_up(*, is_last: bool = False) -> None:
        if reflection.version is None:
            take(reflection.listed(copy.deepcopy(a_list(version, *server.values()))))
            return
        after = [entry for entry in events if version_of(entry["object"]) > int(reflection.version or 0)]
        for entry in after[: len(after) if is_last else chance.randint(0, len(after))]:
            take(reflection.event(copy.deepcopy(entry)))

    for step in history:
        version += 1
        if step == "add" or not server:
            uid = f"o{version}"
            server[uid] = thing(uid, version)
            events.append(event("ADDED", server[uid]))
        elif step == "change":
            uid = chance.choice(sorted(server))
            server[uid] = thing(uid, version)
            events.append(event("MODIFIED", server[uid]))
            if chance.random() < 0.3:
                take(reflection.apply(copy.deepcopy(server[uid])))
        else:
            uid = chance.choice(sorted(server))
            del server[uid]
            events.append(event("DELETED", thing(uid, version)))
            if chance.random() < 0.3:
                take(reflection.forget(uid))
        fault = chance.choice(["none", "none", "break", "gone", "garbage", "refused"])
        if fault == "break":
            reflection.failed(0)
        elif fault == "gone":
            reflection.failed(410)
        elif fault == "garbage":
            reflection.event({"type": "ERROR", "object": {"code": 500}})
        elif fault == "refused":
            reflection.failed(403)
        if chance.random() < 0.6:
            catch_up()
    catch_up()
    catch_up(is_last=True)

    assert {uid: version_of(found) for uid, found in reflection.objects.items()} == {uid: version_of(found) for uid, found in server.items()}
