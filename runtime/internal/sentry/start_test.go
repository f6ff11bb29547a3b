package sentry

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/mediation"
)

// bundle writes a config.json with annotations and capabilities.
func bundle(t *testing.T, annotations map[string]string, capabilities ...string) string {
	t.Helper()
	return bundleOf(t, map[string]any{
		"ociVersion": "1.0.0", "annotations": annotations,
		"process": map[string]any{"args": []string{"x"}, "capabilities": map[string][]string{"bounding": capabilities, "effective": capabilities}},
	})
}

func bundleOf(t *testing.T, config map[string]any) string {
	t.Helper()
	spec, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "config.json"), spec, 0o600); err != nil {
		t.Fatal(err)
	}
	return folder
}

var good = map[string]string{annotationApp: "shop", annotationFunction: "buyer"}

// examine runs Examine and forgets what it kept.
func examine(args ...string) (*command, error) {
	started = nil
	err := Examine(args)
	kept := started
	started = nil
	return kept, err
}

func refusedWith(t *testing.T, code string, args ...string) {
	t.Helper()
	_, err := examine(args...)
	var refusal *StartError
	if !errors.As(err, &refusal) || refusal.Code != code {
		t.Errorf("%v: %v, want %s", args, err, code)
		return
	}
	if text := err.Error(); !strings.HasPrefix(text, "error["+code+"]: cannot ") || !strings.Contains(text, "\nnext: ") {
		t.Errorf("%v: %q is not the form of our errors", args, text)
	}
}

