#!/usr/bin/env python3
"""The site's ports in the firewall of this host: `firewall.py which`, `open LIST PORT/PROTOCOL ...`, `close LIST`.

`which` prints ufw, firewalld, iptables or nftables when one of them drops what comes in, else none. `open` allows what is not allowed yet,
after writing into LIST how to take it back, and prints `changed` or `unchanged`; `close` takes back exactly what LIST says.

Runs as root under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import json
import os
import shutil
import subprocess
import sys

COMMENT = "kalium"
IPTABLES = ("ip", "filter", "INPUT")  # the chain as nft sees it; nft must not write there, since iptables could not read it any more


def run(command):
    """Exit status and output; 127 and nothing when there is no such program."""
    if shutil.which(command[0]) is None:
        return 127, ""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, env=dict(os.environ, LC_ALL="C")
    )
    return done.returncode, done.stdout


def nft(*words):
    """What `nft list` says, as objects of one kind after the other; none when there is no nft."""
    status, text = run(["nft", "--json", "list", *words])
    return json.loads(text)["nftables"] if status == 0 and text.startswith("{") else []


def dropping_chains():
    """Chains of nftables in which what comes in is dropped unless a rule says otherwise, as [family, table, chain]."""
    for chain in [entry["chain"] for entry in nft("chains") if "chain" in entry]:
        where = (chain["family"], chain["table"], chain["name"])
        if chain.get("hook") == "input" and chain.get("policy") == "drop" and chain["family"] in ("ip", "inet") and where != IPTABLES:
            yield list(where)


def which():
    if run(["ufw", "status"])[1].startswith("Status: active"):
        return "ufw"
    if run(["firewall-cmd", "--state"])[0] == 0:
        return "firewalld"
    if run(["iptables", "--list-rules", "INPUT"])[1].startswith("-P INPUT DROP"):
        return "iptables"
    return "nftables" if list(dropping_chains()) else "none"


def ruled(where):
    """{comment: handle} of the rules in a chain of nftables."""
    rules = [entry["rule"] for entry in nft("chain", *where) if "rule" in entry]
    return {rule["comment"]: str(rule["handle"]) for rule in rules if "comment" in rule}


def nft_delete(where, comment):
    handle = ruled(where).get(comment)
    return ["nft", "delete", "rule", *where, "handle", handle] if handle else ["true"]


def openings(firewall, port):
    """(whether it is allowed already, how to allow it, how to take that back) for each place where `port` has to be allowed."""
    number, protocol = port.split("/")
    if firewall == "ufw":
        yield "Skipping" in run(["ufw", "--dry-run", "allow", port])[1], ["ufw", "allow", port], ["ufw", "delete", "allow", port]
    elif firewall == "firewalld":
        # For as long as it runs: the unit is a part of firewalld's and allows them again with it.
        told = ["firewall-cmd", "--quiet"]
        yield run([*told, "--query-port=" + port])[0] == 0, [*told, "--add-port=" + port], [*told, "--remove-port=" + port]
    elif firewall == "iptables":
        rule = ["INPUT", "--protocol", protocol, "--dport", number, "--match", "comment", "--comment", COMMENT, "--jump", "ACCEPT"]
        yield run(["iptables", "--check", *rule])[0] == 0, ["iptables", "--insert", *rule], ["iptables", "--delete", *rule]
    elif firewall == "nftables":
        comment = "%s %s" % (COMMENT, port)
        for where in dropping_chains():
            rule = [protocol, "dport", number, "accept", "comment", '"%s"' % comment]
            yield comment in ruled(where), ["nft", "insert", "rule", *where, *rule], ["nft delete", *where, comment]


def open_ports(path, ports):
    try:
        with open(path) as file:
            undo = json.load(file)
    except FileNotFoundError:
        undo = []
    changed, firewall = False, which()
    for port in ports:
        for is_open, add, take_back in openings(firewall, port):
            if is_open:
                continue
            if take_back not in undo:
                undo.append(take_back)
            with open(path + ".new", "w") as file:
                json.dump(undo, file)
            os.replace(path + ".new", path)
            status, text = run(add)
            if status != 0:
                sys.exit(
                    "error[node.firewall]: cannot let %s in: `%s` says: %s\nnext: see the log of the firewall, then run the same command again"
                    % (port, " ".join(add), text.strip())
                )
            changed = True
    print("changed" if changed else "unchanged")


def close_ports(path):
    if not os.path.exists(path):
        return
    with open(path) as file:
        undo = json.load(file)
    for command in undo:
        run(command if command[0] != "nft delete" else nft_delete(command[1:4], command[4]))  # one that is gone is gone either way
    os.remove(path)


def main(verb, *words):
    if verb == "which":
        print(which())
    elif verb == "open":
        open_ports(words[0], words[1:])
    else:
        close_ports(words[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
