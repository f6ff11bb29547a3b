#!/usr/bin/env python3
"""Whether the hosts of a site reach each other where they will have to; nothing is changed.

`between.py listen SPECIFICATION` listens on this host's ports for `seconds` at most, in a process of its own, and prints {"pid", "ports"}:
by PROTOCOL/PORT `listening`, or `held` by somebody else. `between.py probe SPECIFICATION` tries the ports of others and prints
{"problems": [{"code", "attempted", "found", "next"}], "notes": [text]}. `between.py stop PID` ends that process. `between.py name
SPECIFICATION` judges where the name of a certificate leads. The specifications are those of templates/between.json.j2 and tasks/outside.yml.

A listener says which host it is on, and reads nothing: an address that leads to another host than the inventory says is found as well.
Where a service of ours has the port already, that it accepts is enough.

Runs under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import concurrent.futures
import errno
import ipaddress
import json
import os
import select
import signal
import socket
import sys
import time

GREETING = "kalium-preflight "
OUTSIDE = "outside"  # who asks when it is no host of the site
LISTEN_SECONDS_MAX = 60
TRY_SECONDS = 3.0
UDP_TRIES = 3
AT_ONCE = 32


def problem(code, attempted, found, next_step):
    return {"code": "preflight." + code, "attempted": attempted, "found": found, "next": next_step}


# Listening -----------------------------------------------------------------------------------------------------------------------------------


def bind(protocol, address, port):
    """A socket, or None when somebody has the port; raises OSError when the address is not this host's."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    try:
        if protocol == "tcp":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        if protocol == "tcp":
            listener.listen(64)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    listener.setblocking(False)
    return listener


def answer(listener, greeting):
    try:
        if listener.type & socket.SOCK_DGRAM:
            _, sender = listener.recvfrom(64)
            listener.sendto(greeting, sender)
        else:
            connection, _ = listener.accept()
            connection.sendall(greeting)
            connection.close()
    except OSError:
        pass  # it has gone away


def serve(listeners, greeting, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ready, _, _ = select.select(listeners, [], [], max(0.0, deadline - time.monotonic()))
        for listener in ready:
            answer(listener, greeting)


def listen(spec):
    """Bind what others want to reach here, then leave the answering to a process that outlives this one until its time is up."""
    report, ours = {"pid": 0, "ports": {}}, []
    for path in spec["paths"]:
        name = "%s/%d" % (path.get("protocol", "tcp"), int(path["port"]))
        if spec["me"] not in spec["groups"].get(path["to"], []) or name in report["ports"]:
            continue
        try:
            # Whoever asks from outside may use another of this host's addresses.
            listener = bind(path.get("protocol", "tcp"), "" if path["from"] == OUTSIDE else spec["address"], int(path["port"]))
        except OSError:
            continue  # preflight.py tells of an address that is not this host's
        report["ports"][name] = "listening" if listener else "held"
        ours += [listener] if listener else []
    if not ours:
        return report
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        # A session of its own and no terminal, pipe or file of whoever started it: the connection of that one may end.
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(read_end)
        os.close(write_end)
        serve(ours, (GREETING + spec["me"] + "\n").encode(), min(float(spec["seconds"]), LISTEN_SECONDS_MAX))
        os._exit(0)
    os.close(write_end)
    os.read(read_end, 1)  # ends when the child has left our files alone
    report["pid"] = child
    return report


def stop(pid, proc="/proc"):
    """End the listener, and nothing that has its number by now."""
    try:
        with open(os.path.join(proc, str(pid), "cmdline"), "rb") as file:
            arguments = file.read().split(b"\0")
    except OSError:
        return
    if b"listen" in arguments and any(os.path.basename(argument) == os.path.basename(__file__).encode() for argument in arguments):
        os.kill(pid, signal.SIGTERM)


# Probing -------------------------------------------------------------------------------------------------------------------------------------


def greeted_by(said):
    """The host that a greeting names, or None: it is a service's own."""
    text = said.decode("utf-8", "replace")
    return text[len(GREETING) :].strip() if text.startswith(GREETING) else None


def try_tcp(address, port, greeted):
    """(what is wrong or None, host that answered or None)."""
    try:
        with socket.create_connection((address, port), timeout=TRY_SECONDS) as connection:
            return None, greeted_by(connection.recv(256)) if greeted else None
    except socket.timeout:
        return "nothing answers within %g s" % TRY_SECONDS, None
    except OSError as error:
        return (error.strerror or str(error)).lower(), None


def try_udp(address, port, _):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(TRY_SECONDS / UDP_TRIES)
        for _ in range(UDP_TRIES):
            try:
                asking.sendto(GREETING.encode(), (address, port))
                said, sender = asking.recvfrom(256)
                if sender[0] == address:
                    return None, greeted_by(said)
            except socket.timeout:
                continue
            except OSError as error:
                return (error.strerror or str(error)).lower(), None
    return "no datagram comes back within %g s" % TRY_SECONDS, None


def wanted_from(spec):
    """What this host has to reach: (path, host), for each path of the site that begins in a group of this one."""
    me, groups = spec["me"], spec["groups"]
    for path in spec["paths"]:
        if me in groups.get(path["from"], []):
            for host in groups.get(path["to"], []):
                if host != me:
                    yield path, host


def probe_one(spec, path, host):
    """The problem of one path to one host, a note about it, or None; what nobody listens for cannot be judged."""
    protocol, port = path.get("protocol", "tcp"), int(path["port"])
    other = spec["hosts"].get(host, {})
    state = other.get("ports", {}).get("%s/%d" % (protocol, port))
    if not other.get("address") or state is None or (state == "held" and protocol == "udp"):
        return None
    wrong, answered = (try_tcp if protocol == "tcp" else try_udp)(other["address"], port, state == "listening")
    if wrong and other.get("firewall"):
        # It is there to drop what nobody allowed yet, and roles/kalium_node allows these ports.
        return "the firewall of %s (%s) is opened for the site's ports by site.yml; whether they are reached is seen then" % (host, other["firewall"])
    what = "reach %s at %s:%d/%s for %s" % (host, other["address"], port, protocol, path["for"])
    if wrong:
        return problem(
            "closed", what, wrong,
            "open %d/%s from this host on %s and on whatever is between them (`sudo ufw status`, `sudo nft list ruleset`, the site's own firewall)"
            % (port, protocol, host),
        )  # fmt: skip
    if answered is not None and answered != host:
        return problem("address", what, "the host that answers there is " + answered, "correct kalium_layout_address of %s" % host)
    return None


def probe(spec):
    wanted = list(wanted_from(spec))
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda pair: probe_one(spec, *pair), wanted))
    notes = sorted({one for one in found if isinstance(one, str)})
    return {"problems": [one for one in found if isinstance(one, dict)], "notes": notes}


