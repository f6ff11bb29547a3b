"""The back-end of one machine: functions that podman runs under gVisor.

    backend    what the gateway asks of a back-end
    functions  what keeps a function's instances alive: one replica for each
    host       one instance, made and removed step by step
    network, containers, command, store    the programs that the steps use, and what outlives them

How an instance is made, and why so. Each option was tried with podman 4.3.1 on a host without systemd (cgroup v1) under gVisor
of 2026-02; docs/reference/gateway.md has the table of where else.

    podman --cgroup-manager cgroupfs --runtime PATH --runtime-flag=FLAG... create
        --network ns:/run/netns/kal-ID       a namespace of our own with one end of a veth pair; no NAT, no firewall rule
        --cgroups no-conmon                  `disabled` is refused for runtimes that containers.conf does not list
        --cap-drop all --security-opt no-new-privileges --pull never --http-proxy=false
        --image-volume tmpfs                 a folder of the host would be a way out, and the guarded runtime refuses it
        --pidfile FILE                       the sandbox's process: its end is the end of the instance
        --stop-timeout 1                     podman 3.4 has no `rm --time`
    podman ... start CONTAINER

`--cgroup-manager cgroupfs` is one behaviour with and without systemd. A host that lets nobody make cgroups (a container) needs the
runtime flag `ignore-cgroups` as well; it is in the configuration because it is the site's to decide. podman hands runtime flags
to the runtime at `start`, where config.json is written, and does not remember them: they are given with every command. gVisor
takes the addresses and routes of the namespace over at start, and needs no default route.
"""
