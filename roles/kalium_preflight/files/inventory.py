#!/usr/bin/env python3
"""Judge the inventory of a site on Kubernetes before any host is asked; print every problem as JSON.

`inventory.py SITE`, where SITE is the JSON object of templates/inventory.json.j2. The output is {"problems": [{"code", "attempted",
"found", "next"}]}. Runs on the machine that runs Ansible, with nothing but the standard library.
"""

import ipaddress
import json
import re
import sys

# Hosts of these groups are reached by others, by their kalium_layout_address.
SERVING = ("kube_control", "function_nodes", "controller", "store", "images", "database")
ONE_HOST = ("kube_control", "images", "database")
CONTROLLERS_MAX = 8  # as an agent's configuration has it
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Names that no public name server knows (RFC 2606, RFC 6761, RFC 6762, RFC 9476, ICANN's choice of 2024).
NOT_PUBLIC = ("test", "example", "invalid", "localhost", "local", "internal", "alt", "lan", "home.arpa")
EXAMPLE = re.compile(r"EXAMPLE|(^|\.)example$")
HTTP_PORT = 80


class Judgement:
    """The problems of one site, in the order in which they are told."""

    def __init__(self, site):
        self.site = site
        self.hosts = site["hosts"]
        self.groups = site["groups"]
        self.problems = []

    def problem(self, code, attempted, found, next_step):
        self.problems.append({"code": "preflight." + code, "attempted": attempted, "found": found, "next": next_step})

    def members(self, *groups):
        """Hosts of any of these groups, each once, in the inventory's order."""
        wanted = {host for group in groups for host in self.groups.get(group, [])}
        return [host for host in self.hosts if host in wanted]


def is_example(host):
    return any(EXAMPLE.search(host[field]) for field in ("reach", "user", "address"))


def check_example(judged):
    """A folder that nobody edited yet: one sentence, and nobody is asked over the network."""
    untouched = [name for name, host in judged.hosts.items() if host["connection"] != "local" and is_example(host)]
    if untouched:
        judged.problem(
            "example", "reach " + ", ".join(untouched), "their names or addresses in the inventory are still the example's",
            "put your own hosts there: %s/README.md says where, or `fab inventory --from-manifest FILE` for CloudLab" % judged.site["inventories"],
        )  # fmt: skip
    return bool(untouched)


def check_form(judged):
    strange = sorted({host["engine"] for host in judged.hosts.values()} - {"kubernetes"})
    if strange:
        judged.problem(
            "engine", "set up one site with several engines", "some hosts have kalium_engine " + ", ".join(strange),
            "set kalium_engine once, in group_vars/all.yml",
        )  # fmt: skip
    if judged.site["service_manager"] != "systemd":
        judged.problem(
            "service_manager", "keep the services of a cluster running with " + judged.site["service_manager"],
            "hosts of a cluster have systemd, and the roles for them use it", "set kalium_service_manager to systemd",
        )  # fmt: skip
    if judged.site["gateway_backend"] not in ("kalium", "openfaas"):
        judged.problem(
            "gateway_backend", "serve the gateway with %r" % judged.site["gateway_backend"], "it is neither kalium nor openfaas",
            "set gateway_backend in group_vars/all.yml",
        )  # fmt: skip


def check_groups(judged):
    for group in ("build", *ONE_HOST, "controller", "function_nodes", "client"):
        hosts = judged.groups.get(group, [])
        if not hosts or (group in ONE_HOST and len(hosts) > 1):
            judged.problem(
                "group", "use the group " + group, "it has %s" % (", ".join(hosts) or "no host"),
                "give it %s" % ("exactly one host" if group in ONE_HOST else "a host"),
            )  # fmt: skip
    if len(judged.groups.get("controller", [])) > CONTROLLERS_MAX:
        judged.problem(
            "group", "use the group controller", "it has %d hosts" % len(judged.groups["controller"]), "give it %d at most" % CONTROLLERS_MAX
        )
    if len(judged.groups.get("store", [])) > 1:
        judged.problem("group", "use the group store", "it has %s" % ", ".join(judged.groups["store"]), "give it one host, or none")
    both = sorted(set(judged.groups.get("kube_control", [])) & set(judged.groups.get("function_nodes", [])))
    if both:
        judged.problem(
            "group", "run functions on " + ", ".join(both), "the control plane runs there, and a function that breaks out would hold all",
            "take it out of function_nodes, or add a host",
        )  # fmt: skip
    for host in judged.members("build"):
        serves = [group for group in SERVING if host in judged.groups.get(group, [])]
        if serves:
            judged.problem(
                "group", "build on " + host, "it is also in %s, and whoever takes over such a host would change what is built" % ", ".join(serves),
                "build on the machine that runs Ansible, and keep it out of the cluster",
            )  # fmt: skip
    for host in judged.members(*SERVING):
        if judged.hosts[host]["connection"] == "local" and host not in judged.groups.get("build", []):
            judged.problem(
                "group", "use %s for a cluster" % host, "its connection is local: it is this machine", "give it a name that SSH reaches",
            )  # fmt: skip


def check_names(judged):
    for host in judged.members("kube_control", "function_nodes"):
        if not all(LABEL.fullmatch(label) for label in host.split(".")) or len(host) > 63:
            judged.problem(
                "node_name", "call a node of the cluster %r" % host, "Kubernetes takes lower-case letters, digits, hyphens and dots, 63 at most",
                "rename it in the inventory; ansible_host says how it is reached",
            )  # fmt: skip
    seen = {}
    for name, host in judged.hosts.items():
        if host["connection"] != "local":
            seen.setdefault((host["reach"], host["port"]), []).append(name)
    for (reach, _), names in seen.items():
        if len(names) > 1:
            judged.problem(
                "duplicate", "tell %s apart" % " and ".join(names), "all of them are %s" % reach, "keep one name, and give it all the groups",
            )  # fmt: skip


def check_addresses(judged):
    """Each host that others reach says where, and no two say the same."""
    seen, networks = {}, [(name, ipaddress.ip_network(cidr)) for name, cidr in judged.site["networks"].items()]
    for host in (host for host in judged.members(*SERVING) if judged.hosts[host]["connection"] != "local"):
        text = judged.hosts[host]["address"]
        try:
            address = ipaddress.IPv4Address(text)
        except ValueError:
            judged.problem(
                "address", "reach %s from the other hosts" % host, "its kalium_layout_address is %s" % (repr(text) if text else "missing"),
                "give it the IPv4 address that it has on the site's network (`ip -4 address` shows it)",
            )  # fmt: skip
            continue
        if address.is_loopback or address.is_unspecified or address.is_multicast:
            judged.problem(
                "address", "reach %s from the other hosts" % host, "%s leads nowhere from there" % text, "use its address on the site's network"
            )
        for variable, network in networks:
            if address in network:
                judged.problem(
                    "address", "reach %s as %s" % (host, text), "that is in %s, which the cluster uses for itself" % network,
                    "choose another network with %s" % variable,
                )  # fmt: skip
        if text in seen:
            judged.problem("duplicate", "tell %s and %s apart" % (seen[text], host), "both have the address " + text, "correct one of them")
        seen.setdefault(text, host)


def check_certificate(judged):
    """What Let's Encrypt would refuse without asking anybody; where the name leads is looked up later (between.py)."""
    name, port = judged.site["certificate"]["name"], judged.site["certificate"]["port"]
    if not judged.site["certificate"]["issuer"].startswith("letsencrypt"):
        return
    labels = name.lower().rstrip(".").split(".")
    try:
        ipaddress.ip_address(name)
        number = True
    except ValueError:
        number = False
    if (
        number
        or len(labels) < 2
        or not all(LABEL.fullmatch(label) for label in labels)
        or any(("." + name).endswith("." + end) for end in NOT_PUBLIC)
    ):
        judged.problem(
            "name", "have Let's Encrypt certify %r" % name, "it is no public host name",
            "set kalium_imageserver_name to one that leads to the host of the group images from everywhere, or use another kalium_imageserver_issuer",
        )  # fmt: skip
    if port != HTTP_PORT:
        judged.problem(
            "challenge_port", "answer Let's Encrypt on port %d" % port, "it asks on port 80 only", "set kalium_imageserver_http01_port to 80",
        )  # fmt: skip


def judge(site):
    """Every problem of the site as a list."""
    judged = Judgement(site)
    if not check_example(judged):
        for check in (check_form, check_groups, check_names, check_addresses, check_certificate):
            check(judged)
    return judged.problems


if __name__ == "__main__":
    print(json.dumps({"problems": judge(json.loads(sys.argv[1]))}))
