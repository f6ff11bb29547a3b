package guard

import (
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

func accept(t *testing.T, g *Guard) *Incoming {
	t.Helper()
	in, outcome := g.Accept(8080, client)
	if outcome == Denied {
		t.Fatal("the connection was not accepted")
	}
	return in
}

func released(t *testing.T, a Admission) {
	t.Helper()
	if a.Release == nil {
		t.Fatalf("not released: %+v", a)
	}
}

func refusedWith(t *testing.T, a Admission, status, reason string) {
	t.Helper()
	text := string(a.Refusal)
	if !strings.HasPrefix(text, "HTTP/1.1 "+status+" ") || !strings.Contains(text, `{"error":"`+reason+`"`) || !strings.Contains(text, "Connection: close\r\n") {
		t.Errorf("refusal %q, want %s %s", text, status, reason)
	}
}

func answer(t *testing.T, in *Incoming, b string, want int, wantOutcome Outcome) {
	t.Helper()
	if n, outcome := in.Answer([]byte(b)); n != want || outcome != wantOutcome {
		t.Fatalf("answering %q: %d bytes and outcome %d, want %d and %d", b, n, outcome, want, wantOutcome)
	}
}

func TestOnlyDeclaredSourcesReachTheDeclaredPort(t *testing.T) {
	g, c := newGuard(t, "enforce")
	for _, try := range []struct {
		port uint16
		from string
	}{{8081, "10.137.0.1:5"}, {8080, "10.137.0.2:5"}, {8080, "[::1]:5"}} {
		if _, outcome := g.Accept(try.port, netip.MustParseAddrPort(try.from)); outcome != Denied {
			t.Errorf("%v was accepted", try)
		}
		if r := c.Last(t); r.Kind != "incoming" || r.Reason != "incoming_not_declared" {
			t.Errorf("verdict %+v", r)
		}
	}
	if _, outcome := g.Accept(8080, netip.MustParseAddrPort("[::ffff:10.137.0.1]:5")); outcome != Allowed {
		t.Error("the mapped form of a source was not accepted")
	}
}

func TestAGrantedRequestIsReleasedWithoutTheToken(t *testing.T) {
	g, c := newGuard(t, "enforce")
	in := accept(t, g)

	a := in.Admit([]byte("POST /x HTTP/1.1\r\nHost: f\r\nX-Kalium-Token: "+guardtest.Token+"\r\nX-Call-Id: l1\r\nX-Forwarded-For: 1\r\nContent-Length: 2\r\n\r\n{}"), nil)

	if string(a.Release) != "POST /x HTTP/1.1\r\nHost: f\r\nX-Call-Id: l1\r\nX-Forwarded-For: 1\r\nContent-Length: 2\r\n\r\n" {
		t.Errorf("released %q", a.Release)
	}
	if n, done, err := a.Body.Feed([]byte("{}")); n != 2 || !done || err != nil {
		t.Errorf("body: %d %t %v", n, done, err)
	}
	if c.Started()[0].Token != guardtest.Token || c.Started()[0].Label != "l1" || c.Started()[0].Version != 3 {
		t.Errorf("asked %+v", c.Started()[0])
	}
	if r := c.Last(t); r.Kind != "start" || r.Message != "start buyer" || !r.Allowed || r.Call != guardtest.Call || r.Invocation != guardtest.Invocation {
		t.Errorf("verdict %+v", r)
	}
}

func TestARefusedStartIsAnsweredByTheGuard(t *testing.T) {
	for reason, status := range map[string]string{
		"not_an_entry": "403", "bad_token": "403", "unregistered": "403", "policy_mismatch": "403", "lease_expired": "503", "reentrant": "503",
	} {
		g, c := newGuard(t, "enforce")
		c.OnStart = func(*frame.Start) (*frame.Answer, error) {
			return &frame.Answer{Reason: reason, Detail: "because"}, nil
		}

		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), status, reason)

		if r := c.Last(t); r.Allowed || r.Reason != reason || r.Kind != "start" {
			t.Errorf("verdict %+v", r)
		}
		if g.live != nil {
			t.Error("there is an invocation")
		}
	}
}

