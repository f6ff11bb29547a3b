package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

func TestAVerdictIsLoggedWithTheAgentsFields(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	before := time.Now().UnixMilli()
	g.send(0, record("https GET images /<a>"))

	s.until("the line is there", func() bool { return len(s.verdictLines()) == 1 })

	line := s.verdictLines()[0]
	for key, want := range map[string]any{
		"event": "verdict", "seq": 1.0, "node": "node-0", "instance": "c1", "app": "shop", "function": "pay", "mode": "enforce",
		"policy_version": 1.0, "call": "", "invocation": "", "kind": "https", "message": "https GET images /<a>", "peer": "images",
		"allowed": false, "would_deny": false, "reason": "out_of_order", "line": 4.0, "judging": "", "latency_us": 7.0,
		"fail_mode": "",
	} {
		if line[key] != want {
			t.Errorf("%s is %v, not %v", key, line[key], want)
		}
	}
	if at := int64(line["time_ms"].(float64)); at < before || at > time.Now().UnixMilli() {
		t.Errorf("time_ms %d", at)
	}
	if fmt.Sprint(line["expected"], line["states"]) != "[https GET images / @line 3] [0]" || len(line) != 24 {
		t.Errorf("line %v", line)
	}
}

func TestVerdictsStayInTheOrderOfArrival(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	guards := []*fakeGuard{s.guard("c0", "pay"), s.guard("c1", "pay"), s.guard("c2", "ship")}
	const each = 300
	var wait sync.WaitGroup
	for _, g := range guards {
		wait.Go(func() {
			for i := range each {
				g.send(0, record(fmt.Sprint("m", i)))
			}
		})
	}
	wait.Wait()
	s.until("all lines are there", func() bool { return len(s.verdictLines()) == each*len(guards) })

	next := map[string]int{}
	for i, line := range s.verdictLines() {
		instance := line["instance"].(string)
		if line["seq"] != float64(i+1) || line["message"] != fmt.Sprint("m", next[instance]) {
			t.Fatalf("line %d: %v; expected m%d of %s", i, line, next[instance], instance)
		}
		next[instance]++
	}
}

func TestWhatAGuardHadSentIsLoggedAtTheEnd(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	for i := range 200 {
		g.send(0, record(fmt.Sprint("m", i)))
	}

	err := s.stop()

	if err != nil || len(s.verdictLines()) != 200 {
		t.Errorf("%d lines, %v", len(s.verdictLines()), err)
	}
	g.expectClosed()
	for _, path := range []string{s.config.GuardSocket, s.config.RegisterSocket} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
}

func TestAVerdictOutsideTheClosedSetClosesTheGuard(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	data := must(frame.Append(nil, 0, record("m")))
	if _, err := g.conn.Write([]byte(strings.Replace(string(data), "out_of_order", "out_of_ordeR", 1))); err != nil {
		t.Fatal(err)
	}

	g.expectClosed()

	if lines := s.verdictLines(); len(lines) != 0 {
		t.Errorf("logged: %v", lines)
	}
}

func TestTheLogIsOpenedAgain(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	g.send(0, record("before"))
	s.until("the first line is there", func() bool { return len(s.verdictLines()) == 1 })
	moved := s.config.VerdictLog + ".1"
	if err := os.Rename(s.config.VerdictLog, moved); err != nil {
		t.Fatal(err)
	}
	s.reopen <- os.Interrupt // stands for SIGHUP
	s.until("the file is there again", func() bool { _, err := os.Stat(s.config.VerdictLog); return err == nil })

	g.send(0, record("after"))

	s.until("the second line is there", func() bool { return len(s.verdictLines()) == 1 })
	old, err := os.ReadFile(moved)
	if lines := parseLines(t, old); err != nil || len(lines) != 1 || lines[0]["message"] != "before" || s.verdictLines()[0]["message"] != "after" {
		t.Errorf("old file: %v, %v; new file: %v", lines, err, s.verdictLines())
	}
}

func TestALogThatCannotBeWrittenMakesEverythingDeny(t *testing.T) {
	s := newSite(t)
	if err := os.Symlink("/dev/full", s.config.VerdictLog); err != nil {
		t.Fatal(err)
	}
	s.startConnected()
	g, other := s.guard("c1", "pay"), s.guard("c2", "ship")

	g.send(0, record("lost?"))

	g.expectDismissed()
	other.expectDismissed()
	if _, welcome := s.hello("c1", "shop", "pay"); welcome.OK || welcome.Reason != "no_guard" {
		t.Errorf("while the log fails: %#v", welcome)
	}
	// The disk has room again: nothing is lost, and guards are welcomed.
	if err := os.Remove(s.config.VerdictLog); err != nil {
		t.Fatal(err)
	}
	s.reopen <- os.Interrupt
	s.until("the log is well", func() bool { return strings.Contains(s.log.String(), eventVerdictsWell) })
	if lines := s.verdictLines(); len(lines) != 1 || lines[0]["message"] != "lost?" {
		t.Errorf("lines %v", lines)
	}
	if _, welcome := s.hello("c1", "shop", "pay"); !welcome.OK {
		t.Errorf("after it: %#v", welcome)
	}
}

func TestAHalfWrittenBatchIsTakenBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	file, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeLines(file, []byte("one\n")); err != nil {
		t.Fatal(err)
	}
	limited := &limitedFile{File: file, room: 5}

	err = writeLines(limited, []byte("two\nthree\n"))

	data, readErr := os.ReadFile(path)
	if err == nil || readErr != nil || string(data) != "one\n" {
		t.Errorf("%q, %v, %v", data, err, readErr)
	}
}

// limitedFile is a file on a disk with room for some bytes.
type limitedFile struct {
	*os.File
	room int
}

func (f *limitedFile) Write(b []byte) (int, error) {
	n, err := f.File.Write(b[:min(len(b), f.room)])
	if err == nil && n < len(b) {
		err = errors.New("no space left")
	}
	return n, err
}

func TestAddingDoesNotWaitForEver(t *testing.T) {
	// A log whose goroutine never writes.
	l := &verdictLog{now: time.Now, wait: 20 * time.Millisecond, first: make(chan struct{}, 1), urgent: make(chan struct{}, 1)}
	l.room = sync.NewCond(&l.mu)
	l.pending = make([]byte, verdictPendingMax)
	began := time.Now()

	_, err := l.add(&frame.Identity{}, &record("m").Record)

	if !errors.Is(err, errLogFailed) || time.Since(began) < l.wait {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}

func TestABatchIsWrittenWhenItIsFullOrOld(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := openVerdictLog(path, "n", "00f1e2d3c4b5a697", func(err error) { t.Error(err) }, func() {})
	if err != nil {
		t.Fatal(err)
	}
	long := record(strings.Repeat("m", 500))
	for range 10 * verdictBatchBytes / 500 {
		if _, err := l.add(&frame.Identity{}, &long.Record); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(patience)
	for {
		if len(parseLines(t, wholeLines(t, path))) == 10*verdictBatchBytes/500 { // parseLines also holds that no line is cut
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the lines do not arrive")
		}
	}
	if err := l.close(); err != nil {
		t.Error(err)
	}
	if _, err := l.add(&frame.Identity{}, &long.Record); !errors.Is(err, errLogFailed) {
		t.Errorf("a line after the end: %v", err)
	}
}