# The name of a certificate --------------------------------------------------------------------------------------------------------------------


def resolve(name):
    """Every address that the name has, seen from here. Raises OSError when it has none."""
    return sorted({entry[4][0] for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def judge_name(spec, lookup=resolve):
    """Let's Encrypt looks the name up and asks every address of it: all have to be public, and the host's own."""
    name, host = spec["name"], spec["host"]
    attempted = "have Let's Encrypt certify %s" % name
    try:
        found = lookup(name)
    except OSError as error:
        return [
            problem(
                "name", attempted, "this machine finds no address for it (%s)" % (error.strerror or error),
                "use the public name of %s, or add it to the DNS; on CloudLab it is NODE.EXPERIMENT.PROJECT-PG0.SITE.cloudlab.us" % host,
            )
        ]  # fmt: skip
    private = [address for address in found if not ipaddress.ip_address(address).is_global]
    if private:
        return [
            problem(
                "name", attempted, "it leads to %s, which nobody outside can reach" % ", ".join(private),
                "use a name with public addresses only, or another kalium_imageserver_issuer: letsencrypt needs one",
            )
        ]  # fmt: skip
    own = {spec["public"]} if spec["public"] else set(spec["addresses"])
    elsewhere = [address for address in found if address not in own]
    if own and elsewhere:
        return [
            problem(
                "name", attempted, "it leads to %s, and %s has %s" % (", ".join(elsewhere), host, ", ".join(sorted(own))),
                "correct the name or the DNS; behind a translating router, set kalium_preflight_public_address to the address outside",
            )
        ]  # fmt: skip
    return []


def main(verb, argument):
    if verb == "listen":
        print(json.dumps(listen(json.loads(argument))))
    elif verb == "probe":
        print(json.dumps(probe(json.loads(argument))))
    elif verb == "name":
        print(json.dumps({"problems": judge_name(json.loads(argument))}))
    else:
        stop(int(argument))


if __name__ == "__main__":
    main(*sys.argv[1:3])
