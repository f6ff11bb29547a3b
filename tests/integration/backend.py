"""What differs between a gateway on podman and one on a cluster, for a test that holds both to one contract.

A site says in `.kalium/site.json` which it is and how its hosts are reached; nothing of the experiments' code is used here. On another
host everything goes through that host's SSH: commands with sudo, and the gateway's two listeners through tunnels.
"""

import json
import shlex
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar
from urllib.parse import urlsplit

import yaml

from .conftest import ROOT, until

ENGINE_FILE = "/etc/kalium/engine.json"  # docs/reference/gateway.md, Configuration
COMMAND_S_MAX = 120
BUILD_S_MAX = 600  # with a base to make; a second or two without
SSH_S_MAX = 15
# Of a folder that was built into: what a further build takes as it is.
BASE_FILES = ("base", "base.json", "oci")

Address = tuple[str, int]


class Host:
    """A host of the site, on which commands run as root."""

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.is_local = fields["connection"] == "local"
        self._fields = fields

    def _ssh(self, *options: str) -> list[str]:
        fields = self._fields
        key = ["-i", str(Path(fields["key_file"]).expanduser()), "-o", "IdentitiesOnly=yes"] if fields["key_file"] else []
        known = ["-o", f"UserKnownHostsFile={Path(fields['known_hosts']).expanduser()}"] if fields["known_hosts"] else []
        strict = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", f"ConnectTimeout={SSH_S_MAX}"]
        login = ["-l", fields["user"]] if fields["user"] else []
        return ["ssh", *strict, *key, *known, *login, "-p", str(fields["port"]), *options, fields["address"]]

    def run(self, *words: str, stdin: IO[bytes] | int = subprocess.DEVNULL) -> str:
        """What the command prints."""
        command = list(words) if self.is_local else [*self._ssh(), shlex.join(["sudo", "-n", "--", *words])]
        done = subprocess.run(command, stdin=stdin, capture_output=True, timeout=COMMAND_S_MAX, check=False)
        assert done.returncode == 0, f"{shlex.join(words)} on {self.name}: exit {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}"
        return done.stdout.decode()

    @contextmanager
    def reaching(self, *addresses: Address) -> Iterator[Sequence[Address]]:
        """Where this machine reaches what that host reaches at `addresses`."""
        if self.is_local:
            yield addresses
            return
        ends = [("127.0.0.1", _free_port()) for _ in addresses]
        forwards = [word for end, (host, port) in zip(ends, addresses, strict=True) for word in ("-L", f"{end[0]}:{end[1]}:{host}:{port}")]
        tunnel = subprocess.Popen(self._ssh("-N", "-o", "ExitOnForwardFailure=yes", *forwards), stdin=subprocess.DEVNULL)
        try:
            until(lambda: tunnel.poll() is not None or all(map(_listens, ends)), f"a tunnel to {self.name}")
            assert tunnel.poll() is None, f"ssh to {self.name} ended with exit {tunnel.returncode}"
            yield ends
        finally:
            tunnel.terminate()
            tunnel.wait(timeout=SSH_S_MAX)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


