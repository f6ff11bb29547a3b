package sentry

import (
	"encoding/json"
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kalium.dev/kalium/runtime/internal/frame"
)

const (
	podUID    = "3f0c1d52-8b1e-4a2f-9d5e-0a1b2c3d4e5f"
	sandboxID = "5f1e2d3c4b5a69788796a5b4c3d2e1f05f1e2d3c4b5a69788796a5b4c3d2e1f0"
	criFolder = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/" + sandboxID
)

// inPod are the annotations that containerd gives a container of a pod, with changes; an empty value takes one away.
func inPod(kind string, changes map[string]string) map[string]string {
	annotations := maps.Clone(good)
	maps.Copy(annotations, map[string]string{
		annotationContainerType: kind, annotationSandboxID: sandboxID, annotationSandboxUID: podUID,
		"io.kubernetes.cri.sandbox-namespace": "openfaas-fn", "io.kubernetes.cri.sandbox-name": "buyer-7d",
	})
	if kind == containerTypeContainer {
		annotations[annotationContainerName] = "buyer"
	}
	maps.Copy(annotations, changes)
	maps.DeleteFunc(annotations, func(_, value string) bool { return value == "" })
	return annotations
}

// sandboxState writes what gVisor keeps of a sandbox, and returns the folder for --root.
func sandboxState(t *testing.T, annotations map[string]string) string {
	t.Helper()
	root := t.TempDir()
	state, err := json.Marshal(map[string]any{"id": sandboxID, "spec": map[string]any{"annotations": annotations}, "sandbox": map[string]any{"id": sandboxID}})
	if err == nil {
		err = os.WriteFile(filepath.Join(root, sandboxID+"_sandbox:"+sandboxID+".state"), state, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func TestAPodIsWhatItsUIDSays(t *testing.T) {
	started = nil
	defer func() { started = nil }()
	if err := Examine([]string{"create", "--bundle", bundle(t, inPod(containerTypeSandbox, nil)), sandboxID}); err != nil {
		t.Fatal(err)
	}

	hello, err := identify()

	if err != nil || !reflect.DeepEqual(*hello, frame.Hello{Protos: frame.Protos(), Container: podUID, App: "shop", Function: "buyer"}) {
		t.Errorf("%+v, %v", hello, err)
	}
	if !isPause(sandboxID) || isPause(ours) {
		t.Error("the pod's own container is not told from the function's")
	}
}

func TestASandboxWhosePodIsNotSaidDoesNotStart(t *testing.T) {
	for what, changes := range map[string]map[string]string{
		"no UID":                  {annotationSandboxUID: ""},
		"a container's id as UID": {annotationSandboxUID: ours},
		"a UID in capitals":       {annotationSandboxUID: strings.ToUpper(podUID)},
		"a UID with a path":       {annotationSandboxUID: "../" + podUID[3:]},
		"another sandbox's id":    {annotationSandboxID: ours},
		"no sandbox's id":         {annotationSandboxID: ""},
		"an unknown type":         {annotationContainerType: "pause"},
		"another engine's pod":    {"io.kubernetes.cri-o.ContainerType": "container"},
	} {
		t.Run(what, func(t *testing.T) {
			refusedWith(t, "runtime.pod", "create", "--bundle", bundle(t, inPod(containerTypeSandbox, changes)), sandboxID)
		})
	}
	refusedWith(t, "runtime.annotations", "create", "--bundle", bundle(t, inPod(containerTypeSandbox, map[string]string{annotationApp: ""})), sandboxID)
	refusedWith(t, "runtime.annotations", "create", "--bundle", bundle(t, inPod(containerTypeSandbox, map[string]string{annotationFunction: ""})), sandboxID)
	refusedWith(t, "runtime.pod", "create", "--bundle", bundle(t, map[string]string{"io.kubernetes.cri-o.ContainerType": "sandbox"}), sandboxID)
}

func TestOnlyTheFunctionsContainerJoinsAPod(t *testing.T) {
	root := sandboxState(t, inPod(containerTypeSandbox, map[string]string{annotationTimers: "on"}))
	create := func(changes map[string]string) []string {
		annotations := inPod(containerTypeContainer, map[string]string{annotationTimers: "on"})
		maps.Copy(annotations, changes)
		maps.DeleteFunc(annotations, func(_, value string) bool { return value == "" })
		return []string{"--root", root, "create", "--bundle", bundle(t, annotations), ours}
	}

	if kept, err := examine(create(nil)...); err != nil || kept.isPodSandbox() {
		t.Errorf("%+v, %v", kept, err)
	}
	for what, changes := range map[string]map[string]string{
		"a sidecar":                  {annotationContainerName: "proxy"},
		"a container without a name": {annotationContainerName: ""},
		"a sidecar whose pod was given its name meanwhile": {annotationContainerName: "debugger", annotationFunction: "debugger"},
		"another app meanwhile":                            {annotationApp: "bank"},
		"a setting less":                                   {annotationTimers: ""},
		"a setting more":                                   {annotationTLS: tlsTerminate},
		"another pod's sandbox":                            {annotationSandboxUID: "00000000-0000-4000-8000-000000000000"},
		"a sandbox that is not there":                      {annotationSandboxID: ours},
		"a path for a sandbox":                             {annotationSandboxID: "../" + sandboxID},
	} {
		t.Run(what, func(t *testing.T) {
			for _, name := range []string{"create", "run"} {
				args := create(changes)
				args[2] = name
				refusedWith(t, "runtime.pod", args...)
			}
		})
	}
}

func TestSharedMemoryOfAPodIsLetPass(t *testing.T) {
	shim := map[string]string{
		sharedMemory + "source": criFolder + "/shm", sharedMemory + "type": "tmpfs", sharedMemory + "share": "pod", sharedMemory + "options": "rw",
		"dev.gvisor.spec.cgroup-parent": "/kubepods/besteffort/pod" + podUID,
	}
	if _, err := examine("create", "--bundle", bundle(t, inPod(containerTypeSandbox, shim)), sandboxID); err != nil {
		t.Error(err)
	}
	for name, value := range map[string]string{
		sharedMemory + "source":                         "/srv/data",
		sharedMemory + "type":                           "bind",
		sharedMemory + "share":                          "shared",
		sharedMemory + "options":                        "rw,exec",
		sharedMemory + "other":                          "x",
		"dev.gvisor.spec.mount.data.source":             criFolder + "/shm",
		"dev.gvisor.spec.mount.gvisorinternaldevshm2.x": "tmpfs",
	} {
		changes := maps.Clone(shim)
		changes[name] = value
		refusedWith(t, "runtime.annotations", "create", "--bundle", bundle(t, inPod(containerTypeSandbox, changes)), sandboxID)
	}
	refusedWith(t, "runtime.annotations", "create", "--bundle", bundle(t, map[string]string{sharedMemory + "type": "tmpfs"}), sandboxID)
	refusedWith(t, "runtime.annotations", "create", "--bundle", bundle(t, inPod(containerTypeContainer, map[string]string{sharedMemory + "type": "tmpfs"})), ours)
}

// TestMountsOfThePodsOwnContainerAreLetPass holds what containerd mounts there, after the shim has changed it.
func TestMountsOfThePodsOwnContainerAreLetPass(t *testing.T) {
	folder := bundleOf(t, map[string]any{"annotations": inPod(containerTypeSandbox, nil), "mounts": []mount{
		{"/proc", "proc", "proc", nil}, {"/dev", "tmpfs", "tmpfs", nil}, {"/dev/shm", "tmpfs", criFolder + "/shm", []string{"ro"}},
		{"/etc/resolv.conf", "bind", criFolder + "/resolv.conf", []string{"rbind", "ro"}},
	}})
	if _, err := examine("create", "--bundle", folder, sandboxID); err != nil {
		t.Error(err)
	}
}

func TestARefusalIsInTheLogOfTheEngine(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log.json")
	refusal := failed("runtime.pod", "create a container", "a sidecar", "run it in a pod of its own")
	if err := os.WriteFile(log, []byte(`{"level":"info","msg":"before"}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	Report([]string{"--log", log, "--log-format=json", "create", "--bundle", "/x", "id"}, refusal)
	Report([]string{"create", "--bundle", "/x", "id"}, refusal)
	Report([]string{"--no-such-flag"}, refusal)

	raw, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	var line struct{ Level, Msg string }
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &line); err != nil || len(lines) != 2 || line.Level != "error" || line.Msg != refusal.Error() {
		t.Errorf("%q, %v", raw, err)
	}
}

func TestAPodWaitsForTheAnswerOfItsAgent(t *testing.T) {
	hello := &frame.Hello{Protos: frame.Protos(), Container: podUID, App: "shop", Function: "buyer"}
	encode := func(m frame.Message) []byte {
		b, err := frame.Append(nil, helloID, m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	welcome := encode(&frame.Welcome{OK: true, Policy: make([]byte, 3*refusalBytes), Port: 8080, Sources: []string{"10.0.0.0/8"}, HealthPath: "/"})
	for what, c := range map[string]struct {
		answer  []byte
		refused string
	}{
		"a welcome that is longer than the first piece": {welcome, ""},
		"a refusal":                   {encode(&frame.Welcome{Reason: "unregistered"}), "unregistered"},
		"a connection that is closed": {nil, "closed"},
	} {
		t.Run(what, func(t *testing.T) {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(pair[0])
			agent := os.NewFile(uintptr(pair[1]), "agent")
			conn, err := net.FileConn(agent)
			if err = errors.Join(err, agent.Close()); err != nil {
				t.Fatal(err)
			}
			go func() {
				conn.Write(c.answer)
				conn.Close()
			}()

			err = awaitAdmission(pair[0], hello)

			var refusal *StartError
			if c.refused != "" && (!errors.As(err, &refusal) || refusal.Code != "runtime.refused" || !strings.Contains(refusal.Found, c.refused)) {
				t.Fatalf("%v", err)
			}
			if c.refused == "" {
				if err != nil {
					t.Fatal(err)
				}
				first := make([]byte, 4)
				if n, err := unix.Read(pair[0], first); err != nil || string(first[:n]) != string(welcome[:4]) {
					t.Errorf("the Sentry finds %q, %v", first[:n], err)
				}
			}
		})
	}
}
