"""The benchmark's functions: what they answer, what they send and in which order, and that a failure looks like one."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from functions_world import CLIENT_SSL, ROOT, STACK, DatabaseWorld, ImageWorld, load, running, served, write_files

from experiments.entries import E2_CALLEE, E2_LOAD, ENTRIES, FUNCTIONS, MASTER, MICROBENCH, RECEIVE, REPORT, SUCCESS, Entry
from experiments.loadgen import problem_with

PICTURE = bytes(range(256)) * 479  # 122,624 bytes, every value of a byte among them
VULNERABLE = f"attack/{RECEIVE}"
ASSIGNMENT = {"updatedBy": "x", "taskToken": "12345", "taskEvent": "1", "status": "pending"}
REGISTRATION = {"registrations": 3, "updated": 1, "assignment": "1", "id": "1", "phone": "200494", "name": "abcd"}


class World:
    """Everything around the functions. `call` loads and serves a function at its first use."""

    def __init__(self, images: ImageWorld, database: DatabaseWorld, folder: Path, stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
        self.images = images
        self.database = database
        self._folder = folder
        self._stack = stack
        self._patch = patch
        self._urls: dict[str, str] = {}

    def url(self, name: str) -> str:
        if name == MASTER:
            for step, callee in (("URL_RECEIVE", RECEIVE), ("URL_SUCCESS", SUCCESS), ("URL_REPORT", REPORT)):
                self._patch.setenv(step, self.url(callee))
        if name not in self._urls:
            watchdog, handler = load(write_files(name, self._folder))
            self._urls[name] = self._stack.enter_context(served(watchdog, handler.handle))
        return self._urls[name]

    def sample(self, name: str, **changes: Any) -> dict[str, Any]:
        body: dict[str, Any] = json.loads((STACK.parent / name / "sample.json").read_text(encoding="utf-8"))
        return body | ({"MediaUrl0": self.images.url} if "MediaUrl0" in body else {}) | changes

    def call(self, name: str, body: Any = None, *, path: str = "", method: str = "POST") -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url(name) + (path or "/"), data=data, method=method, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    tables = {
        "photoAssignmentTable": {"200494": json.dumps(ASSIGNMENT)},
        "photoRegistrationTable": {"200494": json.dumps(REGISTRATION)},
        "storedPhotosTable": {},
    }
    images, database = ImageWorld(tmp_path, PICTURE), DatabaseWorld(tables)
    for name, value in database.environment.items():
        monkeypatch.setenv(name, value)
    with running(images), running(database), contextlib.ExitStack() as stack:
        yield World(images, database, tmp_path, stack, monkeypatch)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_each_entry_answers_what_the_experiments_expect(entry: Entry, world: World) -> None:
    status, answer = world.call(entry.function, world.sample(entry.function), path=entry.path)

    assert problem_with(status, json.dumps(answer).encode(), list(entry.expect)) == ""


@pytest.mark.parametrize("name", [MICROBENCH, SUCCESS, REPORT])
def test_the_answer_keeps_what_came_in(name: str, world: World) -> None:
    body = world.sample(name)

    _, answer = world.call(name, body)

    assert {key: answer[key] for key in body if key != "photographer"} == {key: body[key] for key in body if key != "photographer"}


def test_the_microbenchmark_opens_a_connection_for_each_request(world: World) -> None:
    for _ in range(3):
        assert world.call(MICROBENCH, world.sample(MICROBENCH))[0] == 200

    assert world.images.paths == ["/image.jpg"] * 3
    assert world.images.connections == 3
    assert world.database.connections == []


def shapes(statements: list[str]) -> list[str]:
    """Statements without their values."""
    return [re.sub(r"\(?'.*'\)?", "?", statement) if "LIKE" not in statement else statement for statement in statements]


def test_receive_looks_up_the_assignment_and_then_stores_on_a_second_connection(world: World) -> None:
    assert world.call(RECEIVE, world.sample(RECEIVE))[0] == 200

    assert [shapes(statements) for statements in world.database.settled()] == [
        [
            "SET NAMES utf8mb4",
            "SHOW TABLES LIKE 'photoAssignmentTable'",
            "SELECT rowvalues FROM photoAssignmentTable WHERE rowkey = ?",
            "QUIT",
        ],
        [
            "SET NAMES utf8mb4",
            "SHOW TABLES LIKE 'storedPhotosTable'",
            "START TRANSACTION",
            "DELETE FROM storedPhotosTable WHERE rowkey = ?",
            "INSERT INTO storedPhotosTable (rowkey, rowvalues) VALUES ?",
            "COMMIT",
            "QUIT",
        ],
    ]
    assert world.images.paths == ["/image.jpg"]


def test_report_writes_the_registration_back_and_only_asks_for_the_assignments(world: World) -> None:
    assert world.call(REPORT, world.sample(REPORT))[0] == 200

    assert [shapes(statements) for statements in world.database.settled()] == [
        [
            "SET NAMES utf8mb4",
            "SHOW TABLES LIKE 'photoRegistrationTable'",
            "SELECT rowvalues FROM photoRegistrationTable WHERE rowkey = ?",
            "START TRANSACTION",
            "DELETE FROM photoRegistrationTable WHERE rowkey = ?",
            "INSERT INTO photoRegistrationTable (rowkey, rowvalues) VALUES ?",
            "COMMIT",
            "QUIT",
        ],
        ["SET NAMES utf8mb4", "SHOW TABLES LIKE 'photoAssignmentTable'", "QUIT"],
    ]


def test_the_database_is_spoken_to_in_clear_even_when_it_offers_tls(world: World) -> None:
    """The policy's peer is `mysql`: a client that turns to TLS by itself could not be judged."""
    world.call(REPORT, world.sample(REPORT))

    assert [flags & CLIENT_SSL for flags in world.database.client_flags] == [0, 0]


