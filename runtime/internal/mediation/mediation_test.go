package mediation

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/abi/linux"
)

// repository is the root of the repository as the tests of this package see it.
const repository = "../../.."

func TestNoNameHasTwoLines(t *testing.T) {
	for _, kind := range Kinds() {
		seen := map[string]bool{}
		for _, line := range Lines(kind) {
			if seen[line.Name] || line.Name == "" {
				t.Errorf("%s: %q has two lines or no name", kind, line.Name)
			}
			seen[line.Name] = true
		}
		if len(seen) == 0 || about[kind] == "" {
			t.Errorf("%s: %d lines, about %q", kind, len(seen), about[kind])
		}
	}
}

func TestNumbersAreUnique(t *testing.T) {
	if len(optionsByNumber) != len(options) {
		t.Errorf("%d numbers of %d options", len(optionsByNumber), len(options))
	}
	if len(socketsByNumber) != len(sockets) {
		t.Errorf("%d numbers of %d sockets", len(socketsByNumber), len(sockets))
	}
	// Two names of one request are of one class.
	for _, i := range ioctls {
		if IoctlClass(i.Number) != i.Class {
			t.Errorf("%s has another class by its number", i.Name)
		}
	}
}

func TestTheZeroClassRefuses(t *testing.T) {
	if line, found := Of(Calls, "no such call"); found || line.Class != Refused {
		t.Errorf("an unknown call has class %s", line.Class)
	}
	if OptionClass(12345, 1) != Refused || OptionClass(linux.SOL_SOCKET, 12345) != Refused || IoctlClass(12345) != Refused {
		t.Error("an unknown option or request is not refused")
	}
}

func TestTheLineThatSaysMostCounts(t *testing.T) {
	for _, c := range []struct {
		family   int
		kind     linux.SockType
		protocol int
		want     Class
	}{
		{linux.AF_INET, linux.SOCK_STREAM, 0, EndsAtEndpoint},
		{linux.AF_INET6, linux.SOCK_DGRAM, 17, EndsAtEndpoint},
		{linux.AF_INET, linux.SOCK_STREAM, 262, Refused},
		{linux.AF_INET, linux.SOCK_STREAM, 99, Refused},
		{linux.AF_INET, linux.SOCK_DGRAM, 1, Refused},
		{linux.AF_INET6, linux.SOCK_RAW, 255, Refused},
		{linux.AF_UNIX, linux.SOCK_SEQPACKET, 0, Inside},
		{linux.AF_NETLINK, linux.SOCK_DGRAM, 0, Inside},
		{linux.AF_NETLINK, linux.SOCK_RAW, 12, Refused},
		{linux.AF_NETLINK, linux.SOCK_RAW, 99, Refused},
		{linux.AF_VSOCK, linux.SOCK_STREAM, 0, Refused},
		{99, linux.SOCK_STREAM, 0, Refused},
	} {
		if got := SocketClass(c.family, c.kind, c.protocol); got != c.want {
			t.Errorf("family %d, type %d, protocol %d: %s, want %s", c.family, c.kind, c.protocol, got, c.want)
		}
	}
}

func TestAWayThatIsClosedIsSaid(t *testing.T) {
	for _, kind := range []Kind{Sockets, Options, Ioctls, Starts, Files} {
		for _, line := range Lines(kind) {
			if line.Class == Refused && line.Way == "" {
				t.Errorf("%s: %s does not say how bytes could leave", kind, line.Name)
			}
		}
	}
}

func TestTheDocumentIsTheTable(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join(repository, "docs/reference/mediation.md"))
	if err != nil {
		t.Fatal(err)
	}
	if string(raw) != Document() {
		t.Error("docs/reference/mediation.md is stale: go run ./internal/mediation/document > ../docs/reference/mediation.md")
	}
}

// named is a test as documents spell it.
var named = regexp.MustCompile("`([a-zA-Z0-9_./-]+_test\\.go|[a-zA-Z0-9_./-]*test_[a-z0-9_]+\\.py)::([A-Za-z0-9_]+)`")

func TestEveryTestThatADocumentNamesExists(t *testing.T) {
	sources := map[string]string{}
	for _, document := range []string{"docs/reference/mediation.md", "docs/topics/threat-model.md"} {
		raw, err := os.ReadFile(filepath.Join(repository, document))
		if err != nil {
			t.Fatal(err)
		}
		found := named.FindAllStringSubmatch(string(raw), -1)
		if len(found) < 10 {
			t.Errorf("%s names %d tests", document, len(found))
		}
		for _, match := range found {
			file, name := match[1], match[2]
			if _, read := sources[file]; !read {
				source, err := os.ReadFile(filepath.Join(repository, file))
				if err != nil {
					t.Errorf("%s: %v", document, err)
				}
				sources[file] = string(source)
			}
			keyword := "func "
			if strings.HasSuffix(file, ".py") {
				keyword = "def "
			}
			if sources[file] != "" && !strings.Contains(sources[file], keyword+name+"(") {
				t.Errorf("%s names %s::%s, which does not exist", document, file, name)
			}
		}
	}
}
