"""The configuration is read strictly, its page shows one that works, and the page's tables are whole."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kalium.engine.config import CONFIG_BYTES_MAX, KubernetesConfig, load
from kalium.engine.limits import QUEUE_REQUESTS_MAX, REPLICAS_MAX
from kalium.engine.log import EVENTS, FIELDS, Log
from kalium.errors import KaliumError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "gateway.md").read_text(encoding="utf-8")
SHOWN: dict[str, Any]
CLUSTER: dict[str, Any]
SHOWN, CLUSTER = map(json.loads, re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))


def loaded(folder: Path, document: Any) -> Any:
    path = folder / "engine.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return load(path)


def test_the_pages_configuration_is_one(tmp_path: Path) -> None:
    config = loaded(tmp_path, SHOWN)

    assert (config.admin.host, config.admin.port, config.log) == ("127.0.0.1", 31112, None)
    assert config.backend.runtimes["kalium"].guarded
    assert config.backend.runtimes["kalium"].flags[-1] == "pod-init-config=/etc/kalium/pod-init.json"
    assert config.hosts["images.kalium.test"] == "10.137.0.1"


def test_the_pages_configuration_of_a_cluster_is_one(tmp_path: Path) -> None:
    config = loaded(tmp_path, CLUSTER)

    assert isinstance(config.backend, KubernetesConfig)
    assert (config.backend.runtimes["stock"].name, config.backend.runtimes["stock"].guarded) == ("gvisor", False)
    assert (config.backend.runtimes["kalium"].name, config.backend.runtimes["kalium"].guarded) == ("kalium", True)
    assert config.backend.kubeconfig == Path("/etc/kalium/kubernetes/gateway.conf")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda document: document.update(podman=["podman"]), "unknown key podman"),
        (lambda document: document.update(backend="docker"), "backend is 'docker'"),
        (lambda document: document.pop("kubernetes"), "lacks kubernetes"),
        (lambda document: document["kubernetes"].pop("classes"), "kubernetes lacks classes"),
        (lambda document: document["kubernetes"].update(classes=[]), "kubernetes.classes is []"),
        (lambda document: document["kubernetes"]["classes"].update(Stock=CLUSTER["kubernetes"]["classes"]["stock"]), "runtimes holds 'Stock'"),
        (lambda document: document["kubernetes"]["classes"]["kalium"].update(guarded="yes"), "classes.kalium.guarded is 'yes'"),
        (lambda document: document["kubernetes"].update(node_selector={"a": 1}), "no object of texts"),
        (lambda document: document["kubernetes"].update(namespace="other"), "unknown key namespace"),
    ],
)
def test_what_is_wrong_for_a_cluster_is_named(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], told: str) -> None:
    document = copy.deepcopy(CLUSTER)
    spoil(document)

    with pytest.raises(KaliumError, match=re.escape(told)):
        loaded(tmp_path, document)


def test_relative_paths_are_meant_from_the_files_folder(tmp_path: Path) -> None:
    config = loaded(tmp_path, {**SHOWN, "state_dir": "state", "password_file": "p", "log": "engine.log"})

    assert [config.state_dir, config.password_file, config.log] == [tmp_path / name for name in ("state", "p", "engine.log")]


@pytest.mark.parametrize("key", sorted(set(SHOWN) - {"log"}))
def test_every_key_is_needed_and_has_a_type(tmp_path: Path, key: str) -> None:
    for document in ({name: value for name, value in SHOWN.items() if name != key}, {**SHOWN, key: None}, {**SHOWN, key: [[]]}):
        with pytest.raises(KaliumError, match=key) as caught:
            loaded(tmp_path, document)
        assert caught.value.code == "engine.config"
        assert len(caught.value.for_humans().splitlines()) == 2


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda document: document.update(portt=1), "unknown key portt"),
        (lambda document: document["admin"].update(port=True), "admin.port is True"),
        (lambda document: document["admin"].update(port=65536), "admin.port is 65536"),
        (lambda document: document["admin"].update(host="localhost"), "admin.host is 'localhost'"),
        (lambda document: document["data"].pop("host"), "data lacks host"),
        (lambda document: document.update(user="a:b"), "colon"),
        (lambda document: document.update(user=""), "user is ''"),
        (lambda document: document.update(podman=[]), "podman is not a list of words"),
        (lambda document: document.update(health_path="health"), "health_path is 'health'"),
        (lambda document: document.update(function_port=0), "function_port is 0"),
        (lambda document: document["hosts"].update({"a b": "10.0.0.1"}), "'a b', which is no host's name"),
        (lambda document: document["hosts"].update({"a": "::1"}), "hosts.a is '::1'"),
        (lambda document: document["bridge"].update(name="a-very-long-name"), "bridge.name is"),
        (lambda document: document["bridge"].update(name="../x"), "bridge.name is"),
        (lambda document: document["bridge"].update(prefix=31), "bridge.prefix is 31"),
        (lambda document: document["bridge"].update(first="10.137.1.10"), "no range of 10.137.0.0/24"),
        (lambda document: document["bridge"].update(first="10.137.0.250"), "no range of"),
        (lambda document: document["bridge"].update(first="10.137.0.1"), "beside 10.137.0.1"),
        (lambda document: document["bridge"].update(last="10.137.0.255"), "no range of"),
        (lambda document: document["runtimes"].update({"Stock": SHOWN["runtimes"]["stock"]}), "runtimes holds 'Stock'"),
        (lambda document: document["runtimes"]["stock"].update(path="runsc"), "not absolute"),
        (lambda document: document["runtimes"]["stock"].update(flags=["--network=host"]), "'--network=host'"),
        (lambda document: document["runtimes"]["stock"].update(flags=["a=b c"]), "'a=b c'"),
        (lambda document: document["runtimes"]["kalium"].update(guarded="yes"), "runtimes.kalium.guarded is 'yes'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], told: str) -> None:
    document = copy.deepcopy(SHOWN)
    spoil(document)

    with pytest.raises(KaliumError, match=re.escape(told)):
        loaded(tmp_path, document)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', " " * (CONFIG_BYTES_MAX + 1)])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(KaliumError) as caught:
        loaded(tmp_path, text)
    assert caught.value.code == "engine.config"


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(KaliumError, match="No such file"):
        load(tmp_path / "absent.json")


def test_the_page_lists_every_event_with_its_level() -> None:
    listed = {
        event: level
        for events, level in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (info|warning|error) \|", PAGE, re.MULTILINE)
        for event in re.findall(r"\w+", events)
    }

    assert listed == EVENTS


def test_the_page_tells_the_limits_as_they_are() -> None:
    assert f"{QUEUE_REQUESTS_MAX} requests wait already" in PAGE
    assert f"0 to {REPLICAS_MAX} replicas" in PAGE


def test_the_log_is_json_lines_with_known_fields(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as stream:
        log = Log(stream, clock=lambda: 1.5)
        log("instance_left", function="echo", detail="what\nit said")
        with pytest.raises(AssertionError):
            log("instance_left", password="x")
        with pytest.raises(KeyError):
            log("an_unknown_event")

    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"event": "instance_left", "level": "error", "time_ms": 1500, "function": "echo", "detail": "what\nit said"}


def test_every_field_of_the_log_is_used() -> None:
    """A field that nobody writes is a promise that nobody keeps."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (Path(__file__).resolve().parents[2] / "kalium" / "engine").rglob("*.py"))

    assert {field for field in FIELDS if not re.search(rf"\b{field}=", sources)} == set()
