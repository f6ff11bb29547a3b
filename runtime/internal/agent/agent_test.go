package agent

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

func TestARegisteredGuardIsWelcomed(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	s.register("c1", "pay")

	_, welcome := s.hello("c1", "shop", "pay")

	if !welcome.OK || welcome.Reason != "" || string(welcome.Policy) != string(s.sign(compiled("shop", 1))) {
		t.Errorf("welcome %#v", welcome)
	}
	if welcome.LeaseMS < 50000 || welcome.LeaseMS > 60000 {
		t.Errorf("a lease of %d ms", welcome.LeaseMS)
	}
	if want := map[string][]string{"gateway": {"10.137.0.1"}, "shop.example": {}}; !reflect.DeepEqual(welcome.Names, want) {
		t.Errorf("names %v", welcome.Names)
	}
	if welcome.Port != 8080 || welcome.HealthPath != "/_/health" || !reflect.DeepEqual(welcome.Sources, []string{"10.137.0.1/32"}) {
		t.Errorf("welcome %#v", welcome)
	}
}

func TestAnIdentityThatIsNotTheRegistrationIsRefused(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	s.register("c1", "pay")
	for _, identity := range [][3]string{
		{"c2", "shop", "pay"}, {"c1", "other", "pay"}, {"c1", "shop", "ship"}, {"c1", "shop", ""}, {"", "", ""}, {"c", "shop", "pay"},
	} {
		g, welcome := s.hello(identity[0], identity[1], identity[2])

		if welcome.OK || welcome.Reason != "unregistered" || len(welcome.Policy) != 0 {
			t.Errorf("%v: %#v", identity, welcome)
		}
		g.expectClosed()
	}
}

