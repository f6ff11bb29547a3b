"""The gateway of one machine: the OpenFaaS REST API in front of functions that podman runs under gVisor.

    api      what a client may ask, and the answers of OpenFaaS
    proxy    one invocation: the request to a free instance, the answer back
    functions, replica, slots    what is deployed, what keeps an instance alive, who gets a request
    host     one instance on this machine, made and removed step by step
    network, podman, agent, command    the programs and the socket that the steps use

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
