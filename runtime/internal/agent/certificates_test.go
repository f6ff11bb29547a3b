package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

func TestOnlyAControllersCertificateIsAController(t *testing.T) {
	for name, c := range map[string]struct{ role, who, text string }{
		"an agent's":  {roleAgent, "controller", "kalium://agent/controller"},
		"a client's":  {"client", "controller", "kalium://client/controller"},
		"no name":     {roleController, "", "kalium://controller/"},
		"a server's":  {"", "controller", "its URIs are"},
		"a like name": {"controllers", "controller", "kalium://controllers/controller"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			cert, key := s.ca.issueFor(c.role, c.who, "controller", time.Now().Add(time.Hour))
			s.controller.tls.Certificates = []tls.Certificate{must(tls.X509KeyPair(cert, key))}
			s.controller.start()
			s.start()

			s.until("the agent says why", func() bool {
				return strings.Contains(s.log.String(), errRole.Error()) && strings.Contains(s.log.String(), c.text)
			})
			if len(s.controller.received) != 0 {
				t.Error("the agent spoke to it")
			}
		})
	}
}

func TestAnOwnCertificateThatWouldBeRefusedIsNotShown(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*site)
		text   string
	}{
		"of another node": {func(s *site) { s.pair(s.ca.issue(roleAgent, "node-1")) }, "kalium://agent/node-1"},
		"of a controller": {func(s *site) { s.pair(s.ca.issue(roleController, "node-0")) }, "kalium://controller/node-0"},
		"expired":         {func(s *site) { s.pair(s.ca.issueUntil(roleAgent, "node-0", time.Now().Add(-time.Minute))) }, "expired"},
		"of another CA":   {func(s *site) { s.pair(newAuthority(s.t).issue(roleAgent, "node-0")) }, "unknown authority"},
		"without its key": {func(s *site) { cert, _ := s.ca.issue(roleAgent, "node-0"); s.write("agent.crt", cert) }, "private key does not match"},
		"no CA":           {func(s *site) { s.write("ca.crt", []byte("x")) }, "holds no certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			c.change(s)
			s.controller.start()
			s.start()

			s.until("the agent says why", func() bool { return strings.Contains(s.log.String(), c.text) })
			s.controller.mu.Lock()
			defer s.controller.mu.Unlock()
			if len(s.controller.conns) != 0 {
				t.Error("the agent has connected")
			}
		})
	}
}

// The file of the CA holds two of the same name: every pair is of the one or the other until it has been issued anew.
func TestWhileASiteChangesItsCABothAreTrusted(t *testing.T) {
	for name, c := range map[string]struct{ ownIsNew, theirsIsNew bool }{
		"neither pair is new": {}, "the agent's is": {ownIsNew: true}, "the controller's is": {theirsIsNew: true}, "both are": {true, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			next := newAuthority(t)
			s.write("ca.crt", append(s.ca.pem(), next.pem()...))
			s.controller.tls.ClientCAs.AddCert(next.cert)
			if c.ownIsNew {
				s.pair(next.issue(roleAgent, "node-0"))
			}
			if c.theirsIsNew {
				cert, key := next.issue(roleController, "controller")
				s.controller.tls.Certificates = []tls.Certificate{must(tls.X509KeyPair(cert, key))}
			}

			s.controller.start()
			s.start()

			s.until("they are connected", func() bool { return strings.Contains(s.log.String(), eventControllerUp) })
		})
	}
}

func (s *site) pair(cert, key []byte) {
	s.write("agent.key", key)
	s.write("agent.crt", cert)
}

func TestAPlainListenerIsRefused(t *testing.T) {
	s := newSite(t)
	listener := must(net.Listen("tcp", s.controller.address))
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write(must(frame.Append(nil, 1, &frame.ControllerWelcome{OK: true, Proto: 2, LeaseMS: 60000})))
			_, _ = io.Copy(io.Discard, conn)
		}
	}()

	s.start()

	s.until("the agent says why", func() bool { return strings.Contains(s.log.String(), "does not look like a TLS handshake") })
}

// quiet are hooks of a link that nobody needs.
type quiet struct{ welcomes chan *linkConn }

func (q *quiet) welcomed(c *linkConn, _ *frame.ControllerWelcome) {}
func (q *quiet) opened(c *linkConn)                               { q.welcomes <- c }
func (q *quiet) policyArrived(string, []byte)                     {}
func (q *quiet) leaseArrived(int)                                 {}

// link runs a link of the site's configuration, without the rest of an agent.
func (s *site) link(change func(*link)) (*link, *quiet) {
	s.t.Helper()
	hooks := &quiet{welcomes: make(chan *linkConn, 100)}
	l := newLink(s.config, newRun(), hooks, &metrics{}, newLogger(s.log))
	change(l)
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); l.run(ctx) }()
	s.t.Cleanup(func() { cancel(); <-ended })
	return l, hooks
}

func (q *quiet) next(t *testing.T) *linkConn {
	t.Helper()
	select {
	case c := <-q.welcomes:
		return c
	case <-time.After(patience):
		t.Fatal("no connection")
		return nil
	}
}