func TestWhatIsNoHelloEndsTheConnection(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	s.register("c1", "pay")
	for name, m := range map[string]frame.Message{
		"a start":          &frame.Start{Step: step},
		"another protocol": &frame.Hello{Protos: []int{1}, Container: "c1", App: "shop", Function: "pay"},
	} {
		g := s.dialGuard()
		g.send(1, m)

		t.Log(name)
		g.expectClosed()
	}
	g := s.dialGuard()
	if _, err := io.WriteString(g.conn, "GET / HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	g.expectClosed()
}

func TestAQuestionCarriesTheIdentityOfTheRegistration(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	pay, ship := s.guard("c1", "pay"), s.guard("c2", "ship")
	// Both guards use the same id.
	pay.send(9, &frame.Start{Step: step, Token: "t", Label: "l", Version: 1})
	first, start := expect[*frame.Start](s.controller)
	ship.send(9, &frame.Invoke{Step: step, Call: "c", Invocation: "i", Callee: "pay", Version: 1})
	second, invoke := expect[*frame.Invoke](s.controller)

	if want := (frame.Identity{Instance: "c1", App: "shop", Function: "pay"}); start.Identity != want || start.Token != "t" || start.Label != "l" {
		t.Errorf("start %#v", start)
	}
	if want := (frame.Identity{Instance: "c2", App: "shop", Function: "ship"}); invoke.Identity != want || invoke.Callee != "pay" {
		t.Errorf("invoke %#v", invoke)
	}
	if first.id == second.id {
		t.Errorf("both questions have the id %d", first.id)
	}
	// The answers come in the other order.
	s.controller.send(second.conn, second.id, &frame.Answer{Reason: "edge_not_allowed", Expected: []string{"invoke x"}, Detail: "d"})
	s.controller.send(first.conn, first.id, &frame.Answer{Allowed: true, Reason: "allowed", Call: "c", Invocation: "i"})
	if id, answer := pay.answer(); id != 9 || !answer.Allowed || answer.Call != "c" || answer.Invocation != "i" {
		t.Errorf("pay: id %d, %#v", id, answer)
	}
	if id, answer := ship.answer(); id != 9 || answer.Allowed || answer.Reason != "edge_not_allowed" || len(answer.Expected) != 1 {
		t.Errorf("ship: id %d, %#v", id, answer)
	}
}

func TestTheEndCarriesTheIdentityToo(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	g.send(0, &frame.End{Call: "c", Invocation: "i", Outcome: "answered"})

	_, end := expect[*frame.End](s.controller)

	if want := (frame.End{Call: "c", Invocation: "i", Outcome: "answered", Identity: frame.Identity{Instance: "c1", App: "shop", Function: "pay"}}); *end != want {
		t.Errorf("%#v", end)
	}
}

func TestAGuardThatSaysWhoItIsAgainIsClosed(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	other := frame.Identity{Instance: "c2", App: "shop", Function: "ship"}
	for i, m := range []frame.Message{
		&frame.Start{Step: step, Identity: other}, &frame.Invoke{Step: step, Identity: other}, &frame.End{Outcome: "closed", Identity: other},
	} {
		g := s.guard(fmt.Sprint("c", i), "pay")
		id := uint32(7)
		if m.Type() == frame.TypeEnd {
			id = 0
		}
		g.send(id, m)

		g.expectDismissed()
	}
	s.ask(`{"op":"unregister","container":"c0"}`) // behind everything that the guards could have caused
	for {
		r := <-s.controller.received
		switch r.m.(type) {
		case *frame.Start, *frame.Invoke, *frame.End:
			t.Errorf("the controller got %#v", r.m)
		case *frame.Unregister:
			return
		}
	}
}

func TestFramesOfTheOtherDirectionCloseAGuard(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	for i, m := range []frame.Message{
		&frame.Lease{LeaseMS: 1}, &frame.Names{}, &frame.Policy{App: "shop"}, &frame.Unregister{Instance: "c1"},
	} {
		g := s.guard(fmt.Sprint("c", i), "pay")
		g.send(0, m)
		g.expectDismissed()
	}
	for i, m := range []frame.Message{
		&frame.Hello{Protos: frame.Protos(), Container: "d0"}, &frame.Answer{Reason: "allowed"}, &frame.Register{Instance: "x"}, &frame.Status{}, &frame.Welcome{OK: true},
	} {
		g := s.guard(fmt.Sprint("d", i), "pay")
		g.send(3, m)
		g.expectDismissed()
	}
}

func TestASecondQuestionWithAnOpenIDClosesTheGuard(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	g.send(5, &frame.Start{Step: step})
	expect[*frame.Start](s.controller)
	g.send(5, &frame.Start{Step: step})

	g.expectDismissed()
}

func TestQuestionsBeyondTheBoundAreDeniedAtOnce(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	var first received
	for i := range guardQuestionsMax {
		g.send(uint32(i+1), &frame.Start{Step: step})
		if r, _ := expect[*frame.Start](s.controller); i == 0 {
			first = r
		}
	}
	g.send(1000, &frame.Start{Step: step})
	if id, answer := g.answer(); id != 1000 || answer.Allowed || answer.Reason != "held_too_long" {
		t.Errorf("id %d, %#v", id, answer)
	}
	// An answer makes room for one.
	s.controller.send(first.conn, first.id, &frame.Answer{Reason: "unknown_call", Expected: []string{}})
	if id, _ := g.answer(); id != 1 {
		t.Errorf("id %d", id)
	}
	g.send(1001, &frame.Start{Step: step})
	expect[*frame.Start](s.controller)
}

func TestWithoutAControllerQuestionsAreDeniedAtOnce(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	g.send(1, &frame.Start{Step: step})
	expect[*frame.Start](s.controller)

	s.controller.stop()

	// The open one, and one that is asked while the controller is away.
	if id, answer := g.answer(); id != 1 || answer.Allowed || answer.Reason != "controller_unavailable" {
		t.Errorf("id %d, %#v", id, answer)
	}
	g.send(2, &frame.Invoke{Step: step})
	if id, answer := g.answer(); id != 2 || answer.Allowed || answer.Reason != "controller_unavailable" {
		t.Errorf("id %d, %#v", id, answer)
	}
	g.send(0, &frame.End{Outcome: "closed"}) // is dropped and does no harm
	if answer := s.ask(registerLine("c2", "shop", "pay")); !strings.Contains(answer, `"error":"controller_unavailable"`) {
		t.Errorf("registering without a controller: %s", answer)
	}
}

func TestAControllerThatReturnsLearnsTheInstancesAgain(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	s.register("c2", "ship")
	s.register("gone", "ship")
	s.controller.stop()
	s.until("the agent has noticed", func() bool { return strings.Contains(s.ask(`{"op":"status"}`), `"controller":false`) })
	if answer := s.ask(`{"op":"unregister","container":"gone"}`); answer != `{"ok":true}` {
		t.Errorf("unregistering without a controller: %s", answer)
	}
	for len(s.controller.received) > 0 {
		<-s.controller.received
	}

	s.controller.start()

	again := map[string]string{}
	for range 2 {
		_, r := expect[*frame.Register](s.controller)
		again[r.Instance] = r.Function
	}
	if want := map[string]string{"c1": "pay", "c2": "ship"}; !reflect.DeepEqual(again, want) {
		t.Errorf("registered again: %v", again)
	}
	// The guard's connection has lived through it, and its lease was renewed.
	s.untilConnected()
	g.send(3, &frame.Start{Step: step})
	r, start := expect[*frame.Start](s.controller)
	if start.Identity.Instance != "c1" {
		t.Errorf("%#v", start)
	}
	s.controller.send(r.conn, r.id, &frame.Answer{Allowed: true, Reason: "allowed", Expected: []string{}})
	if id, answer := g.answer(); id != 3 || !answer.Allowed {
		t.Errorf("id %d, %#v", id, answer)
	}
}

func TestAControllersMistakeEndsItsConnectionOnly(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	for name, send := range map[string]func(net.Conn){
		"an answer to nothing":           func(c net.Conn) { s.controller.send(c, 999, &frame.Answer{Reason: "bad_token"}) },
		"a frame of the other direction": func(c net.Conn) { s.controller.send(c, 1, &frame.Start{Step: step}) },
		"no frame":                       func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 400\r\n") },
		"an answer that contradicts itself": func(c net.Conn) {
			g.send(77, &frame.Start{Step: step})
			r, _ := expect[*frame.Start](s.controller)
			s.controller.send(c, r.id, &frame.Answer{Allowed: true, Reason: "bad_token"})
			if _, answer := g.answer(); answer.Allowed {
				t.Error("the guard got an answer that allows")
			}
		},
	} {
		s.controller.mu.Lock()
		conn := s.controller.conns[len(s.controller.conns)-1]
		s.controller.mu.Unlock()
		for len(s.controller.received) > 0 {
			<-s.controller.received
		}
		send(conn)
		t.Log(name)
		expect[*frame.AgentHello](s.controller) // it connects again
		s.untilConnected()
	}
	g.send(5, &frame.Start{Step: step})
	expect[*frame.Start](s.controller)
}

func TestALeaseIsForwardedAndBounded(t *testing.T) {
	s := newSite(t)
	s.config.LeaseMS = 5000
	s.startConnected()
	g := s.guard("c1", "pay")
	for granted, want := range map[int]int{1234: 1234, 60000: 5000} {
		s.controller.push(&frame.Lease{LeaseMS: granted})
		for {
			if _, m := g.receive(); m.Type() == frame.TypeLease {
				if lease := m.(*frame.Lease); lease.LeaseMS != want {
					t.Errorf("granted %d, forwarded %d", granted, lease.LeaseMS)
				}
				break
			}
		}
	}
}

func TestAGuardThatComesLateGetsWhatIsLeftOfTheLease(t *testing.T) {
	s := newSite(t)
	s.controller.leaseMS = 0
	s.startConnected()
	s.register("c1", "pay")

	_, welcome := s.hello("c1", "shop", "pay")

	if !welcome.OK || welcome.LeaseMS != 0 {
		t.Errorf("%#v", welcome)
	}
}

// policyVersion asks which version is in force.
func (s *site) policyVersion(app string) int {
	s.t.Helper()
	var status struct{ Policies map[string]int }
	if err := json.Unmarshal([]byte(s.ask(`{"op":"status"}`)), &status); err != nil {
		s.t.Fatal(err)
	}
	return status.Policies[app]
}

func TestANewVersionReachesTheGuardsOfItsApp(t *testing.T) {
	s := newSite(t)
	s.config.Names["new.example"] = []string{"10.1.1.1"}
	s.controller.offer("market", s.sign(compiled("market", 1)))
	s.startConnected()
	g := s.guard("c1", "pay")
	if answer := s.ask(registerLine("c2", "market", "pay")); answer != `{"ok":true}` {
		t.Fatal(answer)
	}
	other, _ := s.hello("c2", "market", "pay")
	next := s.sign(compiledWith("shop", 2, "new.example"))

	s.controller.push(&frame.Policy{App: "shop", Policy: next})

	_, names := g.receive()
	if want := map[string][]string{"gateway": {"10.137.0.1"}, "new.example": {"10.1.1.1"}}; !reflect.DeepEqual(names, &frame.Names{Names: want}) {
		t.Errorf("before the policy: %#v", names)
	}
	if _, m := g.receive(); !reflect.DeepEqual(m, &frame.Policy{App: "shop", Policy: next}) {
		t.Errorf("the policy: %#v", m)
	}
	s.controller.push(&frame.Lease{LeaseMS: 7})
	if _, m := other.receive(); m.Type() != frame.TypeLease {
		t.Errorf("a guard of another app got %#v", m)
	}
}

func TestABadPolicyIsRefusedAndTheLastGoodOneStays(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	_, stranger, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := s.sign(compiled("shop", 5))
	s.controller.push(&frame.Policy{App: "shop", Policy: good})
	s.until("version 5 is in force", func() bool { return s.policyVersion("shop") == 5 })
	for name, c := range map[string]struct {
		app      string
		envelope []byte
	}{
		"an older version":               {"shop", s.sign(compiled("shop", 4))},
		"the version with other content": {"shop", s.sign(compiledWith("shop", 5, "evil.example"))},
		"another key":                    {"shop", signWith(stranger, compiled("shop", 6))},
		"a policy of another app":        {"shop", s.sign(compiled("market", 6))},
		"no envelope":                    {"shop", []byte("{}")},
		"an unsigned policy":             {"shop", compiled("shop", 6)},
		"a changed policy":               {"shop", []byte(strings.Replace(string(s.sign(compiled("shop", 6))), `"policy":"e`, `"policy":"f`, 1))},
		"a policy that does not parse":   {"shop", s.sign([]byte(`{"format":"kalium-compiled/v3"}`))},
		"a truncated policy":             {"shop", s.sign(compiled("shop", 6))[:200]},
		"a policy of 100,000 states":     {"shop", s.sign([]byte(strings.ReplaceAll(string(compiled("shop", 6)), `"states":1`, `"states":100000`)))},
	} {
		before := strings.Count(s.log.String(), eventPolicyRefused)
		s.controller.push(&frame.Policy{App: c.app, Policy: c.envelope})

		s.until(name+" is refused", func() bool { return strings.Count(s.log.String(), eventPolicyRefused) == before+1 })
		if got := s.policyVersion("shop"); got != 5 {
			t.Errorf("after %s version %d is in force", name, got)
		}
	}
	if got := s.policyVersion("market"); got != 0 {
		t.Errorf("version %d of another app came into force", got)
	}
	// The guard has seen nothing but version 5.
	s.controller.push(&frame.Lease{LeaseMS: 7})
	for {
		_, m := g.receive()
		if p, ok := m.(*frame.Policy); ok && string(p.Policy) != string(good) {
			t.Errorf("the guard got %s", p.Policy)
		}
		if m.Type() == frame.TypeLease {
			break
		}
	}
}

func TestTheHighestVersionOutlivesARestart(t *testing.T) {
	s := newSite(t)
	s.controller.offer("shop", s.sign(compiled("shop", 3)))
	s.controller.start()
	s.start()
	s.until("version 3 is in force", func() bool { return s.policyVersion("shop") == 3 })
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	s.controller.offer("shop", s.sign(compiled("shop", 2)))

	s.start()
	s.untilConnected()

	if got := s.policyVersion("shop"); got != 0 {
		t.Errorf("version %d came into force", got)
	}
	if answer := s.ask(registerLine("c1", "shop", "pay")); !strings.Contains(answer, `"error":"unknown_app"`) {
		t.Errorf("an app without a policy: %s", answer)
	}
	s.controller.push(&frame.Policy{App: "shop", Policy: s.sign(compiled("shop", 3))})
	s.until("version 3 is in force again", func() bool { return s.policyVersion("shop") == 3 })
}

func TestARegistrationIsRefusedForAReason(t *testing.T) {
	s := newSite(t)
	s.controller.refuse["ship"] = "unknown_function"
	s.startConnected()
	s.register("c1", "pay")
	for line, want := range map[string]string{
		registerLine("c2", "market", "pay"):                                `"error":"unknown_app"`,
		registerLine("c2", "shop", "steal"):                                `"error":"unknown_function"`,
		registerLine("c2", "shop", "ship"):                                 `"error":"unknown_function"`, // by the controller
		registerLine("c1", "shop", "ship"):                                 `"error":"already_registered"`,
		registerLine("", "shop", "pay"):                                    `"error":"bad_request"`,
		registerLine(strings.Repeat("c", 254), "shop", "pay"):              `"error":"bad_request"`,
		registerLine("c\x01", "shop", "pay"):                               `"error":"bad_request"`,
		`{"op":"register","container":"c2","app":"shop","function":"pay"}`: `"error":"bad_request"`,
		`{"op":"register","container":"c2","uid":0}`:                       `"error":"bad_request"`,
		`{"op":"unregister"}`:                                              `"error":"bad_request"`,
		`{"op":"unregister","container":"c1","app":"shop"}`:                `"error":"bad_request"`,
		`{"op":"status","container":"c1"}`:                                 `"error":"bad_request"`,
		`{"op":"stop"}`:                                                    `"error":"bad_request"`,
		`{"op":"status"} {"op":"status"}`:                                  `"error":"bad_request"`,
		`[]`:                                                               `"error":"bad_request"`,
		``:                                                                 `"error":"bad_request"`,
	} {
		if answer := s.ask(line); !strings.Contains(answer, `{"ok":false`) || !strings.Contains(answer, want) {
			t.Errorf("%s: %s", line, answer)
		}
	}
	if answer := s.ask(registerLine("c1", "shop", "pay")); answer != `{"ok":true}` {
		t.Errorf("the same registration again: %s", answer)
	}
	if answer := s.ask(`{"op":"status"}`); !strings.Contains(answer, `"policies":{"shop":1},"instances":[{"container":"c1","app":"shop","function":"pay","mode":"none","version":0}]}`) {
		t.Errorf("status: %s", answer)
	}
}

func TestBeforeTheFirstConnectionARegistrationMayBeTriedAgain(t *testing.T) {
	s := newSite(t)
	s.start()

	answer := s.ask(registerLine("c1", "shop", "pay"))

	if !strings.Contains(answer, `"error":"controller_unavailable"`) {
		t.Errorf("%s", answer)
	}
}

func TestARegistrationThatTheControllerDropsIsRefused(t *testing.T) {
	s := newSite(t)
	s.controller.silent = true
	s.startConnected()
	answer := make(chan string, 1)
	go func() { answer <- s.ask(registerLine("c1", "shop", "pay")) }()
	expect[*frame.Register](s.controller)
	// Until the controller has acknowledged it, no guard is welcomed and no second registration is taken.
	if _, welcome := s.hello("c1", "shop", "pay"); welcome.OK || welcome.Reason != "unregistered" {
		t.Errorf("%#v", welcome)
	}
	if again := s.ask(registerLine("c1", "shop", "pay")); !strings.Contains(again, `"error":"already_registered"`) {
		t.Errorf("a second registration: %s", again)
	}

	s.controller.stop()

	if got := <-answer; !strings.Contains(got, `"error":"controller_unavailable"`) {
		t.Errorf("the registration: %s", got)
	}
	if got := s.ask(`{"op":"status"}`); !strings.Contains(got, `"instances":[]`) {
		t.Errorf("status: %s", got)
	}
}

func TestUnregisteringDropsTheGuard(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")

	answer := s.ask(`{"op":"unregister","container":"c1"}`)

	if _, m := expect[*frame.Unregister](s.controller); answer != `{"ok":true}` || m.Instance != "c1" {
		t.Errorf("%s, %#v", answer, m)
	}
	g.expectClosed()
	if _, welcome := s.hello("c1", "shop", "pay"); welcome.OK {
		t.Error("a guard of an instance that is gone is welcomed")
	}
	if answer := s.ask(`{"op":"unregister","container":"c1"}`); answer != `{"ok":true}` {
		t.Errorf("a second time: %s", answer)
	}
}

func TestALineBeyondTheBoundClosesTheRegisterSocket(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	conn, err := net.Dial("unix", s.config.RegisterSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, strings.Repeat("x", registerLineMax+1)) // the agent may close before all is written
	_ = conn.SetReadDeadline(time.Now().Add(patience))

	if n, err := conn.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestOnlyTheOwnersProcessesAreServed(t *testing.T) {
	s := newSite(t)
	s.config.peerUID++
	s.start()
	for _, path := range []string{s.config.GuardSocket, s.config.RegisterSocket} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if n, err := conn.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
			t.Errorf("%s serves a process of uid %d: %d bytes, %v", path, os.Getuid(), n, err)
		}
	}
}

