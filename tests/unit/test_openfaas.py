"""The manifests of OpenFaaS: what they run by whose word, and what it may do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/kalium_openfaas"
DIGEST = "sha256:" + "5" * 64


def variables(path: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    return read


NAMES = variables("roles/kalium_versions/defaults/main.yml")["kalium_versions_openfaas"]["images"]


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROLE / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # noqa: S701  # YAML, and no page
    )
    values = {
        "kalium_openfaas_namespace": "openfaas",
        "kalium_kubernetes_namespace": "openfaas-fn",
        "kalium_kubernetes_classes": {"stock": "gvisor", "kalium": "kalium"},
        "kalium_openfaas_image": {part: f"{name}@{DIGEST}" for part, name in NAMES.items()},
        "kalium_openfaas_timeout": "60s",
        "kalium_openfaas_node_port": 31112,
    }
    texts = (environment.get_template(name).render(values) for name in ("openfaas-base.yaml.j2", "openfaas.yaml.j2"))
    return [document for text in texts for document in yaml.safe_load_all(text)]


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in manifests if document["kind"] == kind}


def containers(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for deployment in of_kind(manifests, "Deployment").values():
        yield from deployment["spec"]["template"]["spec"]["containers"]


def test_every_part_is_run_by_the_image_that_was_given_and_none_is_pulled_anew(manifests: list[dict[str, Any]]) -> None:
    found = list(containers(manifests))

    assert {container["image"] for container in found} == {f"{name}@{DIGEST}" for name in NAMES.values()}
    assert {container["imagePullPolicy"] for container in found} == {"IfNotPresent"}
    assert not [name for name in NAMES.values() if ":" not in name or name.endswith(":latest")]


def test_no_part_has_privileges(manifests: list[dict[str, Any]]) -> None:
    for container in containers(manifests):
        context = container["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["runAsNonRoot"], context["capabilities"]) == (False, True, {"drop": ["ALL"]})


def test_a_profile_stands_for_each_runtime_class(manifests: list[dict[str, Any]]) -> None:
    profiles = of_kind(manifests, "Profile")

    assert {name: profile["spec"] for name, profile in profiles.items()} == {name: {"runtimeClassName": name} for name in ("gvisor", "kalium")}


def test_only_the_gateway_is_reached_from_outside(manifests: list[dict[str, Any]]) -> None:
    outside = {name: service for name, service in of_kind(manifests, "Service").items() if service["spec"].get("type")}

    assert {name: service["spec"]["ports"][0]["nodePort"] for name, service in outside.items()} == {"gateway-external": 31112}


def test_rights_are_of_two_namespaces_and_never_all(manifests: list[dict[str, Any]]) -> None:
    assert not of_kind(manifests, "ClusterRole") and not of_kind(manifests, "ClusterRoleBinding")
    for role in of_kind(manifests, "Role").values():
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]


def test_no_secret_is_written_into_a_manifest(manifests: list[dict[str, Any]]) -> None:
    assert not of_kind(manifests, "Secret")