func TestWithoutTheControllerNoInvocationBegins(t *testing.T) {
	g, c := newGuard(t, "enforce")
	c.OnStart = func(*frame.Start) (*frame.Answer, error) { return nil, errNoAnswer }
	in := accept(t, g)
	refusedWith(t, in.Admit([]byte(postRequest), nil), "503", "controller_unavailable")
	c.OnStart = guardtest.GrantStart

	released(t, accept(t, g).Admit([]byte(postRequest), nil))
}

func TestTwoTokensAreNoToken(t *testing.T) {
	g, c := newGuard(t, "enforce")

	a := accept(t, g).Admit([]byte("POST / HTTP/1.1\r\nHost: f\r\nX-Kalium-Token: a\r\nx-kalium-token: b\r\n\r\n"), nil)

	refusedWith(t, a, "403", "bad_token")
	if len(c.Started()) != 0 {
		t.Error("the controller was asked")
	}
}

func TestAProbePassesWithoutAnInvocationInEveryMode(t *testing.T) {
	for _, mode := range []string{"enforce", "audit", "learn"} {
		g, c := newGuard(t, mode)
		in := accept(t, g)

		released(t, in.Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"), nil))

		if len(c.Started()) != 0 || g.live != nil {
			t.Error("a probe began an invocation")
		}
		answer(t, in, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 40, Allowed)
	}
}

// The gateway passes any path on to a function, so a client could otherwise speak to one that is no entry.
func TestARequestThatWasPassedOnIsNoProbe(t *testing.T) {
	for _, field := range []string{"X-Call-Id: 1", "x-forwarded-for: 10.0.0.1", "X-Forwarded-Host: gateway", "Forwarded: for=10.0.0.1", "X-Start-Time: 1"} {
		g, c := newGuard(t, "enforce")

		released(t, accept(t, g).Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n"+field+"\r\n\r\n"), nil))

		if len(c.Started()) != 1 {
			t.Errorf("with %q it was taken for a probe", field)
		}
	}
}

func TestAnAnswerToAProbeIsShort(t *testing.T) {
	g, _ := newGuard(t, "enforce")
	in := accept(t, g)
	released(t, in.Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"), nil))
	head := "HTTP/1.0 200 OK\r\n\r\n"

	answer(t, in, head+strings.Repeat("x", probeAnswerMax), len(head)+probeAnswerMax, Allowed)
	answer(t, in, "x", 0, Denied)

	in = accept(t, g)
	released(t, in.Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"), nil))
	if _, outcome := in.Answer([]byte("HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n")); outcome != Denied {
		t.Error("interim answers have no end")
	}
}

func TestAConnectionWhoseAnswersEndedAsksForNoFurtherStart(t *testing.T) {
	_, c, in := invoked(t, "enforce")
	in.Close(false)

	if a := in.Admit([]byte(postRequest), nil); !a.Gone {
		t.Errorf("admitted: %+v", a)
	}

	if n := len(c.Started()); n != 1 {
		t.Errorf("%d starts", n)
	}
}

func TestARequestWithABodyIsNoProbe(t *testing.T) {
	for _, m := range []string{
		"GET /_/health HTTP/1.1\r\nHost: f\r\nContent-Length: 1\r\n\r\n",
		"GET /_/health?x=1 HTTP/1.1\r\nHost: f\r\n\r\n",
		"POST /_/health HTTP/1.1\r\nHost: f\r\n\r\n",
	} {
		g, c := newGuard(t, "enforce")

		released(t, accept(t, g).Admit([]byte(m), nil))

		if len(c.Started()) != 1 {
			t.Errorf("%q was taken for a probe", m)
		}
	}
}

func TestAProbeIsAnsweredWhileAnInvocationRuns(t *testing.T) {
	g, _, _ := invoked(t, "enforce")

	released(t, accept(t, g).Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"), nil))
}

func TestTheCompleteAnswerEndsTheInvocation(t *testing.T) {
	for name, whole := range map[string]string{
		"length":  "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
		"chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"interim": "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
		"204":     "HTTP/1.1 204 No Content\r\n\r\n",
		"old":     "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx",
	} {
		for _, size := range []int{1, 7, len(whole)} {
			g, c, in := invoked(t, "enforce")
			for at := 0; at < len(whole); at += size {
				part := whole[at:min(at+size, len(whole))]
				if len(c.Ended()) != 0 {
					t.Fatalf("%s: the invocation ended before byte %d", name, at)
				}
				answer(t, in, part, len(part), Allowed)
			}
			if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "answered" || ends[0].Invocation != guardtest.Invocation || g.live != nil {
				t.Errorf("%s in pieces of %d: ends %+v", name, size, ends)
			}
		}
	}
}

func TestBytesBehindTheAnswerAreDenied(t *testing.T) {
	_, c, in := invoked(t, "enforce")

	answer(t, in, "HTTP/1.1 204 No Content\r\n\r\nmore", 27, Denied)

	if r := c.Last(t); r.Kind != "incoming" || r.Reason != "malformed" {
		t.Errorf("verdict %+v", r)
	}
	answer(t, in, "more", 0, Denied)
}

func TestAnAnswerThatIsNoneIsDenied(t *testing.T) {
	_, _, in := invoked(t, "enforce")

	if _, outcome := in.Answer([]byte("\x16\x03\x01")); outcome != Denied {
		t.Errorf("outcome %d", outcome)
	}
}

func TestTheEndOfTheConnectionEndsAnAnswerWithoutALength(t *testing.T) {
	_, c, in := invoked(t, "enforce")
	m := "HTTP/1.0 200 OK\r\n\r\nbody"
	answer(t, in, m, len(m), Allowed)
	if len(c.Ended()) != 0 {
		t.Fatal("the invocation ended too early")
	}

	in.Close(false)

	if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "answered" {
		t.Errorf("ends %+v", ends)
	}
}

func TestAConnectionThatClosesWithoutAnAnswerEndsTheInvocation(t *testing.T) {
	g, c, in := invoked(t, "enforce")

	in.Close(false)

	if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "closed" || g.live != nil {
		t.Errorf("ends %+v", ends)
	}
	released(t, accept(t, g).Admit([]byte(postRequest), nil))
}

func TestALostPeerEndsTheInvocationButNotTheTurn(t *testing.T) {
	g, c, in := invoked(t, "enforce")
	in.Lost()
	if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "closed" || g.live != nil {
		t.Fatalf("ends %+v", ends)
	}
	next := make(chan Admission, 1)
	second := accept(t, g)
	go func() { next <- second.Admit([]byte(postRequest), nil) }()
	untilWaiting(t, g, 1)

	in.Close(false) // the program noticed

	released(t, <-next)
}

// untilWaiting polls until n requests wait for the instance.
func untilWaiting(t *testing.T, g *Guard, n int) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		g.slot.mu.Lock()
		waiting := len(g.slot.waiting)
		g.slot.mu.Unlock()
		if waiting == n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d requests wait, not %d", waiting, n)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestRequestsWaitForTheInstanceInTheirOrder(t *testing.T) {
	g, _, in := invoked(t, "enforce")
	const count = 5
	order := make(chan int, count)
	var all sync.WaitGroup
	for i := range count {
		waiting := accept(t, g)
		all.Go(func() {
			if a := waiting.Admit([]byte(postRequest), nil); a.Release != nil {
				order <- i
				waiting.Answer([]byte("HTTP/1.1 204 No Content\r\n\r\n"))
			}
		})
		untilWaiting(t, g, i+1)
	}

	in.Answer([]byte("HTTP/1.1 204 No Content\r\n\r\n"))
	all.Wait()

	for want := range count {
		if got := <-order; got != want {
			t.Errorf("request %d came before %d", got, want)
		}
	}
}

func TestWaitingRequestsAreBounded(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	gone := make(chan struct{})
	var all sync.WaitGroup
	for i := range waitingMax {
		waiting := accept(t, g)
		all.Go(func() {
			if a := waiting.Admit([]byte(postRequest), gone); !a.Gone {
				t.Errorf("admission %+v", a)
			}
		})
		untilWaiting(t, g, i+1)
	}

	refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "held_too_long")

	if r := c.Last(t); r.Reason != "held_too_long" || r.Allowed {
		t.Errorf("verdict %+v", r)
	}
	close(gone)
	all.Wait()
	untilWaiting(t, g, 0)
}

func TestTheNextRequestOfAConnectionWaitsForTheAnswer(t *testing.T) {
	_, _, in := invoked(t, "enforce")
	next := make(chan Admission, 1)
	go func() { next <- in.Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"), nil) }()
	select {
	case a := <-next:
		t.Fatalf("admitted before the answer: %+v", a)
	case <-time.After(20 * time.Millisecond):
	}

	in.Answer([]byte("HTTP/1.1 204 No Content\r\n\r\n"))

	released(t, <-next)
}

func TestAConnectionThatGoesWhileItWaitsLeavesTheQueue(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	gone := make(chan struct{})
	done := make(chan Admission, 1)
	waiting := accept(t, g)
	go func() { done <- waiting.Admit([]byte(postRequest), gone) }()
	untilWaiting(t, g, 1)

	close(gone)

	if a := <-done; !a.Gone {
		t.Errorf("admission %+v", a)
	}
	untilWaiting(t, g, 0)
}

func TestATimeoutEndsTheCursor(t *testing.T) {
	g, c, in := invoked(t, "enforce")

	g.live.timer.Reset(0)

	deadline := time.Now().Add(patience)
	for len(c.Ended()) == 0 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "timeout" {
		t.Fatalf("ends %+v", ends)
	}
	expect(t, connect(t, g, api), request("GET /a", "api.test:8080"), "", Denied)
	if r := c.Last(t); r.Reason != "no_invocation" {
		t.Errorf("verdict %+v", r)
	}
	// The answer that comes late nevertheless leaves, and only then the instance is free.
	answer(t, in, "HTTP/1.1 204 No Content\r\n\r\n", 27, Allowed)
	if len(c.Ended()) != 1 {
		t.Error("the invocation ended twice")
	}
	released(t, accept(t, g).Admit([]byte(postRequest), nil))
}

func TestEachInvocationHasACursorOfItsOwn(t *testing.T) {
	g, _, in := invoked(t, "enforce")
	m := request("GET /a", "api.test:8080")
	out := connect(t, g, api)
	expect(t, out, m, m, Allowed)
	answer(t, in, "HTTP/1.1 204 No Content\r\n\r\n", 27, Allowed)
	released(t, accept(t, g).Admit([]byte(postRequest), nil))

	expect(t, out, m, m, Allowed) // on the connection of the first one
	expect(t, out, m, "", Denied)
}

func TestAHeadIsShortUntilItsEnd(t *testing.T) {
	g, c := newGuard(t, "enforce")
	in := accept(t, g)
	for n := range len(postRequest) {
		if a := in.Admit([]byte(postRequest[:n]), nil); !a.Short {
			t.Fatalf("%d bytes: %+v", n, a)
		}
	}
	if len(c.Started()) != 0 {
		t.Error("the controller was asked")
	}
}

func TestARequestThatIsNoneIsRefused(t *testing.T) {
	g, c := newGuard(t, "enforce")

	refusedWith(t, accept(t, g).Admit([]byte("GET /\r\n\r\n"), nil), "403", "malformed")

	if r := c.Last(t); r.Kind != "incoming" || r.Reason != "malformed" {
		t.Errorf("verdict %+v", r)
	}
}

func TestAuditGoesOnWithoutAGrant(t *testing.T) {
	g, c := newGuard(t, "audit")
	c.OnStart = func(*frame.Start) (*frame.Answer, error) { return &frame.Answer{Reason: "not_an_entry"}, nil }
	in := accept(t, g)

	released(t, in.Admit([]byte(postRequest), nil))

	if r := c.Last(t); !r.Allowed || !r.WouldDeny || r.Reason != "not_an_entry" {
		t.Errorf("verdict %+v", r)
	}
	m := request("GET /a", "api.test:8080")
	expect(t, connect(t, g, api), m, m, Allowed)
	if r := c.Last(t); r.WouldDeny {
		t.Errorf("verdict %+v", r)
	}
	in.Close(false)
	if len(c.Ended()) != 0 {
		t.Error("an invocation ended that the controller does not know")
	}
}
