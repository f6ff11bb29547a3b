"""The back-end of a cluster: functions as Deployments and Services of Kubernetes, as OpenFaaS's faas-netes makes them.

    objects    a deployment as objects of Kubernetes, and back; what a pod's status says
    watch      what the API server has of one kind, followed; pure, and its driver
    functions  one function: which of its pods get requests, and which are replaced
    api        requests to the API server
    backend    what the gateway asks of a back-end

All state is Kubernetes': a gateway that starts reads Deployments and pods, and serves. What has not the label `kalium.io/engine: gateway` is
never touched. An instance is a pod, and one run of its container: one whose process ended, whose guard retired it, or that does not answer
its health path any more is deleted, and the ReplicaSet makes another, with a fresh sandbox.
"""
