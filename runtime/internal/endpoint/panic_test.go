package endpoint

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// A panic inside of the guard has to end the Sentry, and with it the sandbox: nobody may catch it and go on without a
// verdict. Go ends the process unless somebody on the goroutine's stack recovers, so these tests hold that nobody does.

// recovering are the files of gVisor that recover: none is on a stack that a socket call or a packet has.
var recovering = []string{
	"pkg/lisafs/connection.go",         // the gofer, another process
	"pkg/state/pretty/pretty.go",       // prints a checkpoint
	"pkg/state/state.go",               // writes and reads checkpoints, which are refused
	"pkg/state/statefile/statefile.go", // the same
}

func recoversIn(t *testing.T, root string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte("recover()")) {
			relative, _ := filepath.Rel(root, path)
			files = append(files, filepath.ToSlash(relative))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestNobodyCatchesAPanicOfTheGuard(t *testing.T) {
	output, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "gvisor.dev/gvisor").Output()
	if err != nil {
		t.Fatal(err)
	}

	if got := recoversIn(t, strings.TrimSpace(string(output))); !slices.Equal(got, recovering) {
		t.Errorf("gVisor recovers in %v, known are %v", got, recovering)
	}
	if got := recoversIn(t, "../.."); len(got) != 0 {
		t.Errorf("the runtime recovers in %v", got)
	}
}

// The places where code of the guard runs: the task's own goroutine, the keeper of a connection, and a timer.
var places = map[string]func(*net){
	"write": func(n *net) {
		_, program := n.working()
		out := n.stream()
		must(n.t, out.Bind(full("10.137.0.10:0")))
		listener := n.plain(6).listen("10.137.0.1:8080")
		n.c.OnLog = func(*frame.VerdictRecord) { panic("a fault of the guard") }
		out.connect("10.137.0.1:8080")
		server := listener.accept()
		out.Write(bytes.NewReader([]byte("GET /secret HTTP/1.1\r\nHost: api.test:8080\r\n\r\n")), tcpip.WriteOptions{})
		server.end()
		program.Close()
	},
	"keeper": func(n *net) {
		n.c.OnStart = func(*frame.Start) (*frame.Answer, error) { panic("a fault of the guard") }
		gateway, _ := n.served()
		gateway.write(work)
		gateway.end()
	},
	"timer": func(n *net) {
		if err := n.guard.SetPolicy(guardtest.App, guardtest.Edited(n.t, "enforce", "4", guardtest.Timeout, `"invocation_timeout_ms":1`)); err != nil {
			n.t.Fatal(err)
		}
		n.c.OnEnd = func(*frame.End) { panic("a fault of the guard") }
		gateway, _ := n.served()
		gateway.write(work)
		gateway.end()
	},
}

const placeVariable = "KALIUM_TEST_PANIC"

func TestAPanicOfTheGuardEndsTheProcess(t *testing.T) {
	if place := os.Getenv(placeVariable); place != "" {
		places[place](newNet(t, "enforce"))
		t.Skip("survived") // the parent looks for this
	}
	for place := range places {
		again := exec.Command(os.Args[0], "-test.run=^TestAPanicOfTheGuardEndsTheProcess$", "-test.v")
		again.Env = append(os.Environ(), placeVariable+"="+place)

		output, err := again.CombinedOutput()

		if err == nil || !strings.Contains(string(output), "panic: a fault of the guard") || strings.Contains(string(output), "survived") {
			t.Errorf("%s: %v\n%s", place, err, output)
		}
	}
}