func TestASecondAgentDoesNotTakeTheSockets(t *testing.T) {
	s := newSite(t)
	s.start()

	err := run(t.Context(), s.config, newLogger(s.log), s.reopen, s.resolve)

	if err == nil || !strings.Contains(err.Error(), "error[agent.socket]") || !strings.Contains(err.Error(), "another agent answers") {
		t.Errorf("a second agent: %v", err)
	}
	if answer := s.ask(`{"op":"status"}`); !strings.Contains(answer, `"ok":true`) {
		t.Errorf("the first agent: %s", answer)
	}
}

func TestASocketOfAKilledAgentIsReplaced(t *testing.T) {
	s := newSite(t)
	for _, path := range []string{s.config.GuardSocket, s.config.RegisterSocket} {
		listener := must(net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}))
		listener.SetUnlinkOnClose(false)
		if err := listener.Close(); err != nil {
			t.Fatal(err)
		}
	}

	s.start()

	s.until("it answers", func() bool { return strings.Contains(s.ask(`{"op":"status"}`), `"ok":true`) })
}

func TestAControllerThatCannotProveItsNameIsRefused(t *testing.T) {
	for name, change := range map[string]func(*site){
		"another authority": func(s *site) {
			cert, key := newAuthority(s.t).issue(roleController, "controller")
			s.controller.tls.Certificates = []tls.Certificate{must(tls.X509KeyPair(cert, key))}
		},
		"another name": func(s *site) {
			cert, key := s.ca.issue(roleController, "another")
			s.controller.tls.Certificates = []tls.Certificate{must(tls.X509KeyPair(cert, key))}
		},
		"TLS 1.2": func(s *site) { s.controller.tls.MaxVersion = tls.VersionTLS12 },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			change(s)
			s.controller.start()
			s.start()

			s.until("the agent says why", func() bool { return strings.Contains(s.log.String(), eventControllerAway) })
			if answer := s.ask(`{"op":"status"}`); !strings.Contains(answer, `"controller":false`) {
				t.Errorf("status: %s", answer)
			}
			if len(s.controller.received) != 0 {
				t.Error("the agent spoke to it")
			}
		})
	}
}

