"""The gateway: the OpenFaaS REST API in front of functions, which podman runs on this machine or Kubernetes on a cluster.

api        what a client may ask, and the answers of OpenFaaS
proxy      one invocation: the request to a free instance, the answer back
calls      asynchronous ones: accepted, written down, made by workers, their results posted
slots, instance, upstream    who gets a request, what is known of an instance, one HTTP exchange
backend    what all this asks of whatever runs functions
podman/, kubernetes/    the two that there are
agent      the socket at which whoever makes instances says who they are
"""
