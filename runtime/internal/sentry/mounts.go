package sentry

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

type mount struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type"`
	Source      string   `json:"source"`
	Options     []string `json:"options"`
}

type device struct {
	Path  string `json:"path"`
	Type  string `json:"type"`
	Major int64  `json:"major"`
	Minor int64  `json:"minor"`
}

// madeInside are file systems of gVisor that nothing outside of the sandbox sees. erofs is an image that is only read.
var madeInside = []string{"proc", "sysfs", "tmpfs", "devpts", "devtmpfs", "mqueue", "cgroup", "cgroup2", "erofs"}

// engineFiles are what container engines mount writable without being asked. podman 4.3 makes the first five;
// /run/secrets holds its secrets; the kubelet makes the termination log, and OpenFaaS gives a function with a read-only
// root file system an emptyDir at /tmp.
var engineFiles = []string{
	"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/run/.containerenv",
	"/run/secrets", "/dev/termination-log", "/tmp",
}

// ownerBytesMin keeps a short name, which may be part of any path, from passing for the id of a container.
const ownerBytesMin = 12

// checkMounts refuses files of the host that the function can write and another instance may read.
func (c *command) checkMounts() error {
	for _, m := range c.spec.Mounts {
		if !m.isBind() {
			if !slices.Contains(madeInside, m.Type) {
				return failed("runtime.mounts", c.name+" a guarded sandbox", fmt.Sprintf("a mount of type %q at %s", m.Type, m.Destination),
					"use a tmpfs, or a bind mount that is read-only")
			}
			continue
		}
		if m.isReadOnly() {
			continue
		}
		if !slices.Contains(engineFiles, path.Clean(m.Destination)) {
			return failed("runtime.mounts", c.name+" a guarded sandbox",
				fmt.Sprintf("the writable mount of %s at %s, which another instance may read", m.Source, m.Destination),
				"mount it read-only, or use a tmpfs")
		}
		if !c.belongsToUs(m.Source) {
			return failed("runtime.mounts", c.name+" a guarded sandbox",
				fmt.Sprintf("the writable mount of %s at %s, whose path names neither this container nor its pod", m.Source, m.Destination),
				"mount it read-only, or let the container engine make it for each container")
		}
	}
	return nil
}

// belongsToUs tells a path of the host that a container engine made for this container or its pod. The kubelet mounts every
// volume below a path that names the pod, also those that other pods mount: an emptyDir alone is made for one.
func (c *command) belongsToUs(source string) bool {
	owners, parts := c.owners(), strings.Split(path.Clean(source), "/")
	i := slices.IndexFunc(parts, func(part string) bool { return slices.Contains(owners, part) })
	if i < 0 {
		return false
	}
	inside := parts[i+1:]
	if len(inside) == 0 || !strings.HasPrefix(inside[0], "volume") { // volumes, volume-subpaths
		return true
	}
	return len(inside) > 2 && inside[0] == "volumes" && inside[1] == "kubernetes.io~empty-dir"
}

// owners are the names by which an engine keeps what belongs to this container alone.
func (c *command) owners() []string {
	names := []string{c.id}
	if c.spec.Annotations[annotationContainerType] != "" {
		names = append(names, c.spec.Annotations[annotationSandboxID], c.spec.Annotations[annotationSandboxUID])
	}
	return slices.DeleteFunc(names, func(name string) bool { return len(name) < ownerBytesMin })
}

// isBind tells what gVisor takes for a bind mount.
func (m *mount) isBind() bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// isReadOnly says no where two options contradict each other.
func (m *mount) isReadOnly() bool {
	return slices.Contains(m.Options, "ro") && !slices.Contains(m.Options, "rw")
}

// harmlessDevices are character devices of gVisor's own that lead nowhere, by major and minor number. Without its ioctl,
// which is refused, /dev/net/tun leads nowhere either, but no function needs it.
var harmlessDevices = map[[2]int64]string{
	{1, 3}: "null", {1, 5}: "zero", {1, 7}: "full", {1, 8}: "random", {1, 9}: "urandom",
	{5, 0}: "tty", {5, 1}: "console", {5, 2}: "ptmx",
}

// ownDevices begin the names of those that prepareBundle asks for, beside their major number.
const ownDevices = "/dev/kalium-"

// checkDevices refuses devices of the host. gVisor makes a driver known for some paths, whatever its flags say.
func (c *command) checkDevices() error {
	for _, d := range c.spec.Linux.Devices {
		_, harmless := harmlessDevices[[2]int64{d.Major, d.Minor}]
		harmless = harmless || d.Major == keysMajor && strings.HasPrefix(d.Path, ownDevices)
		if !harmless || d.Type != "c" && d.Type != "u" || strings.HasPrefix(d.Path, "/dev/vfio") || strings.HasPrefix(d.Path, "/dev/accel") {
			return failed("runtime.devices", c.name+" a guarded sandbox",
				fmt.Sprintf("device %s (%s %d:%d)", strconv.Quote(d.Path), d.Type, d.Major, d.Minor), "leave the device out")
		}
	}
	return nil
}

// checkRoot refuses a root file system whose changes another container would see.
func (c *command) checkRoot() error {
	value := c.flags.Lookup("overlay2").Value.String()
	if strings.HasPrefix(value, "root:") || strings.HasPrefix(value, "all:") {
		return nil
	}
	return failed("runtime.flags", c.name+" a guarded sandbox", "--overlay2="+value+": changes to the root file system would reach the host",
		"leave the flag out")
}
