"""What is on a host: compared before a site and after its reset."""

from __future__ import annotations

from .host import Host

# What any installation or removal of packages writes, whoever asks for it: package lists and records, logs, caches, the system's own state.
NOT_OURS = (
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/tmp",
    "/home",
    "/var/lib/apt",
    "/var/lib/dpkg",
    "/var/lib/systemd",
    "/var/log",
    "/var/cache",
    "/var/tmp",
    "/root",
)


def footprint(host: Host) -> frozenset[str]:
    """Every installed package, account, enabled unit and path of the host, except what stands in NOT_OURS."""
    pruned = " -o ".join(f"-path {path}" for path in NOT_OURS)
    asked = host.run(
        "dpkg-query --show --showformat 'package ${db:Status-Status} ${Package}\\n'; getent passwd; getent group;"
        f" sudo find / -xdev \\( {pruned} \\) -prune -o -name __pycache__ -prune -o -print"
    )
    assert asked.returncode == 0, asked.stderr
    return frozenset(asked.stdout.splitlines())