def test_the_stored_picture_can_be_read_back_byte_by_byte(world: World) -> None:
    world.call(RECEIVE, world.sample(RECEIVE))

    insert = next(statement for statement in world.database.settled()[1] if statement.startswith("INSERT"))
    key, value = re.fullmatch(r"INSERT INTO .* VALUES \('(\w+)', '(.*)'\)", insert).groups()  # type: ignore[union-attr]
    stored = json.loads(value.replace('\\"', '"'))
    assert key == "1"
    assert base64.b64decode(stored["Body"]) == PICTURE
    assert (stored["ContentType"], stored["Metadata"]) == ("image/jpg", {"from": "200494"})


def test_the_same_report_can_be_made_again(world: World) -> None:
    """What is written back still holds the assignment that the next request looks for."""
    world.call(REPORT, world.sample(REPORT))
    insert = next(statement for statement in world.database.settled()[0] if statement.startswith("INSERT"))
    value = re.fullmatch(r"INSERT INTO .* VALUES \('200494', '(.*)'\)", insert)[1]  # type: ignore[index]
    written = json.loads(value.replace('\\"', '"'))
    assert written.pop("updated") > 1
    assert written == {key: REGISTRATION[key] for key in REGISTRATION if key != "updated"}


def test_the_master_hands_each_answer_to_the_next_step(world: World) -> None:
    _, answer = world.call(MASTER, world.sample(MASTER), path="/photos")

    assert (answer["success"], answer["assignmentComplete"], answer["outcome"]) == ("true", "true", "photo taken")
    assert answer["photographer"] == ASSIGNMENT | {"status": "complete", "id": "200494"}


def test_a_failing_step_ends_the_flow_and_says_so(world: World) -> None:
    del world.database.tables["photoAssignmentTable"]["200494"]

    status, answer = world.call(MASTER, world.sample(MASTER), path="/photos")

    assert status == 502
    assert "photographer 200494 has no assignment" in answer["error"]
    assert len(world.database.connections) == 1, "nothing is stored or reported after the look-up failed"


