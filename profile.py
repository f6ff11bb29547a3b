"""The machines of a Kalium site as in the paper's artifact: workers and a Kubernetes control plane on one star LAN, and the Kalium controller
on a machine of the same kind outside it.

Nothing is installed by this profile and no script runs at boot. The site is set up from your own machine, by Ansible over SSH.

Instructions:
When the experiment is ready, save its manifest (tab Manifest) as `manifest.xml` in your checkout of Kalium and type

    fab inventory --from-manifest manifest.xml --user YOUR_CLOUDLAB_USER

It prints the commands that follow; `docs/howto/cloudlab.md` explains each of them.
"""

# CloudLab runs this with a geni-lib and a Python of its own, so it keeps to what Python 2.7 understands as well.
# node0 to node(N-1) are workers, nodeN is the control plane, node(N+1) is the controller: `fab inventory` and inventory/cloudlab rely on it.

from geni import portal
from geni.rspec import pg

WORKERS_MAX = 32  # with the control plane still far within one /24, and with a budget that somebody thought about
DISK_GB_MIN, DISK_GB_MAX = 40, 1000
MOUNT = "/mydata"  # as in 2023; inventory/cloudlab puts the site's data there
LAN, NETMASK = "10.10.1.", "255.255.255.0"
IMAGE = "urn:publicid:IDN+emulab.net+image+emulab-ops//"

portal.context.defineParameter(
    "workers", "Number of workers", portal.ParameterType.INTEGER, 4,
    longDescription="Hosts that run functions. The paper has four; the control plane and the controller come on top.",
)  # fmt: skip
portal.context.defineParameter(
    "hardware", "Hardware type of every machine", portal.ParameterType.NODETYPE, "c220g1",
    longDescription="One type for all. c220g1 (Wisconsin) has the paper's CPU, an E5-2630 at 2.40 GHz, and 10 Gbps instead of its 25.",
)  # fmt: skip
portal.context.defineParameter(
    "image", "Disk image of every machine", portal.ParameterType.IMAGE, IMAGE + "UBUNTU22-64-STD",
    [
        (IMAGE + "UBUNTU18-64-STD", "Ubuntu 18.04 (as in the paper)"),
        (IMAGE + "UBUNTU22-64-STD", "Ubuntu 22.04"),
        (IMAGE + "UBUNTU24-64-STD", "Ubuntu 24.04"),
        (IMAGE + "DEB12-64-STD", "Debian 12"),
    ],
    longDescription="What the roles are written for. 18.04 is out of support and may not be offered any more.",
)  # fmt: skip
portal.context.defineParameter(
    "speed", "Speed of the LAN", portal.ParameterType.INTEGER, 0,
    [
        (0, "what the hardware has, unshaped"),
        (1000000, "1 Gbps"),
        (10000000, "10 Gbps"),
        (25000000, "25 Gbps (as in the paper)"),
        (100000000, "100 Gbps"),
    ],
    longDescription="In Kbps. The hardware type has to have an interface of that speed, or the experiment cannot be mapped.",
)  # fmt: skip
portal.context.defineParameter(
    "disk", "Extra disk on /mydata, in GB", portal.ParameterType.INTEGER, 60,
    longDescription="For containers, images and logs, because the root file system of some images has 16 GB. 0: none.",
)  # fmt: skip
portal.context.defineParameter(
    "controllerInLan", "Put the controller into the LAN", portal.ParameterType.BOOLEAN, False,
    longDescription="The paper keeps it outside, in the same data centre; it is then reached over the control network.",
    advanced=True,
)  # fmt: skip
parameters = portal.context.bindParameters()

if not 1 <= parameters.workers <= WORKERS_MAX:
    portal.context.reportError(portal.ParameterError("Choose 1 to " + str(WORKERS_MAX) + " workers.", ["workers"]))
if parameters.disk and not DISK_GB_MIN <= parameters.disk <= DISK_GB_MAX:
    limits = str(DISK_GB_MIN) + " to " + str(DISK_GB_MAX)
    portal.context.reportError(portal.ParameterError("Choose " + limits + " GB, or 0 for no extra disk.", ["disk"]))
portal.context.verifyParameters()

request = portal.context.makeRequestRSpec()
lan = request.LAN("lan")
if parameters.speed:
    lan.bandwidth = parameters.speed

control_plane = parameters.workers
controller = parameters.workers + 1
for number in range(controller + 1):
    node = request.RawPC("node" + str(number))
    node.hardware_type = parameters.hardware
    node.disk_image = parameters.image
    if parameters.disk:
        disk = node.Blockstore("disk" + str(number), MOUNT)
        disk.size = str(parameters.disk) + "GB"
    if number <= control_plane or parameters.controllerInLan:
        interface = node.addInterface("lan")
        interface.addAddress(pg.IPv4Address(LAN + str(number + 1), NETMASK))
        lan.addInterface(interface)

portal.context.printRequestRSpec(request)
