"""The network of the instances: a bridge of our own, an address pool, and for each instance a namespace with one end of a veth pair.

Nothing is routed or translated: instances reach the host's address on the bridge, each other, and nothing else.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections import deque
from pathlib import Path
from typing import Any

from kalium.engine.config import Bridge
from kalium.engine.limits import IP_SECONDS_MAX
from kalium.engine.podman.command import CommandFailed, Run, checked
from kalium.errors import KaliumError

HOST_END = re.compile(r"kv([0-9a-f]{8})")
HAS_IPV6 = Path("/proc/sys/net/ipv6").exists()


def namespace_of(instance: str) -> str:
    """The name of an instance's network namespace."""
    return f"kal-{instance}"


def host_end_of(instance: str) -> str:
    """The host's end of an instance's veth pair: what a capture listens on."""
    return f"kv{instance}"


def hardware_address(address: ipaddress.IPv4Address) -> str:
    """A locally administered MAC that belongs to `address`.

    Whoever remembers the address of an instance that is gone reaches its successor at once, instead of waiting for an ARP
    entry to fail; and a bridge with an address of its own keeps it when ports come and go.
    """
    return "02:6b:" + ":".join(f"{byte:02x}" for byte in address.packed)


class PoolExhausted(Exception):
    """No address is free: `found` says how many there are."""

    def __init__(self, size: int) -> None:
        self.found = f"all {size} addresses of the bridge are taken"
        super().__init__(self.found)


class AddressPool:
    """Addresses from `first` to `last`, each in one hand. The one that was free longest is next."""

    def __init__(self, bridge: Bridge) -> None:
        self._free = deque(ipaddress.IPv4Address(number) for number in range(int(bridge.first), int(bridge.last) + 1))
        self._size = len(self._free)
        self._taken: set[ipaddress.IPv4Address] = set()

    def take(self) -> ipaddress.IPv4Address:
        if not self._free:
            raise PoolExhausted(self._size)
        address = self._free.popleft()
        self._taken.add(address)
        return address

    def give_back(self, address: ipaddress.IPv4Address) -> None:
        self._taken.remove(address)
        self._free.append(address)

    @property
    def taken(self) -> int:
        return len(self._taken)


class Network:
    """Makes and removes the bridge and the instances' namespaces with `ip`."""

    def __init__(self, run: Run, bridge: Bridge) -> None:
        self._run = run
        self.bridge = bridge

    async def _ip(self, *words: str, batch: str = "") -> bytes:
        return await checked(self._run, ["ip", *words], seconds_max=IP_SECONDS_MAX, stdin=batch.encode("ascii"))

    async def up(self) -> bool:
        """Make the bridge what the configuration says. Returns whether anything had to change. Raises KaliumError engine.network."""
        bridge, has_changed = self.bridge, False
        wanted = f"{bridge.address}/{bridge.prefix}"
        try:
            found = await self._found()
            if found is None:
                await self._ip("link", "add", bridge.name, "address", hardware_address(bridge.address), "type", "bridge")
                found, has_changed = {}, True
            elif (found.get("linkinfo") or {}).get("info_kind") != "bridge":
                raise self._refused(
                    f"interface {bridge.name} is there and is no bridge", "choose another name with the variable kalium_engine_bridge"
                )
            addresses = [f"{entry['local']}/{entry['prefixlen']}" for entry in found.get("addr_info", ()) if entry.get("family") == "inet"]
            if addresses and wanted not in addresses:
                raise self._refused(
                    f"it has the address {', '.join(addresses)}, and not {wanted}", f"`ip link delete {bridge.name}` if it is ours, then try again"
                )
            if not addresses:
                await self._ip("address", "add", wanted, "dev", bridge.name)
                has_changed = True
            if "UP" not in found.get("flags", ()):
                await self._ip("link", "set", bridge.name, "up")
                has_changed = True
        except CommandFailed as error:
            raise self._refused(error.found, "run it as root, with `ip` (iproute2) installed") from error
        return has_changed

    async def down(self) -> bool:
        """Remove the bridge. Returns whether there was one. Raises KaliumError engine.network, also while instances are attached."""
        try:
            if await self._found() is None:
                return False
            if attached := await self.instances():
                raise self._refused(f"{len(attached)} instances are attached to it", "stop the engine first")
            await self._ip("link", "delete", self.bridge.name, "type", "bridge")
        except CommandFailed as error:
            raise self._refused(error.found, "run it as root, with `ip` (iproute2) installed") from error
        return True

    async def _found(self) -> Any:
        """The bridge's interface as `ip` tells it; None when there is none."""
        entries = json.loads(await self._ip("-json", "-details", "address", "show"))
        return next((entry for entry in entries if entry.get("ifname") == self.bridge.name), None)

    async def instances(self) -> list[str]:
        """Ids of the instances whose interface is attached to the bridge, whoever made them."""
        entries = json.loads(await self._ip("-json", "link", "show", "master", self.bridge.name) or b"[]")
        return sorted(match[1] for entry in entries if (match := HOST_END.fullmatch(entry.get("ifname", ""))))

    async def attach(self, instance: str, address: ipaddress.IPv4Address) -> None:
        """Make the namespace of an instance: `lo` up, `eth0` with `address`, the other end of its pair on the bridge.

        The pair comes first and is on the bridge from its first moment: what it leads to is found from there, even when this
        process ends before the next step.
        """
        bridge, namespace, far = self.bridge, namespace_of(instance), f"kp{instance}"
        pair = f"type veth peer name {far} address {hardware_address(address)}"
        outside = (
            f"link add {host_end_of(instance)} up master {bridge.name} {pair}\nnetns add {namespace}\nlink set {far} netns {namespace} name eth0\n"
        )
        await self._ip("-batch", "-", batch=outside)
        # Without a link-local address the sandbox speaks IPv4 alone.
        quiet = "link set eth0 addrgenmode none\n" if HAS_IPV6 else ""
        inside = f"{quiet}address add {address}/{bridge.prefix} dev eth0\nlink set eth0 up\nlink set lo up\n"
        await self._ip("-n", namespace, "-batch", "-", batch=inside)

    async def detach(self, instance: str) -> None:
        """Remove what `attach` made, however far it came. Nothing to remove is no error."""
        if namespace_of(instance).encode("ascii") in (await self._ip("netns", "list")).split():
            await self._ip("netns", "delete", namespace_of(instance))
        if instance not in await self.instances():
            return
        try:
            await self._ip("link", "delete", host_end_of(instance))
        except CommandFailed:  # the pair ends with its namespace, which may have been just now
            if instance in await self.instances():
                raise

    def _refused(self, found: str, next_step: str) -> KaliumError:
        return KaliumError("engine.network", f"cannot set up the bridge {self.bridge.name}", found, next_step)
