package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// early sends a hello whose registration has not come yet, and returns when the agent holds it.
func (s *site) early(container, function string) *fakeGuard {
	s.t.Helper()
	before := strings.Count(s.log.String(), eventGuardWaits)
	g := s.dialGuard()
	g.send(1, &frame.Hello{Protos: frame.Protos(), Container: container, App: "shop", Function: function})
	s.until("the hello waits", func() bool { return strings.Count(s.log.String(), eventGuardWaits) > before })
	return g
}

func (g *fakeGuard) welcome() *frame.Welcome {
	g.t.Helper()
	_, m := g.receive()
	welcome, ok := m.(*frame.Welcome)
	if !ok {
		g.t.Fatalf("%#v in place of a welcome", m)
	}
	return welcome
}

func TestAHelloWaitsForItsRegistration(t *testing.T) {
	s := newSite(t)
	s.config.AdmitWaitMS = admitWaitMSMax
	s.startConnected()
	g := s.early("p1", "pay")

	s.register("p2", "pay")  // another one's news
	s.register("p1", "ship") // and for its own, but as another function

	if welcome := g.welcome(); welcome.OK || welcome.Reason != "unregistered" {
		t.Errorf("a hello that is not the registration: %#v", welcome)
	}
	g = s.early("p3", "pay")
	s.register("p3", "pay")
	if welcome := g.welcome(); !welcome.OK || len(welcome.Policy) == 0 {
		t.Errorf("a hello that is: %#v", welcome)
	}
}

func TestARegistrationThatTheControllerHasNotAcknowledgedAdmitsNobody(t *testing.T) {
	s := newSite(t)
	s.config.AdmitWaitMS = admitWaitMSMax
	s.controller.silent = true
	s.startConnected()
	answered := make(chan string, 1)
	go func() { answered <- s.ask(registerLine("p1", "shop", "pay")) }()
	asked, _ := expect[*frame.Register](s.controller)
	g := s.early("p1", "pay")

	if list := s.ask(`{"op":"list"}`); list != `{"ok":true,"containers":[]}` {
		t.Errorf("registered: %s", list)
	}
	s.controller.send(asked.conn, asked.id, &frame.Answer{Allowed: true, Reason: "allowed", Expected: []string{}})

	if answer := <-answered; answer != `{"ok":true}` {
		t.Fatal(answer)
	}
	if welcome := g.welcome(); !welcome.OK {
		t.Errorf("%#v", welcome)
	}
	if list := s.ask(`{"op":"list"}`); list != `{"ok":true,"containers":["p1"]}` {
		t.Errorf("registered: %s", list)
	}
}

func TestAHelloWaitsNoLongerThanItMay(t *testing.T) {
	s := newSite(t)
	s.config.AdmitWaitMS = 50
	s.startConnected()
	begin := time.Now()

	g, welcome := s.hello("p1", "shop", "pay")

	if waited := time.Since(begin); welcome.OK || welcome.Reason != "unregistered" || waited < 50*time.Millisecond {
		t.Errorf("%#v after %v", welcome, waited)
	}
	g.expectClosed()
	s.register("p1", "pay")
	if _, welcome := s.hello("p1", "shop", "pay"); !welcome.OK {
		t.Errorf("the next attempt: %#v", welcome)
	}
}

func TestWithoutAWaitAHelloIsAnsweredAtOnce(t *testing.T) {
	s := newSite(t)
	s.startConnected()

	if _, welcome := s.hello("p1", "shop", "pay"); welcome.OK || strings.Contains(s.log.String(), eventGuardWaits) {
		t.Errorf("%#v", welcome)
	}
}

func TestHellosBeyondTheBoundAreRefusedAtOnce(t *testing.T) {
	s := newSite(t)
	s.config.AdmitWaitMS = admitWaitMSMax
	s.startConnected()
	var held []*fakeGuard
	for i := range waitingMax {
		held = append(held, s.early(fmt.Sprint("p", i), "pay"))
	}

	if _, welcome := s.hello("one more", "shop", "pay"); welcome.OK || welcome.Reason != "unregistered" {
		t.Errorf("%#v", welcome)
	}

	for i, g := range held {
		s.register(fmt.Sprint("p", i), "pay")
		if welcome := g.welcome(); !welcome.OK {
			t.Fatalf("p%d: %#v", i, welcome)
		}
	}
	if g := s.early("another", "pay"); g == nil { // there is room again
		t.Error("no room")
	}
}

func TestAnAgentThatStopsHoldsNobody(t *testing.T) {
	s := newSite(t)
	s.config.AdmitWaitMS = admitWaitMSMax
	s.startConnected()
	g := s.early("p1", "pay")

	if err := s.stop(); err != nil {
		t.Fatal(err)
	}

	if welcome := g.welcome(); welcome.OK {
		t.Errorf("%#v", welcome)
	}
}

func TestTheListTakesNoFields(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	s.register("p2", "pay")
	s.register("p1", "ship")

	if list := s.ask(`{"op":"list"}`); list != `{"ok":true,"containers":["p1","p2"]}` {
		t.Error(list)
	}
	if refused := s.ask(`{"op":"list","app":"shop"}`); !strings.Contains(refused, `"bad_request"`) {
		t.Error(refused)
	}
}
