package survey

import (
	"testing"

	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/syscalls/linux"

	"kalium.dev/kalium/runtime/internal/mediation"
)

// taken is looked at once: reading the source takes a second or two.
var taken = func() func(*testing.T) Survey {
	var found Survey
	return func(t *testing.T) Survey {
		t.Helper()
		if found == nil {
			var err error
			if found, err = Take(); err != nil {
				t.Fatal(err)
			}
		}
		return found
	}
}()

func TestEverythingIsClassified(t *testing.T) {
	for _, name := range taken(t).Unclassified() {
		t.Errorf("%s has no line", name)
	}
}

func TestNoLineIsLeftOver(t *testing.T) {
	for _, name := range taken(t).Leftover() {
		t.Errorf("%s is not in the linked gVisor", name)
	}
}

// TestTheSurveyFindsWhatThereIs fails when gVisor's source changes so that the survey no longer finds it.
func TestTheSurveyFindsWhatThereIs(t *testing.T) {
	for kind, least := range map[mediation.Kind]int{
		mediation.Calls: 340, mediation.Transports: 9, mediation.Providers: 11, mediation.Factories: 4, mediation.Makers: 40,
		mediation.Methods: 24, mediation.Options: 230, mediation.MessageFlags: 4, mediation.Ioctls: 70, mediation.Commands: 40,
		mediation.Flags: 115, mediation.Annotations: 16, mediation.Filesystems: 12, mediation.Devices: 10,
	} {
		if got := len(taken(t)[kind]); got < least {
			t.Errorf("%s: %d found, there were %d", kind, got, least)
		}
	}
}

func TestAbsentCallsAreAbsent(t *testing.T) {
	for arch, table := range map[string]*kernel.SyscallTable{"amd64": linux.AMD64, "arm64": linux.ARM64} {
		for number, call := range table.Table {
			line, _ := mediation.Of(mediation.Calls, call.Name)
			if absent := call.SupportLevel == kernel.SupportUnimplemented; absent != (line.Class == mediation.Absent) {
				t.Errorf("%s: call %d, %s: the table of gVisor says absent=%t, ours has class %s", arch, number, call.Name, absent, line.Class)
			}
		}
	}
}
