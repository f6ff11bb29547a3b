//go:build sandbox

package sentry

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// pod makes the site's bundle one of a pod's, as containerd does: its id is that of the sandbox.
func (s *site) pod(kind, name string) {
	sandbox := s.id
	s.change = func(spec map[string]any) {
		annotations := inPod(kind, map[string]string{
			annotationApp: guardtest.App, annotationFunction: guardtest.Function, annotationSandboxID: sandbox, annotationContainerName: name,
		})
		spec["annotations"] = annotations
	}
}

// pods runs a command of runsc with the site's state and the guard's configuration.
func (s *site) pods(arguments ...string) (string, error) {
	flags := []string{
		"--root=" + filepath.Join(s.folder, "state"), "--ignore-cgroups", "--network=sandbox", "--overlay2=root:memory",
		"--pod-init-config=" + filepath.Join(s.folder, "pod-init.json"), "--log=" + filepath.Join(s.folder, "log.json"), "--log-format=json",
	}
	output, err := exec.Command(s.runtime, append(flags, arguments...)...).CombinedOutput()
	return string(output), err
}

// TestThePauseContainerHasNoInternetSockets is about the container with which a pod's Sentry starts: the guard's identity is
// not its own. Its UID is what the agent hears.
func TestThePauseContainerHasNoInternetSockets(t *testing.T) {
	s := newSite(t)
	s.pod(containerTypeSandbox, "")
	r := receive(s.listen(8080))

	got := s.run("send", true)()
	s.told()

	if connections, _ := r.state(); connections != 0 || !strings.Contains(got, "connect: EACCES") {
		t.Errorf("%d connections, the pause container said %s", connections, got)
	}
	if len(s.hellos) != 1 || !reflect.DeepEqual(s.hellos[0], frame.Hello{Protos: frame.Protos(), Container: podUID, App: guardtest.App, Function: guardtest.Function}) {
		t.Errorf("hellos %+v", s.hellos)
	}
	if d := s.denials(); len(d) != 0 {
		t.Errorf("denials %v", d)
	}
}

func TestAPodWhoseAgentRefusesItDoesNotStart(t *testing.T) {
	s := newSite(t)
	s.pod(containerTypeSandbox, "")
	s.welcome = func(*frame.Hello) *frame.Welcome { return &frame.Welcome{Reason: "unregistered"} }
	s.configure("wait")

	output, err := s.pods("create", "--bundle", s.folder, s.id)

	if err == nil || !strings.Contains(output, "error[runtime.refused]: cannot start pod "+podUID) || !strings.Contains(output, "unregistered") {
		t.Errorf("%v, %s", err, output)
	}
}

// TestAPodRunsItsFunctionBehindTheGuard starts a pod as containerd does, and its function in it.
func TestAPodRunsItsFunctionBehindTheGuard(t *testing.T) {
	s := newSite(t)
	r := receive(s.listen(8080))
	must := func(arguments ...string) {
		t.Helper()
		if output, err := s.pods(arguments...); err != nil {
			t.Fatalf("%v: %v\n%s", arguments, err, output)
		}
	}
	s.pod(containerTypeSandbox, "")
	s.configure("wait")
	// The sandbox keeps the streams of the process that made it, so nobody may wait for their end.
	sandbox := exec.Command(s.runtime, "--root="+filepath.Join(s.folder, "state"), "--ignore-cgroups", "--network=sandbox", "--overlay2=root:memory",
		"--pod-init-config="+filepath.Join(s.folder, "pod-init.json"), "create", "--bundle", s.folder, s.id)
	if err := sandbox.Run(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.pods("delete", "--force", s.id) })
	must("start", s.id)

	s.pod(containerTypeContainer, "sidecar")
	s.configure("send")
	output, err := s.pods("create", "--bundle", s.folder, s.id+"-sidecar")
	if err == nil || !strings.Contains(output, "error[runtime.pod]") {
		t.Errorf("a sidecar: %v, %s", err, output)
	}

	s.pod(containerTypeContainer, guardtest.Function)
	s.configure("send")
	function := s.id + "-function"
	must("create", "--bundle", s.folder, function)
	t.Cleanup(func() { s.pods("delete", "--force", function) })
	output, err = s.pods("start", function)
	if err != nil {
		t.Fatal(err, output)
	}
	must("wait", function)

	if output != fmt.Sprintln("connect: ok") {
		t.Errorf("the function said %q", output)
	}
	if connections, bytes := r.state(); bytes != "" || len(s.hellos) != 1 {
		t.Errorf("%d connections, %q arrived, hellos %+v", connections, bytes, s.hellos)
	}
}
