package sentry

import (
	"fmt"
	"maps"
	"strings"

	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/specutils"
)

// What containerd's CRI plug-in says of a container of a pod. It writes these itself, after whatever the pod asks to be passed
// on, so nobody who may only make pods can choose them. containerd 1.6 and 1.7 write the same.
const (
	annotationContainerType = specutils.ContainerdContainerTypeAnnotation
	annotationContainerName = specutils.ContainerdContainerNameAnnotation
	annotationSandboxID     = specutils.ContainerdSandboxIDAnnotation
	annotationSandboxUID    = "io.kubernetes.cri.sandbox-uid"
	containerTypeSandbox    = specutils.ContainerdContainerTypeSandbox
	containerTypeContainer  = specutils.ContainerdContainerTypeContainer
	annotationsOfOurs       = "kalium.io/"
)

// uidLayout is the form of a pod's UID in Kubernetes' API: x is a hexadecimal digit.
const uidLayout = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"

// isPodSandbox tells the first container of a pod, which no function runs in, and with which the Sentry starts.
func (c *command) isPodSandbox() bool {
	return c.spec.Annotations[annotationContainerType] == containerTypeSandbox
}

// instance is the name under which the sandbox was registered: the pod's UID, or the container's own id where there is no pod.
func (c *command) instance() string {
	if c.isPodSandbox() {
		return c.spec.Annotations[annotationSandboxUID]
	}
	return c.id
}

// checkPod lets one container run in a pod beside the sandbox's own: the one whose name is the function's. Sidecars, init
// containers and ephemeral ones would act as the function.
func (c *command) checkPod() error {
	annotations := c.spec.Annotations
	kind, inPod := annotations[annotationContainerType]
	if other := specutils.CRIOContainerTypeAnnotation; annotations[other] != "" {
		return failed("runtime.pod", c.name+" a guarded container", "annotation "+other+" of an engine whose pods are not known here", "run pods with containerd")
	}
	if !inPod {
		return nil
	}
	uid, sandbox := annotations[annotationSandboxUID], annotations[annotationSandboxID]
	if !isUID(uid) {
		return failed("runtime.pod", c.name+" a container of a pod", fmt.Sprintf("%s is %q, not the UID of a pod", annotationSandboxUID, uid),
			"start pods through the kubelet, which gives containerd their UID")
	}
	if annotations[annotationApp] == "" || annotations[annotationFunction] == "" {
		return failed("runtime.annotations", c.name+" a container of pod "+uid, "a bundle without "+annotationApp+" or "+annotationFunction,
			"deploy the function through the gateway, which sets both; containerd passes them on when its runtime has pod_annotations = [\"kalium.io/*\"]")
	}
	switch kind {
	case containerTypeSandbox:
		if sandbox != c.id {
			return failed("runtime.pod", c.name+" the sandbox of pod "+uid, fmt.Sprintf("%s is %q, not its own id", annotationSandboxID, sandbox), "start pods through the kubelet")
		}
		return nil
	case containerTypeContainer:
		if name, function := annotations[annotationContainerName], annotations[annotationFunction]; name != function {
			return failed("runtime.pod", fmt.Sprintf("%s container %q of pod %s", c.name, name, uid),
				fmt.Sprintf("the pod is function %q's, and only the container of that name may run in its sandbox", function),
				"run it in a pod of its own: a guarded pod has no sidecars, init or ephemeral containers")
		}
		return c.checkSandbox(sandbox)
	}
	return failed("runtime.pod", c.name+" a container of pod "+uid, fmt.Sprintf("%s is %q", annotationContainerType, kind), "start pods through the kubelet")
}

// checkSandbox compares the container with the sandbox that it is to join, whose guard keeps the identity that it began with: a
// pod's annotations may be changed while it runs.
func (c *command) checkSandbox(id string) error {
	root := c.flags.Lookup("root").Value.String()
	sandbox, err := container.Load(root, container.FullID{SandboxID: id, ContainerID: id}, container.LoadOpts{Exact: true, SkipCheck: true})
	if err != nil {
		return failed("runtime.pod", c.name+" a container in sandbox "+id, err.Error(), "start the pod again")
	}
	if sandbox.Spec == nil || !maps.Equal(identityOf(sandbox.Spec.Annotations), identityOf(c.spec.Annotations)) {
		return failed("runtime.pod", c.name+" a container in sandbox "+id, "the pod's UID or its annotations "+annotationsOfOurs+"* are not those that the sandbox was started with",
			"leave a pod's annotations alone, and deploy the function again")
	}
	return nil
}

func identityOf(annotations map[string]string) map[string]string {
	identity := map[string]string{annotationSandboxUID: annotations[annotationSandboxUID]}
	for name, value := range annotations {
		if strings.HasPrefix(name, annotationsOfOurs) {
			identity[name] = value
		}
	}
	return identity
}

func isUID(text string) bool {
	if len(text) != len(uidLayout) {
		return false
	}
	for i := range uidLayout {
		digit := text[i] >= '0' && text[i] <= '9' || text[i] >= 'a' && text[i] <= 'f'
		if uidLayout[i] == '-' && text[i] != '-' || uidLayout[i] == 'x' && !digit {
			return false
		}
	}
	return true
}

// Shared memory of a pod: gVisor's shim turns containerd's bind mount of /dev/shm into a file system in the sandbox's own
// memory, and says so with annotations of this volume.
const sharedMemory = "dev.gvisor.spec.mount.gvisorinternaldevshm."

// isSharedMemory tells such an annotation of the pod's own shared memory from one that would bring in something else.
func (c *command) isSharedMemory(name, value string) bool {
	field, ours := strings.CutPrefix(name, sharedMemory)
	if !ours || !c.isPodSandbox() {
		return false
	}
	switch field {
	case "type":
		return value == "tmpfs"
	case "share":
		return value == "pod"
	case "options":
		return value == "rw"
	case "source":
		return c.belongsToUs(value)
	}
	return false
}

// isPause tells the container that holds a pod's sandbox. The guard's identity is that of the function's container alone.
func isPause(container string) bool {
	return started != nil && started.spec != nil && started.isPodSandbox() && container == started.id
}
