"""Throw-away hosts: systemd-nspawn containers with their own init, network and SSH server, and what makes and ends them."""