func TestAnAgentWithoutACertificateOfOursIsNotServedAndRetries(t *testing.T) {
	s := newSite(t)
	cert, key := newAuthority(t).issue(roleAgent, "node-0")
	s.write("agent.crt", cert)
	s.write("agent.key", key)
	s.controller.offer("shop", s.sign(compiled("shop", 1)))
	s.controller.start()
	s.start()
	s.until("it is refused", func() bool { return strings.Contains(s.log.String(), eventControllerAway) })

	// The certificate is replaced without a restart.
	cert, key = s.ca.issue(roleAgent, "node-0")
	s.write("agent.key", key)
	s.write("agent.crt", cert)

	s.untilConnected()
}

func TestAGuardThatDoesNotReadHoldsUpNobody(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	stuck, live := s.guard("c1", "pay"), s.guard("c2", "pay")
	large := func(version int) []byte {
		text := compiled("shop", version)
		return append(text, bytes.Repeat([]byte(" "), 700*1024-len(text))...)
	}
	const versions = 14 // about 12 MB in all
	for version := 2; version <= versions; version++ {
		s.controller.push(&frame.Policy{App: "shop", Policy: s.sign(large(version))})
		// Only when it has read this one comes the next: a guard that reads, but not as fast as they come, would be given up too.
		for got := frame.Type(0); got != frame.TypePolicy; {
			_, m := live.receive()
			got = m.Type()
		}
	}

	stuck.expectClosed()
}