@pytest.mark.parametrize(
    ("name", "changes", "status", "error"),
    [
        (MICROBENCH, {"MediaUrl0": None}, 400, "no MediaUrl0"),
        (MICROBENCH, {"MediaUrl0": "https://127.0.0.1:1/image.jpg"}, 502, "cannot fetch"),
        (RECEIVE, {"From": 200494}, 400, "no From"),
        (RECEIVE, {"From": "999999"}, 404, "no assignment"),
        (RECEIVE, {"MediaUrl0": "https://127.0.0.1:1/image.jpg"}, 502, "cannot fetch"),
        (SUCCESS, {"photographer": "200494"}, 400, "no photographer"),
        (REPORT, {"data": {}}, 400, "no data.id"),
        (REPORT, {"data": {"id": 2}}, 409, "no assignment for product 2"),
        (REPORT, {"photographer": {"id": "999999"}}, 404, "not registered"),
    ],
)
def test_a_failure_is_never_answered_by_2xx(name: str, changes: dict[str, Any], status: int, error: str, world: World) -> None:
    answered, answer = world.call(name, world.sample(name, **changes))

    assert answered == status
    assert error in answer["error"]


def test_a_picture_that_is_not_there_is_a_failure_and_not_stored(world: World) -> None:
    status, answer = world.call(RECEIVE, world.sample(RECEIVE, MediaUrl0=world.images.url.replace("image.jpg", "other.jpg")))

    assert status == 502
    assert "answered 404" in answer["error"]
    assert len(world.database.connections) <= 1


@pytest.mark.parametrize("statement", ["SHOW TABLES", "SELECT", "DELETE", "INSERT", "COMMIT"])
def test_an_error_of_the_database_is_a_failure(statement: str, world: World) -> None:
    world.database.fails = statement

    status, answer = world.call(REPORT, world.sample(REPORT))

    assert status == 500
    assert "no such table" in answer["error"]


def test_a_table_that_is_missing_is_not_made(world: World) -> None:
    del world.database.tables["photoRegistrationTable"]

    status, answer = world.call(REPORT, world.sample(REPORT))

    assert (status, answer) == (500, {"error": "LookupError: the database has no table photoRegistrationTable"})
    assert world.database.settled() == [["SET NAMES utf8mb4", "SHOW TABLES LIKE 'photoRegistrationTable'", "QUIT"]]


def test_other_methods_and_paths_are_refused(world: World) -> None:
    assert world.call(RECEIVE, method="GET")[0] == 405
    assert world.call(MASTER, world.sample(MASTER), path="/request")[0] == 404
    assert world.call(MASTER, world.sample(MASTER), path="/photos/")[0] == 404
    assert world.database.connections == []


def test_the_vulnerable_variant_runs_its_input_and_then_does_the_same_work(world: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    body = world.sample(RECEIVE, exploit=f"import pathlib\npathlib.Path({str(mark)!r}).write_text('ran')")

    status, answer = world.call(VULNERABLE, body)

    assert mark.read_text() == "ran"
    assert (status, answer["image"], answer["success"]) == (200, "storedPhotosTable/1", "true")
    assert [len(statements) for statements in world.database.settled()] == [4, 7]


@pytest.mark.parametrize("name", [SUCCESS, MASTER])
def test_each_vulnerable_variant_runs_its_own_field_alone_and_sees_its_request(name: str, world: World, tmp_path: Path) -> None:
    """One input is passed on through all of them."""
    field = {SUCCESS: "exploit_success", MASTER: "exploit_master"}[name]
    mark = tmp_path / "mark"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).write_text(event.headers['Content-Type'])"
    others = {other: "raise SystemError" for other in ("exploit", "exploit_success", "exploit_master") if other != field}

    world.call(f"attack/{name}", world.sample(name, **others, **{field: code}))

    assert mark.read_text() == "application/json"