func TestAnOrdinaryStartIsLetPass(t *testing.T) {
	folder := bundle(t, good, "CAP_CHOWN", "CAP_NET_BIND_SERVICE")
	for _, args := range [][]string{
		{"create", "--bundle", folder, "id1"},
		{"--root=/run/x", "--log", "/l", "--log-format=json", "--systemd-cgroup=false", "create", "--bundle=" + folder, "--pid-file", "/p", "id1"},
		{"-network=sandbox", "-host-uds=none", "run", "-bundle", folder, "id1"},
	} {
		kept, err := examine(args...)
		if err != nil || kept.id != "id1" || kept.spec.Annotations[annotationApp] != "shop" {
			t.Errorf("%v: %+v, %v", args, kept, err)
		}
	}
	for _, args := range [][]string{{"--version"}, {}, {"start", "id"}, {"state", "id"}, {"kill", "id", "9"}, {"delete", "--force", "id"}, {"exec", "id", "ls", "-l"}} {
		if _, err := examine(args...); err != nil {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestFlagsThatLeadAroundTheGuardAreRefused(t *testing.T) {
	folder := bundle(t, good)
	for _, flag := range []string{
		"--network=host", "-network=host", "--host-uds=all", "--host-uds=open", "--fsgofer-host-uds", "--host-fifo=open", "--net-raw", "--net-raw=true",
		"--allow-packet-socket-write", "--allow-flag-override", "--iouring", "--reproduce-nat", "--reproduce-nftables", "--TESTONLY-nftables",
		"--nvproxy", "--tpuproxy", "--TESTONLY-unsafe-nonroot",
	} {
		for _, name := range []string{"create", "run"} {
			refusedWith(t, "runtime.flags", flag, name, "--bundle", folder, "id")
		}
	}
	refusedWith(t, "runtime.flags", "--network", "host", "create", "--bundle", folder, "id")
	refusedWith(t, "runtime.flags", "run", "--pass-fd", "3:3", "--bundle", folder, "id")
	refusedWith(t, "runtime.flags", "run", "--exec-fd", "3", "--bundle", folder, "id")
	refusedWith(t, "runtime.flags", "exec", "--pass-fd", "3:3", "id", "ls")
	refusedWith(t, "runtime.flags", "--no-such-flag", "create", "id")
}

func TestTheLastOfTwoFlagsCounts(t *testing.T) {
	folder := bundle(t, good)
	refusedWith(t, "runtime.flags", "--network=sandbox", "--network=host", "create", "--bundle", folder, "id")
}

func TestCommandsThatLeadAroundTheGuardAreRefused(t *testing.T) {
	for _, name := range []string{"restore", "checkpoint", "port-forward", "do", "trace", "debug", "tar", "install", "something-new"} {
		refusedWith(t, "runtime.command", name, "id")
	}
}

func TestAnnotationsThatChangeGVisorAreRefused(t *testing.T) {
	for _, name := range []string{
		"dev.gvisor.flag.network", "dev.gvisor.flag.debug", "dev.gvisor.bundle.experimental-high-performance", "dev.gvisor.spec.mount.x.share",
		"dev.gvisor.tar.rootfs.upper", "dev.gvisor.internal.nvproxy",
	} {
		refusedWith(t, "runtime.annotations", "create", "--bundle", bundle(t, map[string]string{name: "true"}), "id")
	}
	if _, err := examine("create", "--bundle", bundle(t, map[string]string{"dev.gvisor.internal.seccomp.c": "RuntimeDefault", "other": "x"}), "id"); err != nil {
		t.Error(err)
	}
}

func TestNetworkAdministrationIsRefused(t *testing.T) {
	refusedWith(t, "runtime.capabilities", "create", "--bundle", bundle(t, good, "CAP_CHOWN", "CAP_NET_ADMIN"), "id")
	refusedWith(t, "runtime.capabilities", "exec", "--cap", "CAP_NET_ADMIN", "id", "ls")
	process := filepath.Join(t.TempDir(), "process.json")
	if err := os.WriteFile(process, []byte(`{"args":["ls"],"capabilities":{"permitted":["CAP_NET_ADMIN"]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	refusedWith(t, "runtime.capabilities", "exec", "--process", process, "id")
}

func TestABundleThatCannotBeReadIsRefused(t *testing.T) {
	refusedWith(t, "runtime.bundle", "create", "--bundle", t.TempDir(), "id")
	folder := bundle(t, good)
	if err := os.WriteFile(filepath.Join(folder, "config.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	refusedWith(t, "runtime.bundle", "create", "--bundle", folder, "id")
	refusedWith(t, "runtime.bundle", "boot", "--bundle", folder, "--spec-fd=-1", "id")
}

func TestBootReadsTheSpecFromItsDescriptorAndLeavesThePosition(t *testing.T) {
	file, err := os.Open(filepath.Join(bundle(t, good), "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	kept, err := examine("boot", "--bundle=/nowhere", "--spec-fd="+strconv.Itoa(int(file.Fd())), "id1")

	if err != nil || kept.id != "id1" || kept.spec.Annotations[annotationFunction] != "buyer" {
		t.Fatalf("%+v, %v", kept, err)
	}
	if position, err := file.Seek(0, 1); err != nil || position != 0 {
		t.Errorf("the position is %d, %v", position, err)
	}
}

func TestIdentityComesFromTheBundleAndTheCommandLine(t *testing.T) {
	for _, annotations := range []map[string]string{good, {annotationApp: "shop"}, {annotationFunction: "buyer"}, {}} {
		started = nil
		if err := Examine([]string{"create", "--bundle", bundle(t, annotations), "id7"}); err != nil {
			t.Fatal(err)
		}

		hello, err := identify()

		if len(annotations) == 2 {
			if err != nil || !reflect.DeepEqual(*hello, frame.Hello{Protos: frame.Protos(), Container: "id7", App: "shop", Function: "buyer"}) {
				t.Errorf("%+v, %v", hello, err)
			}
		} else if err == nil {
			t.Errorf("%v gave %+v", annotations, hello)
		}
	}
	started = nil
	if _, err := identify(); err == nil {
		t.Error("a process without a command has an identity")
	}
}

func TestTheSinksConfigurationIsChecked(t *testing.T) {
	started = &command{id: "id", spec: &bundleSpec{Annotations: good}}
	defer func() { started = nil }()
	key := "/E3lUHuQBZVwLSge9sYGRXYCtH7S/NQM6ifv3+ePXBk="
	for _, config := range []map[string]any{
		nil, {"endpoint": "/nowhere.sock"}, {"operator_key": key}, {"endpoint": "/nowhere.sock", "operator_key": "AAAA"},
		{"endpoint": "/nowhere.sock", "operator_key": 7}, {"endpoint": "/nowhere.sock", "operator_key": key},
	} {
		if file, err := setup(config); err == nil || file != nil {
			t.Errorf("%v: %v, %v", config, file, err)
		}
	}
}

func TestWithoutADonatedConnectionThereIsNoGuard(t *testing.T) {
	if _, err := newSink(map[string]any{}, nil); err == nil || installed.Load() != nil {
		t.Errorf("%v", err)
	}
}

func TestEveryReplacedCallHasAFunction(t *testing.T) {
	if err := Install(); err != nil {
		t.Fatal(err)
	}
}

// ours is the id of a container as engines choose it.
const ours = "a156b3993e674f87cee3d821cd3ce6e34baa8dd41edc31c5c9a1913754aa4452"

func TestMountsThatAnotherInstanceMayReadAreRefused(t *testing.T) {
	for what, m := range map[string]mount{
		"a volume":                          {"/data", "bind", "/srv/data", []string{"rbind", "rprivate"}},
		"a volume of this container":        {"/data", "bind", "/srv/" + ours + "/data", []string{"rbind"}},
		"a bind mount by its options":       {"/data", "none", "/srv/data", []string{"bind"}},
		"two options that contradict":       {"/data", "bind", "/srv/data", []string{"ro", "rw"}},
		"the name of a file in a folder":    {"/etc/hosts/x", "bind", "/var/" + ours + "/hosts", nil},
		"an engine's file of another":       {"/etc/hosts", "bind", "/var/lib/containers/0000000000000000/hosts", []string{"bind"}},
		"shared memory of another":          {"/dev/shm", "bind", "/dev/shm", []string{"rbind"}},
		"an id that is part of another":     {"/dev/shm", "bind", "/var/x" + ours + "/shm", []string{"rbind"}},
		"a file system of the host":         {"/data", "ext4", "/dev/sdb", nil},
		"a network file system":             {"/data", "nfs", "server:/", []string{"ro"}},
		"a type that is not named":          {"/data", "", "/srv/data", nil},
		"a writable volume at another path": {"/tmp/../data", "bind", "/var/" + ours, []string{"bind"}},
	} {
		t.Run(what, func(t *testing.T) {
			folder := bundleOf(t, map[string]any{"annotations": good, "mounts": []mount{m}})
			for _, name := range []string{"create", "run"} {
				refusedWith(t, "runtime.mounts", name, "--bundle", folder, ours)
			}
		})
	}
	// The kubelet mounts these below the pod's own folder, too.
	root := sandboxState(t, inPod(containerTypeSandbox, nil))
	for _, volume := range []string{
		"volumes/kubernetes.io~nfs/v", "volumes/kubernetes.io~csi/v/mount", "volumes/kubernetes.io~local-volume/v", "volumes",
		"volume-subpaths/v/buyer/0", "volumes/kubernetes.io~empty-dir/../kubernetes.io~nfs/v",
	} {
		m := mount{"/tmp", "bind", "/var/lib/kubelet/pods/" + podUID + "/" + volume, []string{"rbind", "rw"}}
		folder := bundleOf(t, map[string]any{"annotations": inPod(containerTypeContainer, nil), "mounts": []mount{m}})
		refusedWith(t, "runtime.mounts", "--root", root, "create", "--bundle", folder, ours)
	}
	folder := bundleOf(t, map[string]any{"annotations": good, "mounts": []mount{{"/etc/hosts", "bind", "/etc/hosts", []string{"bind"}}}})
	refusedWith(t, "runtime.mounts", "create", "--bundle", folder, "etc") // a short name is no owner
}

// TestMountsOfContainerEnginesAreLetPass holds what podman 4.3 and the kubelet with containerd mount.
func TestMountsOfContainerEnginesAreLetPass(t *testing.T) {
	podman, kubelet := "/var/lib/containers/storage/overlay-containers/"+ours+"/userdata/", "/var/lib/kubelet/pods/"+podUID+"/"
	options, writable := []string{"bind", "rprivate"}, []string{"rbind", "rprivate", "rw"}
	common := []mount{
		{"/proc", "proc", "proc", nil}, {"/dev", "tmpfs", "tmpfs", nil}, {"/sys", "sysfs", "sysfs", []string{"ro"}},
		{"/dev/pts", "devpts", "devpts", nil}, {"/dev/mqueue", "mqueue", "mqueue", nil}, {"/sys/fs/cgroup", "cgroup", "cgroup", []string{"ro"}},
		{"/scratch", "tmpfs", "tmpfs", []string{"rw"}}, {"/data", "bind", "/srv/data", []string{"ro", "rbind"}},
	}
	for engine, config := range map[string]map[string]any{
		"podman": {"annotations": good, "mounts": append(common,
			mount{"/etc/resolv.conf", "bind", podman + "resolv.conf", options}, mount{"/etc/hosts", "bind", podman + "hosts", options},
			mount{"/etc/hostname", "bind", podman + "hostname", options}, mount{"/run/.containerenv", "bind", podman + ".containerenv", options},
			mount{"/dev/shm", "bind", podman + "shm", options}, mount{"/run/secrets", "bind", podman + "run/secrets", options},
		)},
		"the kubelet": {"annotations": inPod(containerTypeContainer, nil), "mounts": append(common,
			mount{"/etc/hosts", "bind", kubelet + "etc-hosts", writable},
			mount{"/dev/termination-log", "bind", kubelet + "containers/buyer/0a1b2c3d", writable},
			mount{"/tmp", "bind", kubelet + "volumes/kubernetes.io~empty-dir/temp", writable},
			mount{"/var/openfaas/secrets", "bind", kubelet + "volumes/kubernetes.io~secret/s", []string{"rbind", "rprivate", "ro"}},
			mount{"/etc/hostname", "bind", criFolder + "/hostname", writable}, mount{"/etc/resolv.conf", "bind", criFolder + "/resolv.conf", writable},
			mount{"/dev/shm", "tmpfs", criFolder + "/shm", []string{"rprivate", "rw"}}, // as the shim makes it of a bind mount
		)},
	} {
		root := sandboxState(t, inPod(containerTypeSandbox, nil))
		if _, err := examine("--root", root, "create", "--bundle", bundleOf(t, config), ours); err != nil {
			t.Errorf("%s: %v", engine, err)
		}
	}
}

func TestDevicesOfTheHostAreRefused(t *testing.T) {
	with := func(d device) string {
		return bundleOf(t, map[string]any{"annotations": good, "linux": map[string]any{"devices": []device{d}}})
	}
	for _, d := range []device{
		{"/dev/sda", "b", 8, 0}, {"/dev/null", "b", 1, 3}, {"/dev/mem", "c", 1, 1}, {"/dev/net/tun", "c", 10, 200}, {"/dev/nvidia0", "c", 195, 0},
		{"/dev/vfio/vfio", "c", 1, 3}, {"/dev/accel0", "c", 1, 3}, {"/dev/fifo", "p", 0, 0}, {"/dev/x", "", 1, 3}, {"/dev/fuse", "c", 10, 229}, {"/dev/other", "c", 60, 0}, {keysPath, "b", 60, 0},
	} {
		refusedWith(t, "runtime.devices", "create", "--bundle", with(d), "id")
	}
	for _, d := range []device{{"/dev/null", "c", 1, 3}, {"/dev/urandom", "u", 1, 9}, {"/dev/tty", "c", 5, 0}, {keysPath, "c", keysMajor, keysMinor}} {
		if _, err := examine("create", "--bundle", with(d), "id"); err != nil {
			t.Error(err)
		}
	}
}

func TestARootThatTheHostSeesIsRefused(t *testing.T) {
	folder := bundle(t, good)
	refusedWith(t, "runtime.flags", "--overlay2=none", "create", "--bundle", folder, "id")
	for _, value := range []string{"root:self", "root:memory", "all:memory", "root:dir=/var/x", "root:self,size=1g"} {
		if _, err := examine("--overlay2="+value, "create", "--bundle", folder, "id"); err != nil {
			t.Error(err)
		}
	}
}

// TestTheTableSaysOfCommandsAndFlagsWhatAStartDoes holds that package mediation and the rules here agree.
func TestTheTableSaysOfCommandsAndFlagsWhatAStartDoes(t *testing.T) {
	spelled := map[string]string{"portforward": "port-forward", "readcontrol": "read-control", "writecontrol": "write-control"}
	for _, line := range mediation.Lines(mediation.Commands) {
		name := line.Name
		if spelled[name] != "" {
			name = spelled[name]
		}
		if topic := name == "platforms" || name == "syscalls"; !topic && slices.Contains(allowedCommands, name) != (line.Class == mediation.Inside) {
			t.Errorf("command %s: class %s", name, line.Class)
		}
	}
	ruled := []string{"overlay2"}
	for _, rule := range flagRules {
		ruled = append(ruled, rule.name)
	}
	for _, line := range mediation.Lines(mediation.Flags) {
		if name, global := strings.CutPrefix(line.Name, "--"); global && slices.Contains(ruled, name) != (line.Class == mediation.Replaced) {
			t.Errorf("flag --%s: class %s", name, line.Class)
		}
	}
	for _, name := range ruled {
		if _, found := mediation.Of(mediation.Flags, "--"+name); !found {
			t.Errorf("flag --%s has no line", name)
		}
	}
}
