package guard

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kalium.dev/kalium/runtime/internal/frame"
)

const (
	askedFor   = 500 * time.Millisecond // the deadline of a question: until then its asker has to be stopped
	stoppedFor = 700 * time.Millisecond // longer than that, and much shorter than what nobody waits for any more
)

// As a process of its own this asks one question over descriptor 3 and says what became of it.
func TestMain(m *testing.M) {
	if os.Getenv("KALIUM_TEST_ASKS") == "" {
		os.Exit(m.Run())
	}
	conn, err := net.FileConn(os.NewFile(3, "agent"))
	if err != nil {
		panic(err)
	}
	l := NewLink(conn, 1, func(*frame.VerdictRecord) {})
	l.Serve(&frame.Reader{}, nil, func(string) {})
	if _, err = l.Invoke(time.Now().Add(askedFor), &frame.Invoke{Step: newStep(), Callee: "payer"}); err == nil {
		os.Stdout.WriteString("answered\n")
	} else {
		os.Stdout.WriteString(err.Error() + "\n")
	}
}

// A sandbox that may use half a processor stands still for most of the time while its program spins. Else a program could have
// the fail mode decide in place of an answer that has come.
func TestAnAnswerThatCameWhileTheSandboxStoodStillIsHeard(t *testing.T) {
	for attempt := range 5 {
		t.Run(fmt.Sprint(attempt), func(t *testing.T) {
			t.Parallel()
			if said := heardWhileStopped(t, &frame.Answer{Reason: "edge_not_allowed"}); said != "answered" {
				t.Fatalf("the question had: %s", said)
			}
		})
	}
}

func TestASandboxThatStoodStillLearnsAllTheSameThatNobodyAnswers(t *testing.T) {
	t.Parallel()
	if said := heardWhileStopped(t, nil); said != errNoAnswer.Error() {
		t.Fatalf("the question had: %s", said)
	}
}

// heardWhileStopped has a process ask a question and stops it until its deadline is long over, and answer has come.
func heardWhileStopped(t *testing.T, answer *frame.Answer) string {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "asks")
	conn, err := net.FileConn(os.NewFile(uintptr(pair[0]), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), "KALIUM_TEST_ASKS=1")
	command.ExtraFiles = []*os.File{theirs}
	command.Stderr = os.Stderr
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer command.Wait()
	theirs.Close()
	a := &agent{t: t, conn: conn}
	id, _ := a.next()
	command.Process.Signal(syscall.SIGSTOP)
	if answer != nil {
		a.say(id, answer)
	}
	time.Sleep(stoppedFor)
	command.Process.Signal(syscall.SIGCONT)
	said, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(said)
}