def test_an_exploit_that_is_stopped_fails_its_request_and_nothing_else(world: World) -> None:
    status, answer = world.call(VULNERABLE, world.sample(RECEIVE, exploit="raise PermissionError('stopped')"))

    assert (status, answer) == (500, {"error": "PermissionError: stopped"})
    assert world.call(VULNERABLE, world.sample(RECEIVE))[0] == 200


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_other_function_runs_its_input(name: str, world: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    path = "/photos" if name == MASTER else ""
    world.call(name, world.sample(name, exploit=f"open({str(mark)!r}, 'w')"), path=path)

    assert not mark.exists()
    assert not any("exec(" in path.read_text(encoding="utf-8") for path in (STACK.parent / name).glob("*.py"))


@pytest.mark.parametrize(("name", "module"), [(RECEIVE, "receive.py"), (SUCCESS, "success.py"), (MASTER, "master.py")])
def test_apart_from_the_hole_a_vulnerable_variant_is_the_function(name: str, module: str, tmp_path: Path) -> None:
    plain, vulnerable = write_files(name, tmp_path), write_files(f"attack/{name}", tmp_path)

    def files(place: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in place.rglob("*") if path.is_file()}

    left, right = files(plain), files(vulnerable)
    assert right.pop(module) == left.pop("handler.py")
    assert right.pop("hole.py").count(b"exec(") == 1 and b"exec(" not in right.pop("handler.py")
    assert left == right


def test_the_functions_know_nothing_of_what_mediates_them() -> None:
    """An application is protected without a change; so there must be nothing in it to begin with."""
    files = [path for path in STACK.parent.rglob("*") if path.suffix in (".py", ".json", ".yml", ".txt", ".in")]
    assert len(files) > 10

    words = re.compile(r"kalium|guard|controller|x-call-id", re.IGNORECASE)
    knowing = [str(path) for path in files if words.search(path.read_text(encoding="utf-8"))]

    assert knowing == []


def test_the_stack_file_describes_each_function_once() -> None:
    stack = yaml.safe_load(STACK.read_text(encoding="utf-8"))

    assert sorted(stack["functions"]) == sorted([*FUNCTIONS, E2_LOAD, E2_CALLEE])
    assert list(stack["x-variants"]) == [f"attack/{name}" for name in (RECEIVE, SUCCESS, MASTER)]
    for name, description in stack["functions"].items():
        assert description["handler"] == f"./{name}"
        assert all(isinstance(value, str) for value in (description.get("environment") or {}).values())


def test_every_locked_requirement_has_hashes_and_no_index_address() -> None:
    text = (ROOT / "functions" / "requirements.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^([a-z0-9-]+)==\S+ \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.MULTILINE)

    assert sorted(pins) == sorted(re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE))
    assert {"pymysql", "requests"} <= set(pins)
    assert "://" not in text


def test_the_tables_first_state_has_the_published_shape_and_can_be_applied_again() -> None:
    """Eight tables, one row each; the stored picture is 63,594 numbers in 225,637 characters."""
    text = (ROOT / "roles" / "kalium_database" / "files" / "schema.sql").read_text(encoding="utf-8")

    tables = [re.findall(rf"^{words} (\w+)", text, re.MULTILINE) for words in ("CREATE TABLE IF NOT EXISTS", "DELETE FROM", "INSERT INTO")]
    stored = re.search(r"CONCAT\((.*)\)\);", text, re.DOTALL)
    assert stored
    pieces = re.findall(r"REPEAT\('([^']*)', (\d+)\)|'([^']*)'", stored[1])
    value = "".join(repeated * int(count) if count else plain for repeated, count, plain in pieces)

    assert tables[0] == tables[1] == tables[2]
    assert len(set(tables[0])) == 8
    assert text.index("START TRANSACTION;") < text.index("DELETE FROM") < text.index("COMMIT;")
    assert (len(value), len(json.loads(value)["Body"]["data"])) == (225_637, 63_594)
