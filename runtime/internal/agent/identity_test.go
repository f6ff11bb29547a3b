package agent

import (
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

const (
	strangerUID    = 65534 // nobody's
	strangerSocket = "KALIUM_TEST_STRANGER_SOCKET"
	strangerLine   = "KALIUM_TEST_STRANGER_LINE"
)

// TestStranger is no test of its own: TestAStrangersRegistrationIsRefused starts this program as another user with it.
func TestStranger(t *testing.T) {
	path := os.Getenv(strangerSocket)
	if path == "" {
		t.Skip("nobody has started a stranger")
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(conn, os.Getenv(strangerLine)+"\n") // the agent may have closed already
	if n, err := conn.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
		t.Fatalf("%d bytes, %v", n, err)
	}
}

func TestAStrangersRegistrationIsRefused(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
	s := newSite(t)
	s.startConnected()
	s.register("c1", "pay")
	// Somebody has loosened what keeps strangers out before the agent looks.
	program := s.dir + "/stranger"
	if err := os.WriteFile(program, must(os.ReadFile(must(os.Executable()))), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	hello := must(frame.Append(nil, 1, &frame.Hello{Protos: frame.Protos(), Container: "c1", App: "shop", Function: "pay"}))
	for path, line := range map[string]string{
		s.config.RegisterSocket: registerLine("c2", "shop", "pay"),
		s.config.GuardSocket:    strings.ReplaceAll(string(hello), "\x00", "0"), // no frame, but it is not read at all
	} {
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		before := strings.Count(s.log.String(), eventConnectionRefused)
		command := exec.CommandContext(t.Context(), program, "-test.run=^TestStranger$")
		command.Env = []string{strangerSocket + "=" + path, strangerLine + "=" + line}
		command.Dir = "/"
		command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: strangerUID, Gid: strangerUID}}
		var said bytes.Buffer
		command.Stdout, command.Stderr = &said, &said

		if err := command.Run(); err != nil {
			t.Fatalf("the stranger was served: %v\n%s", err, &said)
		}

		// The line is written behind the end of the connection.
		s.until("the log says so", func() bool { return strings.Count(s.log.String(), eventConnectionRefused) > before })
		if got := strings.Count(s.log.String(), eventConnectionRefused); got != before+1 || !strings.Contains(s.log.String(), "uid is 65534") {
			t.Errorf("%s: %d lines about it", path, got-before)
		}
	}
	if list := s.ask(`{"op":"list"}`); list != `{"ok":true,"containers":["c1"]}` {
		t.Errorf("registered: %s", list)
	}
}

func TestASecondInstanceUnderTheSameNameIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.startConnected()
	first := s.guard("c1", "pay")

	second, welcome := s.hello("c1", "shop", "pay")

	if welcome.OK || welcome.Reason != "already_connected" || len(welcome.Policy) != 0 {
		t.Errorf("%#v", welcome)
	}
	second.expectClosed()
	// The first one has not noticed.
	first.send(1, &frame.Start{Step: step, Version: 1})
	r, _ := expect[*frame.Start](s.controller)
	s.controller.send(r.conn, r.id, &frame.Answer{Allowed: true, Reason: "allowed"})
	if id, answer := first.answer(); id != 1 || !answer.Allowed {
		t.Errorf("id %d, %#v", id, answer)
	}
	if !strings.Contains(s.log.String(), "level=WARN event="+eventGuardRefused) {
		t.Error("the log does not say so")
	}
}

func TestAGuardCannotClaimAnotherContainer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.startConnected()
	s.guard("c1", "pay")
	s.guard("c2", "ship")
	for name, claim := range map[string][2]string{
		"one that is there, as what it is":     {"c1", "pay"},
		"one that is there, as something else": {"c1", "ship"},
		"one that is not":                      {"c3", "pay"},
	} {
		if _, welcome := s.hello(claim[0], "shop", claim[1]); welcome.OK || len(welcome.Policy) != 0 {
			t.Errorf("%s: %#v", name, welcome)
		}
	}
	if n := strings.Count(s.log.String(), eventGuardWelcome); n != 2 {
		t.Errorf("%d guards are welcome", n)
	}
}

func TestAContainerThatWasStartedAgainIsWelcome(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.startConnected()
	old := s.guard("c1", "pay")
	now := s.early("c1", "pay") // its hello is there before the end of the old one

	_ = old.conn.Close()

	if welcome := now.welcome(); !welcome.OK {
		t.Fatalf("%#v", welcome)
	}
	s.controller.push(&frame.Lease{LeaseMS: 7})
	if _, m := now.receive(); m.Type() != frame.TypeLease {
		t.Errorf("%#v", m)
	}
}

func TestOfTwoThatWaitForOnePlaceOneGetsIt(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.startConnected()
	old := s.guard("c1", "pay")
	waiting := []*fakeGuard{s.early("c1", "pay"), s.early("c1", "pay")}

	_ = old.conn.Close()

	welcome := 0
	for _, g := range waiting {
		if g.welcome().OK {
			welcome++
		}
	}
	if welcome != 1 {
		t.Errorf("%d are welcome", welcome)
	}
}
