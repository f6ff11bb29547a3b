"""What the API server of a cluster says of its nodes and pods, asked with kubectl on the control plane's host."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import machine
from experiments.errors import ExperimentError, RunRefused
from experiments.site import Cluster, Site
from experiments.systems import RUNTIME_LABEL, System

KUBECTL_SECONDS_MAX = 30.0
GONE_SECONDS_MAX = 90.0  # a pod that does not end by itself is killed after 30
POLL_SECONDS = 0.5
FUNCTION_LABEL = "faas_function"  # as OpenFaaS calls it


@dataclass(frozen=True)
class Pod:
    """One pod of the functions' namespace; `trouble` says why it is not ready, as far as the cluster knows."""

    name: str
    function: str
    node: str
    address: str
    runtime_class: str
    is_ready: bool
    is_ending: bool
    trouble: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Pod:
        """The pod of an item of `kubectl get pods -o json`."""
        meta, spec, status = record["metadata"], record["spec"], record.get("status") or {}
        conditions = {str(entry["type"]): entry for entry in status.get("conditions") or []}
        return cls(
            name=str(meta["name"]),
            function=str((meta.get("labels") or {}).get(FUNCTION_LABEL, "")),
            node=str(spec.get("nodeName") or ""),
            address=str(status.get("podIP") or ""),
            runtime_class=str(spec.get("runtimeClassName") or ""),
            is_ready=conditions.get("Ready", {}).get("status") == "True",
            is_ending="deletionTimestamp" in meta,
            trouble=_trouble(status, conditions),
        )


def _trouble(status: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]) -> str:
    """The most telling of what a pod's status holds: why a container waits or ended, else why it is not scheduled or not ready."""
    for container in status.get("containerStatuses") or []:
        for state in ("waiting", "terminated"):
            told = (container.get("state") or {}).get(state)
            if told:
                return ": ".join(part for part in (str(told.get("reason") or state), str(told.get("message") or "")) if part)
    for kind in ("PodScheduled", "Ready"):
        condition = conditions.get(kind, {})
        if condition.get("status") == "False":
            return ": ".join(str(condition[key]) for key in ("reason", "message") if condition.get(key))
    return str(status.get("reason") or status.get("phase") or "no status yet")


@dataclass(frozen=True)
class Node:
    """A node of the cluster; `troubles` is what its conditions say that is not as it should be."""

    name: str
    troubles: Sequence[str]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Node:
        """The node of an item of `kubectl get nodes -o json`."""
        troubles = []
        for condition in (record.get("status") or {}).get("conditions") or []:
            wanted = "True" if condition["type"] == "Ready" else "False"
            if condition.get("status") != wanted:
                troubles.append(f"{condition['type']} is {condition.get('status')} ({condition.get('reason')}: {condition.get('message')})")
        if (record.get("spec") or {}).get("unschedulable"):
            troubles.append("it takes no pods (cordoned)")
        return cls(str(record["metadata"]["name"]), troubles)


class ClusterView:
    """Questions to the API server of a site on Kubernetes."""

    def __init__(self, site: Site, cluster: Cluster) -> None:
        self._site = site
        self._cluster = cluster
        self.namespace = cluster.namespace

    @classmethod
    def of(cls, site: Site) -> ClusterView | None:
        """The view, or None for a site that has no cluster."""
        return None if site.cluster is None else cls(site, site.cluster)

    def kubectl(self, *words: str) -> bytes:
        """What kubectl prints. Raises ExperimentError when the API server does not answer."""
        command = ["kubectl", "--kubeconfig", str(self._cluster.kubeconfig), "--request-timeout", f"{KUBECTL_SECONDS_MAX:.0f}s", *words]
        done = machine.of(self._site.control).run(command, root=True, seconds_max=KUBECTL_SECONDS_MAX + 10, again=True)
        if done.status != 0:
            raise ExperimentError(
                "cluster.kubectl", f"ask the API server on host {self._site.control} for {' '.join(words[:3])}", done.complaint(),
                f"see `journalctl -u kubelet` and `ctr -n k8s.io containers ls` on {self._site.control.name}",
            )  # fmt: skip
        return done.out

    def _items(self, *words: str) -> list[Mapping[str, Any]]:
        items: list[Mapping[str, Any]] = json.loads(self.kubectl("get", *words, "-o", "json"))["items"]
        return items

    def nodes(self) -> list[Node]:
        """Every node of the cluster."""
        return [Node.of(record) for record in self._items("nodes")]

    def pods(self) -> list[Pod]:
        """Every pod of the functions' namespace."""
        return [Pod.of(record) for record in self._items("pods", "-n", self._cluster.namespace)]

    def placed(self, functions: Sequence[str], system: System) -> dict[str, Pod]:
        """A ready pod of each function. Raises RunRefused when any runs under another runtime than `system` asks for."""
        wanted = self._cluster.classes[system.labels[RUNTIME_LABEL]]
        ready: dict[str, Pod] = {}
        for one in self.pods():
            # Of several, each may get requests: one of the wrong kind is not hidden by one of the right kind.
            if one.is_ready and not one.is_ending and (one.function not in ready or one.runtime_class != wanted):
                ready[one.function] = one
        for name in functions:
            pod = ready.get(name)
            if pod is None or pod.runtime_class != wanted:
                found = "it has no ready pod" if pod is None else f"pod {pod.name} has RuntimeClass {pod.runtime_class or 'none'}"
                raise RunRefused(
                    "cluster.runtime",
                    f"run {name} under {system.name}, RuntimeClass {wanted}",
                    found,
                    "see the gateway's log; nothing is measured under a wrong name",
                )
        return {name: ready[name] for name in functions}

    def wait_gone(self, functions: Sequence[str]) -> None:
        """Return when no pod of `functions` is left: what ends would take time and addresses from what is measured next."""
        deadline = time.monotonic() + GONE_SECONDS_MAX
        while True:
            left = [pod for pod in self.pods() if pod.function in functions]
            if not left:
                return
            if time.monotonic() > deadline:
                raise ExperimentError(
                    "cluster.not_gone", f"wait until pod {left[0].name} on node {left[0].node or 'none'} is gone",
                    f"it is still there after {GONE_SECONDS_MAX:.0f} s: {left[0].trouble}",
                    f"see `journalctl -u kubelet -u containerd` on {left[0].node}",
                )  # fmt: skip
            time.sleep(POLL_SECONDS)