func TestAConnectionIsMadeAnewBeforeItsCertificateExpires(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.pair(s.ca.issueUntil(roleAgent, "node-0", time.Now().Add(redialBefore/2)))
	s.controller.start()
	l, hooks := s.link(func(l *link) { l.redialEvery = 300 * time.Millisecond })
	old := hooks.next(t)
	answered := make(chan *frame.Answer, 1)
	start := &frame.Start{Step: step, Version: 1, Identity: frame.Identity{Instance: "c1", App: "shop", Function: "pay"}}
	if refused := l.ask(stepOf(start, answered)); refused != "" {
		t.Fatal(refused)
	}
	first, _ := expect[*frame.Start](s.controller)

	s.pair(s.ca.issueUntil(roleAgent, "node-0", time.Now().Add(time.Hour)))

	for now := old; !now.expires.After(time.Now().Add(redialBefore)); {
		now = hooks.next(t)
	}
	// There is no further connection after it, and there may be one between it and the first.
	var newest net.Conn
	s.controller.with(func() { newest = s.controller.conns[len(s.controller.conns)-1] })
	var last received
	for last.conn != newest {
		r, m := expect[*frame.Start](s.controller)
		if m.Step != step || r.conn == first.conn {
			t.Fatalf("%#v", m)
		}
		last = r
	}
	s.controller.send(last.conn, last.id, &frame.Answer{Allowed: true, Reason: "allowed", Invocation: "i"})
	if answer := <-answered; answer == nil || !answer.Allowed {
		t.Errorf("the question that was open has the answer %#v", answer)
	}
	if strings.Contains(s.log.String(), eventControllerLost) {
		t.Error("a connection was lost")
	}
}

func stepOf(m frame.Message, answered chan<- *frame.Answer) *question {
	return &question{m: m, max: stepQuestionsMax, again: true, done: func(answer *frame.Answer) { answered <- answer }}
}

func TestAConnectionDoesNotOutliveItsCertificate(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.pair(s.ca.issueUntil(roleAgent, "node-0", time.Now().Add(5*time.Second))) // until then it has to be connected
	s.controller.start()
	_, hooks := s.link(func(l *link) { l.redialEvery = time.Hour }) // no successor takes its place before
	c := hooks.next(t)

	s.until("it is closed", func() bool { return c.sender.reason() != nil })

	if !errors.Is(c.sender.reason(), errExpired) || time.Now().Before(c.expires) {
		t.Errorf("%v", c.sender.reason())
	}
	s.until("the next attempt says why", func() bool { return strings.Contains(s.log.String(), "certificate has expired or is not yet valid") })
}

func TestASuccessorThatCannotBeMadeChangesNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.pair(s.ca.issueUntil(roleAgent, "node-0", time.Now().Add(redialBefore/2)))
	s.controller.start()
	l, hooks := s.link(func(l *link) { l.redialEvery = 30 * time.Millisecond })
	c := hooks.next(t)
	s.pair(newAuthority(t).issue(roleAgent, "node-0"))

	s.until("it was tried", func() bool { return strings.Count(s.log.String(), eventRedialFailed) > 2 })

	for len(hooks.welcomes) > 0 {
		c = <-hooks.welcomes // made before the pair was changed
	}
	if l.current() != c || c.sender.reason() != nil {
		t.Errorf("the connection has ended: %v", c.sender.reason())
	}
}

// slow are hooks that take their time for a policy.
type slow struct {
	quiet
	took chan struct{}
}

func (q *slow) policyArrived(string, []byte) {
	time.Sleep(2500 * time.Millisecond) // the work of a policy: longer than the silence that the test allows
	close(q.took)
}

func TestWhoIsBusyWithWhatItHeardDoesNotCallItSilence(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.controller.start()
	hooks := &slow{quiet: quiet{welcomes: make(chan *linkConn, 100)}, took: make(chan struct{})}
	l := newLink(s.config, newRun(), hooks, &metrics{}, newLogger(s.log))
	l.silence = 2 * time.Second
	go l.run(t.Context())
	c := hooks.next(t)

	s.controller.push(&frame.Policy{App: "shop", Policy: []byte("large")})
	<-hooks.took
	s.controller.push(&frame.Lease{LeaseMS: 1})

	if reason := c.sender.reason(); reason != nil {
		t.Errorf("the connection has ended: %v", reason)
	}
}

func TestASilentControllerIsPingedAndGivenUp(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.controller.mute = true
	s.controller.start()
	begin := time.Now()
	_, hooks := s.link(func(l *link) { l.silence = silenceAmongOthers })
	c := hooks.next(t)

	s.until("it is given up", func() bool { return c.sender.reason() != nil })

	if took := time.Since(begin); !errors.Is(c.sender.reason(), errSilent) || took < silenceAmongOthers {
		t.Errorf("%v after %v", c.sender.reason(), took)
	}
	s.controller.with(func() { s.controller.mute = false })
	c = hooks.next(t)
	for range 4 { // pings that are answered keep it
		s.controller.mu.Lock()
		before := s.controller.pings
		s.controller.mu.Unlock()
		s.until("it is pinged", func() bool {
			s.controller.mu.Lock()
			defer s.controller.mu.Unlock()
			return s.controller.pings > before
		})
	}
	if reason := c.sender.reason(); reason != nil {
		t.Errorf("the connection has ended: %v", reason)
	}
}