class Image:
    """An image that the product built here: one archive with nothing else in it."""

    def __init__(self, handler: str, images: Path, folder: Path) -> None:
        """Build `handler`, a program's text, in the empty `folder`. The base of what was built in `images` is used where there is one."""
        (folder / "echo").mkdir()
        (folder / "echo" / "handler.py").write_text(handler, encoding="utf-8")
        stack = {"functions": {"echo": {"lang": "python3", "handler": "./echo"}}}
        (folder / "stack.yml").write_text(yaml.safe_dump(stack), encoding="utf-8")
        output = folder / "images"
        output.mkdir()
        if (images / "base.json").is_file():
            subprocess.run(["cp", "--archive", *(images / name for name in BASE_FILES), output], timeout=COMMAND_S_MAX, check=True)
        self._kalium("build", "--no-podman", "--stack", str(folder / "stack.yml"), "--output", str(output))
        self.reference: str = json.loads((output / "images.json").read_text(encoding="utf-8"))["echo"]["image"]
        self.archive = Path(self._kalium("export", "--output", str(output)).split()[-1])

    @staticmethod
    def _kalium(*words: str) -> str:
        command = [sys.executable, "-m", "kalium.cli.main", "function", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_S_MAX, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


class Backend(ABC):
    """A site's gateway, and the machines on which it runs functions."""

    # How long after the answer to a removal something of the function may be left.
    removal_s_max: ClassVar[float]
    # Whether the use of memory and processor is always known.
    always_measures: ClassVar[bool]
    # Whether the agent is asked before a deployment is answered; otherwise it refuses the sandbox, and that is the function's reason.
    asks_agent_first: ClassVar[bool]
    # By how much the gateway's clock may differ from ours.
    clock_ns_max: ClassVar[int]

    def __init__(self, site: dict[str, Any], control: Host, admin: str, data: str, password_file: Path) -> None:
        self.site = site
        self.control = control
        self.admin = admin  # URLs, as they are reached from here
        self.data = data
        self.user: str = site["basic_auth_user"]
        self.password_file = password_file  # here
        self.password = password_file.read_text(encoding="utf-8").strip()
        # Whose requests those of `admin` are: of the host with the gateway, which reaches itself from the address that it asks.
        self.client_address = str(urlsplit(site["gateway"]).hostname)

    @abstractmethod
    def refusal_of_image(self, image: str) -> str:
        """What a refusal of a deployment has in it when no machine has the image."""

    @abstractmethod
    @contextmanager
    def having(self, image: Image, name: str) -> Iterator[None]:
        """The image is called `name` wherever functions run, for as long as this lasts."""

    @abstractmethod
    def traces_of(self, function: str) -> Callable[[], list[str]]:
        """To be called now and later: what of a function as it runs now there is outside of the gateway."""


class OnPodman(Backend):
    """Functions are containers of this machine."""

    removal_s_max = 0
    always_measures = True
    asks_agent_first = True
    clock_ns_max = 0

    def refusal_of_image(self, image: str) -> str:
        return f"image {image} is not on this machine"

    @contextmanager
    def having(self, image: Image, name: str) -> Iterator[None]:
        identity = self.control.run("podman", "pull", "--quiet", f"oci-archive:{image.archive}").split()[-1]
        try:
            self.control.run("podman", "tag", identity, name)
            yield
        finally:
            self.control.run("podman", "image", "rm", "--force", identity)

    def traces_of(self, function: str) -> Callable[[], list[str]]:
        def containers() -> list[str]:
            named = f"name=^kal-{function}-[0-9a-f]{{8}}$"
            return self.control.run("podman", "ps", "--all", "--filter", named, "--format", "{{.Names}}").split()

        instances = [name.rpartition("-")[2] for name in containers()]
        paths = [Path(path) for instance in instances for path in (f"/run/netns/kal-{instance}", f"/sys/class/net/kv{instance}")]
        return lambda: [*containers(), *(str(path) for path in paths if path.exists())]


class OnKubernetes(Backend):
    """Functions are Deployments of a cluster."""

    removal_s_max = 60
    always_measures = False
    asks_agent_first = False
    clock_ns_max = 1_000_000_000

    def refusal_of_image(self, image: str) -> str:
        # ErrImageNeverPull goes on so, in the words of the kubelet; so do ErrImagePull and ImagePullBackOff, of images of a registry.
        return f'image "{image}"'

    @contextmanager
    def having(self, image: Image, name: str) -> Iterator[None]:
        with ExitStack() as undone:
            for node in (host_of(self.site, node) for node in self.site["groups"]["function_nodes"]):
                containerd = ("ctr", "--namespace", "k8s.io", "images")
                with image.archive.open("rb") as archive:
                    node.run(*containerd, "import", "-", stdin=archive)
                undone.callback(node.run, *containerd, "rm", image.reference)
                node.run(*containerd, "tag", "--force", image.reference, name)
                undone.callback(node.run, *containerd, "rm", name)
            yield

    def traces_of(self, function: str) -> Callable[[], list[str]]:
        cluster = self.site["cluster"]
        kubectl = ("kubectl", "--kubeconfig", cluster["kubeconfig"], "--namespace", cluster["namespace"])
        return lambda: self.control.run(*kubectl, "get", "pods,deployments,services", "-l", f"faas_function={function}", "-o", "name").split()


ENGINES: dict[str, type[Backend]] = {"podman": OnPodman, "kubernetes": OnKubernetes}


def host_of(site: dict[str, Any], name: str) -> Host:
    """A host of the site by its name."""
    return Host(name, site["hosts"][name])


@contextmanager
def reached(site: dict[str, Any], folder: Path) -> Iterator[Backend]:
    """The site's gateway; `folder` is private and keeps a copy of its password."""
    control = host_of(site, site["groups"]["kube_control"][0])
    data = json.loads(control.run("cat", ENGINE_FILE))["data"]
    password_file = folder / "engine.password"
    password_file.touch(mode=0o600)
    password_file.write_text(control.run("cat", site["basic_auth_password_file"]), encoding="utf-8")
    admin = urlsplit(site["gateway"])
    assert admin.hostname and admin.port, site["gateway"]
    with control.reaching((admin.hostname, admin.port), (data["host"], data["port"])) as ends:
        here, inside = (f"http://{host}:{port}" for host, port in ends)
        yield ENGINES[site["engine"]](site, control, here, inside, password_file)
