package mediation

import (
	"testing"

	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/syscalls/linux"
)

var tables = map[string]*kernel.SyscallTable{"amd64": linux.AMD64, "arm64": linux.ARM64}

func TestEveryCallIsClassified(t *testing.T) {
	for arch, table := range tables {
		for number, call := range table.Table {
			if _, found := Of(call.Name); !found {
				t.Errorf("%s: call %d, %s, has no line", arch, number, call.Name)
			}
		}
	}
}

func TestAbsentCallsAreAbsent(t *testing.T) {
	for arch, table := range tables {
		for number, call := range table.Table {
			line, _ := Of(call.Name)
			if absent := call.SupportLevel == kernel.SupportUnimplemented; absent != (line.Class == Absent) {
				t.Errorf("%s: call %d, %s: the table of gVisor says absent=%t, ours has class %d", arch, number, call.Name, absent, line.Class)
			}
		}
	}
}

func TestNoLineIsLeftOver(t *testing.T) {
	known := map[string]bool{}
	for _, table := range tables {
		for _, call := range table.Table {
			known[call.Name] = true
		}
	}
	seen := map[string]bool{}
	for _, call := range Calls() {
		if !known[call.Name] {
			t.Errorf("%s is no call of the linked gVisor", call.Name)
		}
		if seen[call.Name] {
			t.Errorf("%s has two lines", call.Name)
		}
		seen[call.Name] = true
	}
}

func TestTheZeroClassRefuses(t *testing.T) {
	if line, found := Of("no such call"); found || line.Class != Refused {
		t.Errorf("an unknown call has class %d", line.Class)
	}
}
