//go:build sandbox

package sentry

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// semantics builds testdata/semantics.c once. It is C for the sake of signals, which Go's runtime keeps for itself.
var semantics = sync.OnceValues(func() (string, error) {
	folder, err := os.MkdirTemp("", "kalium-semantics")
	if err != nil {
		return "", err
	}
	path := filepath.Join(folder, "semantics")
	output, err := exec.Command("gcc", "-static", "-pthread", "-O1", "-o", path, "testdata/semantics.c").CombinedOutput()
	if err != nil {
		return string(output), err
	}
	return path, nil
})

// runSemantics runs the program in a sandbox under a runtime, and a server of it outside when words ask for one. mode is
// that of the policy, or "" for stock gVisor.
func runSemantics(t *testing.T, mode string, words ...string) string {
	t.Helper()
	program, err := semantics()
	if err != nil {
		t.Fatal(err, program)
	}
	s := newSite(t)
	s.runtime = runtimePath(t, "runsc-stock")
	if mode != "" {
		s.runtime = runtimePath(t, "runsc-kalium")
		s.welcome = lasting(t, mode)
	}
	raw, err := os.ReadFile(program)
	if err == nil {
		err = os.WriteFile(filepath.Join(s.folder, "root", "semantics"), raw, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.change = func(spec map[string]any) {
		spec["process"].(map[string]any)["args"] = append([]string{"/semantics"}, words...)
		spec["mounts"] = []mount{{"/proc", "proc", "proc", nil}}
	}
	if len(words) > 1 {
		shell(t, "ip -n "+s.world+" link set lo up")
		server := exec.Command("ip", "netns", "exec", s.world, program, "serve", outside, "8080")
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Process.Kill(); server.Wait() })
		time.Sleep(200 * time.Millisecond)
	}
	return s.run("", mode != "")()
}

// TestAProgramSeesTheSocketsOfStockGVisor compares line by line. gVisor's own system call tests are C++ programs outside of
// its Go module; they were not run.
func TestAProgramSeesTheSocketsOfStockGVisor(t *testing.T) {
	for _, where := range []struct {
		name  string
		words []string
		modes []string
		least int
	}{
		// Inside of the sandbox nothing is judged, so enforce has to be the same as well.
		{"loopback", []string{"local"}, []string{"off", "audit", "enforce"}, 160},
		{"outside", []string{"run", outside, "8080"}, []string{"off", "audit"}, 140},
	} {
		t.Run(where.name, func(t *testing.T) {
			stock := strings.Split(runSemantics(t, "", where.words...), "\n")
			if len(stock) < where.least {
				t.Fatalf("%d lines: %q", len(stock), stock)
			}
			for _, mode := range where.modes {
				ours := strings.Split(runSemantics(t, mode, where.words...), "\n")
				same := 0
				for i := range max(len(stock), len(ours)) {
					if line(stock, i) == line(ours, i) {
						same++
					} else {
						t.Errorf("%s: stock %q, ours %q", mode, line(stock, i), line(ours, i))
					}
				}
				t.Logf("%s: %d of %d lines are the same", mode, same, len(stock))
			}
		})
	}
}

func line(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return ""
}
