package agent

import (
	"context"
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

func TestAnAgentThatStopsTakesItsInstancesWithIt(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	g.send(0, record("GET /"))
	g.send(0, &frame.End{Call: "c", Invocation: "i", Outcome: "answered"}) // said just before, and still told

	if err := s.stop(); err != nil {
		t.Fatal(err)
	}

	g.expectClosed()
	if _, m := expect[*frame.End](s.controller); m.Invocation != "i" {
		t.Errorf("%#v", m)
	}
	last := &frame.Report{}
	for {
		r := <-s.controller.received
		if m, is := r.m.(*frame.Report); is {
			last = m
		}
		if m, is := r.m.(*frame.Unregister); is {
			if m.Instance != "c1" || last.Denied["shop out_of_order"] != 1 {
				t.Errorf("%#v behind %#v", m, last)
			}
			return
		}
	}
}

func TestAnAgentStopsWithoutAController(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	s.guard("c1", "pay")
	s.controller.stop()
	begin := time.Now()

	if err := s.stop(); err != nil {
		t.Fatal(err)
	}

	if took := time.Since(begin); took > patience/2 {
		t.Errorf("it took %v", took)
	}
}

// TestSystemdHearsOfTheAgent plays systemd: the end of the socket to which NOTIFY_SOCKET points.
func TestSystemdHearsOfTheAgent(t *testing.T) {
	s := newSite(t)
	listener := must(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.dir + "/notify", Net: "unixgram"}))
	t.Cleanup(func() { _ = listener.Close() })
	_ = listener.SetReadDeadline(time.Now().Add(patience))
	said := make(chan string, 1000)
	go func() {
		buffer := make([]byte, 100)
		for {
			n, err := listener.Read(buffer)
			if err != nil {
				close(said)
				return
			}
			said <- string(buffer[:n])
		}
	}()
	t.Setenv("NOTIFY_SOCKET", s.dir+"/notify")
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))

	s.start()

	if first := <-said; first != "READY=1" {
		t.Errorf("first %q", first)
	}
	for range 3 {
		if again := <-said; again != "WATCHDOG=1" {
			t.Errorf("then %q", again)
		}
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	for each := range said {
		if each == "STOPPING=1" {
			return
		}
	}
	t.Error("it does not say that it stops")
}

func TestAHangingAgentIsNotWell(t *testing.T) {
	s := newSite(t)
	listener := must(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.dir + "/notify", Net: "unixgram"}))
	defer listener.Close()
	t.Setenv("NOTIFY_SOCKET", s.dir+"/notify")
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	a := &Agent{link: &link{config: s.config}, log: newLogger(s.log)}
	ended := make(chan struct{})
	a.mu.Lock()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { defer close(ended); a.notifySystem(ctx) }()
	defer func() { cancel(); <-ended }()

	buffer := make([]byte, 100)
	n := must(listener.Read(buffer))
	_ = listener.SetReadDeadline(time.Now().Add(200 * time.Millisecond)) // ten times what it may take
	_, err := listener.Read(buffer[n:])

	if string(buffer[:n]) != "READY=1" || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%q, then %v", buffer[:n], err)
	}
	a.mu.Unlock()
	_ = listener.SetReadDeadline(time.Now().Add(patience))
	if n := must(listener.Read(buffer)); !strings.HasPrefix(string(buffer[:n]), "WATCHDOG=1") {
		t.Errorf("%q", buffer[:n])
	}
}
