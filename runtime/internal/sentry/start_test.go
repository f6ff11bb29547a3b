package sentry

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
)

// bundle writes a config.json with annotations and capabilities.
func bundle(t *testing.T, annotations map[string]string, capabilities ...string) string {
	t.Helper()
	spec, err := json.Marshal(map[string]any{
		"ociVersion": "1.0.0", "annotations": annotations,
		"process": map[string]any{"args": []string{"x"}, "capabilities": map[string][]string{"bounding": capabilities, "effective": capabilities}},
	})
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
			if err != nil || *hello != (frame.Hello{Proto: frame.Proto, Container: "id7", App: "shop", Function: "buyer"}) {
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

func TestOptionsThatLeadAroundTheEndpointAreRefused(t *testing.T) {
	refused := map[[2]int32]bool{
		{282, 1}: true, {282, 2}: true, // SOL_TLS
		{6, 31}:  true,  // TCP_ULP
		{1, 25}:  true,  // SO_BINDTODEVICE
		{0, 64}:  true,  // IPT_SO_SET_REPLACE
		{41, 64}: true,  // IP6T_SO_SET_REPLACE
		{0, 65}:  true,  // IPT_SO_SET_ADD_COUNTERS
		{6, 1}:   false, // TCP_NODELAY
		{1, 2}:   false, // SO_REUSEADDR
		{41, 26}: false, // IPV6_V6ONLY
	}
	for option, want := range refused {
		if got := optionRefused(option[0], option[1]); got != want {
			t.Errorf("option %v: refused %t", option, got)
		}
	}
}

func TestEveryReplacedCallHasAFunction(t *testing.T) {
	if err := Install(); err != nil {
		t.Fatal(err)
	}
}
