"""Function images without a registry: a base of the distribution's own packages, locked wheels, and the function's files.

Nothing runs in a container to make one. Each layer is a tar that is a function of its contents, kept in an OCI image layout
from which podman imports it; an image's tag is the hash of what it was made from, so building again changes nothing.
"""
