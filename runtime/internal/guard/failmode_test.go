package guard

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

// failingGuard is a guard whose policy has a fail mode.
func failingGuard(t *testing.T, mode string, pairs ...string) (*Guard, *guardtest.Controller) {
	t.Helper()
	return edited(t, "enforce", append([]string{failDeny, failing(mode)}, pairs...)...)
}

// silences are all that counts as no answer.
var silences = map[string]struct {
	answer *frame.Answer
	err    error
}{
	"the agent is gone":    {nil, errLinkDown},
	"nothing came in time": {nil, errNoAnswer},
	"nobody could answer":  {&frame.Answer{Reason: "controller_unavailable", Detail: "no controller", Token: guardtest.Token}, nil},
}

const invokeOfPayer = "POST /function/payer"

func TestAnInvokeThatNobodyAnswersIsDecidedByTheFailMode(t *testing.T) {
	payerNobodysCallee := []string{`"edges":[[0,0,1]],
"labels":[{"asynchronous":false,"callback":"","callee":"payer","join":0,"retries":0}],"start":[0],"states":2}`, `"edges":[],"labels":[],"start":[0],"states":1}`}
	payerNobodysCallee[0] = strings.ReplaceAll(payerNobodysCallee[0], "\n", "")
	for name, silence := range silences {
		for _, try := range []struct {
			mode    string
			pairs   []string
			outcome Outcome
			reason  string
		}{
			{"deny", nil, Denied, "controller_unavailable"},
			{"allow", nil, Allowed, "allowed"},
			{"allow", payerNobodysCallee, Allowed, "allowed"},
			{"last_known", nil, Allowed, "allowed"},
			{"last_known", payerNobodysCallee, Denied, "edge_not_allowed"},
		} {
			g, c := failingGuard(t, try.mode, try.pairs...)
			request1(t, g)
			g.live.cursor = atState(g, 2)
			c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { return silence.answer, silence.err }
			want := ""
			if try.outcome == Allowed {
				want = request(invokeOfPayer, "gateway:8080") // and no token
			}

			expect(t, connect(t, g, api), request(invokeOfPayer, "gateway:8080", "X-Kalium-Token: "+guardtest.Token+"\r\n"), want, try.outcome)

			if r := c.Last(t); r.Reason != try.reason || r.FailMode != try.mode || r.Allowed != (try.outcome == Allowed) || r.WouldDeny {
				t.Errorf("%s: %+v: verdict %+v", name, try, r)
			}
			if moved := g.live.cursor.States()[0] == 3; moved != (try.outcome == Allowed) {
				t.Errorf("%s: %+v: the cursor is at %v", name, try, g.live.cursor.States())
			}
		}
	}
}

func TestAStartThatNobodyAnswersIsDecidedByTheFailMode(t *testing.T) {
	noEntry := []string{`"entries":["buyer"]`, `"entries":["payer"]`}
	invokedByPayer := append([]string{`"payer":{"edges":[],"labels":[]`,
		`"payer":{"edges":[[0,0,0]],"labels":[{"asynchronous":false,"callback":"","callee":"buyer","join":0,"retries":0}]`}, noEntry...)
	const token = "X-Kalium-Token: " + guardtest.Token + "\r\n"
	for name, silence := range silences {
		for _, try := range []struct {
			mode, token string
			pairs       []string
			reason      string
		}{
			{"deny", "", nil, "controller_unavailable"},
			{"allow", "", noEntry, ""},
			{"allow", token, noEntry, ""},
			{"last_known", "", nil, ""},
			{"last_known", token, nil, "not_an_entry"}, // an entry that nobody invokes
			{"last_known", "", noEntry, "not_an_entry"},
			{"last_known", token, noEntry, "not_an_entry"},
			{"last_known", "", invokedByPayer, ""},
			{"last_known", token, invokedByPayer, ""},
		} {
			g, c := failingGuard(t, try.mode, try.pairs...)
			c.OnStart = func(*frame.Start) (*frame.Answer, error) { return silence.answer, silence.err }
			in := accept(t, g)

			a := in.Admit([]byte(request("POST /", "f", try.token)), nil)

			if (a.Release != nil) != (try.reason == "") || try.reason != "" && !strings.Contains(string(a.Refusal), `"error":"`+try.reason+`"`) {
				t.Errorf("%s: %+v: %q %q", name, try, a.Release, a.Refusal)
			}
			if strings.Contains(string(a.Release), "Kalium") {
				t.Errorf("%s: %+v: released %q", name, try, a.Release)
			}
			if r := c.Last(t); r.FailMode != try.mode || r.Call != "" || r.Invocation != "" {
				t.Errorf("%s: %+v: verdict %+v", name, try, r)
			}
		}
	}
}

func TestAnInvocationThatBeganWithoutTheControllerIsDecidedByTheFailModeUntilItsEnd(t *testing.T) {
	g, c := failingGuard(t, "allow")
	c.OnStart = func(*frame.Start) (*frame.Answer, error) { return nil, errNoAnswer }
	c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) {
		t.Error("the controller was asked for an invocation that it does not know")
		return guardtest.GrantInvoke(nil)
	}
	in := request1(t, g)
	judged(t, g, Allowed, getA, selectItems)

	expect(t, connect(t, g, api), request(invokeOfPayer, "gateway:8080"), request(invokeOfPayer, "gateway:8080"), Allowed)

	if r := c.Last(t); r.FailMode != "allow" {
		t.Errorf("verdict %+v", r)
	}
	// Its own CFG holds all the same.
	expect(t, connect(t, g, api), request(invokeOfPayer, "gateway:8080"), "", Denied)
	lastReason(t, c, policy.ReasonOutOfOrder)
	respond(t, in)
	if len(c.Ended()) != 0 {
		t.Errorf("an end was told of an invocation that nobody has granted: %+v", c.Ended())
	}
	c.OnStart, c.OnInvoke = guardtest.GrantStart, guardtest.GrantInvoke
	request1(t, g)
	if r := c.Last(t); r.FailMode != "" || r.Call != guardtest.Call {
		t.Errorf("the next one: %+v", r)
	}
}

func TestWithSeveralRequestsAtATimeTheProgramCanSayWhoseEdgeItIsWithoutTheController(t *testing.T) {
	g, c := failingGuard(t, "allow", guardtest.Inflight, `"max_inflight":2`)
	c.OnStart = func(*frame.Start) (*frame.Answer, error) { return nil, errLinkDown }
	calls := []string{}
	for range 2 {
		a := accept(t, g).Admit([]byte(request("POST /", "f", "X-Call-Id: label\r\n")), nil)
		_, after, found := strings.Cut(string(a.Release), "X-Call-Id: ")
		if !found || !isID(after[:32]) {
			t.Fatalf("released %q", a.Release)
		}
		calls = append(calls, after[:32])
	}
	judged(t, g, Allowed, getA, getA, selectItems, selectItems)

	for _, call := range calls {
		if outcome, inv := g.judgeEdge(nil, invokePayer, "invoke", granted(call)); outcome != Allowed || inv.call != call {
			t.Errorf("outcome %d", outcome)
		}
	}
	if calls[0] == calls[1] {
		t.Error("one call for both")
	}
}

// Whatever the instance may have brought about by itself is denied, and so is what follows.
func TestNoFailModeCoversTheInstancesOwnBounds(t *testing.T) {
	for name, try := range map[string]struct {
		answer *frame.Answer
		err    error
		loud   bool
		next   string
	}{
		"too many questions":      {err: errLinkFull, next: "allowed"}, // was not asked
		"no room for frames":      {err: errQueueStuck, next: "unknown_state"},
		"a frame that is none":    {err: &frame.Error{}, next: "unknown_state"},
		"a bound of the agent":    {answer: &frame.Answer{Reason: "overloaded"}, next: "allowed"},
		"silence behind its din":  {err: errNoAnswer, loud: true, next: "unknown_state"},
		"unregistered":            {answer: &frame.Answer{Reason: "unregistered"}, next: "allowed"},
		"a rate bound":            {answer: &frame.Answer{Reason: "rate_bound"}, next: "allowed"},
		"a state that is unknown": {answer: &frame.Answer{Reason: "unknown_state"}, next: "allowed"},
	} {
		for _, mode := range []string{"deny", "allow", "last_known"} {
			g, c := failingGuard(t, mode)
			request1(t, g)
			g.live.cursor = atState(g, 2)
			if try.loud {
				now := time.Now() // of the whole din: it does not become silent, nor ebb away, while it is made
				g.now = func() time.Time { return now }
				for range noiseBurst + noisePerSecond {
					g.Connect(client)
				}
			}
			c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { return try.answer, try.err }

			expect(t, connect(t, g, api), request(invokeOfPayer, "gateway:8080"), "", Denied)

			want := "overloaded"
			if try.answer != nil {
				want = try.answer.Reason
			}
			if r := c.Last(t); r.Reason != want || r.FailMode != "" {
				t.Errorf("%s in %s: verdict %+v", name, mode, r)
			}
			c.OnInvoke = guardtest.GrantInvoke
			connect(t, g, api).Write([]byte(request(invokeOfPayer, "gateway:8080")))
			if r := c.Last(t); r.Reason != try.next {
				t.Errorf("%s in %s, the next one: %+v", name, mode, r)
			}
		}
	}
}

func TestAStartBeyondABoundFallsUnderNoFailMode(t *testing.T) {
	for _, mode := range []string{"deny", "allow", "last_known"} {
		g, c := failingGuard(t, mode)
		c.OnStart = func(*frame.Start) (*frame.Answer, error) { return nil, errLinkFull }

		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "overloaded")

		if r := c.Last(t); r.FailMode != "" {
			t.Errorf("verdict %+v", r)
		}
	}
}

func TestDinIsForgotten(t *testing.T) {
	var n noise
	now := time.Now()
	for range noiseBurst {
		n.hear(now)
	}
	if n.loud(now) {
		t.Error("loud within the burst")
	}
	n.hear(now)
	if !n.loud(now) || !n.loud(now.Add(noiseLasts-1)) || n.loud(now.Add(noiseLasts)) {
		t.Error("loud for another time")
	}
}

func TestNoFailModeOutlivesTheLease(t *testing.T) {
	for _, mode := range []string{"deny", "allow", "last_known"} {
		g, c := failingGuard(t, mode)
		request1(t, g)
		g.live.cursor = atState(g, 2)
		// The lease ends while the answer is waited for.
		c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { g.Renew(0); return nil, errNoAnswer }
		out := connect(t, g, api)

		expect(t, out, request(invokeOfPayer, "gateway:8080"), "", Denied)
		lastReason(t, c, policy.ReasonLeaseExpired)

		g.Renew(60000)
		c.OnStart = func(*frame.Start) (*frame.Answer, error) { g.Renew(0); return nil, errNoAnswer }
		second := accept(t, g)
		g.slot.release() // as if the first one were over
		refusedWith(t, second.Admit([]byte(postRequest), nil), "503", "lease_expired")
	}
}

func TestTheFailModeIsThatOfTheInvocationsVersion(t *testing.T) {
	g, c := failingGuard(t, "allow")
	request1(t, g)
	g.live.cursor = atState(g, 2)
	setPolicy(t, g, "enforce", "4")
	c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { return nil, errNoAnswer }

	expect(t, connect(t, g, api), request(invokeOfPayer, "gateway:8080"), request(invokeOfPayer, "gateway:8080"), Allowed)

	if r := c.Last(t); r.PolicyVersion != 3 || r.FailMode != "allow" {
		t.Errorf("verdict %+v", r)
	}
}

func TestInAuditAFailModeThatDeniesIsAWouldDeny(t *testing.T) {
	g, c := edited(t, "audit")
	request1(t, g)
	g.live.cursor = atState(g, 2)
	c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { return nil, errNoAnswer }

	connect(t, g, api).Write([]byte(request(invokeOfPayer, "gateway:8080")))

	if r := c.Last(t); !r.Allowed || !r.WouldDeny || r.Reason != "controller_unavailable" || r.FailMode != "deny" {
		t.Errorf("verdict %+v", r)
	}
}

func TestWhenTheAgentIsGoneTheInstanceIsRetired(t *testing.T) {
	for _, mode := range []string{"enforce", "audit", "learn"} {
		g, c := edited(t, mode)
		running := request1(t, g)
		waiting := make(chan Admission, 1)
		second := accept(t, g)
		go func() { waiting <- second.Admit([]byte(postRequest), nil) }()
		untilWaiting(t, g, 1)
		c.OnStart = func(*frame.Start) (*frame.Answer, error) { t.Error("asked"); return nil, errLinkDown }

		g.orphaned()

		refusedWith(t, <-waiting, "503", "retired")
		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")
		refusedWith(t, accept(t, g).Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"), nil), "503", "retired")
		// What runs goes on by the policy, until the lease ends.
		judged(t, g, Allowed, getA)
		respond(t, running)
	}
}

func TestARequestThatWasAskedForWhileTheAgentWentIsForAnotherInstance(t *testing.T) {
	g, c := newGuard(t, "enforce")
	c.OnStart = func(*frame.Start) (*frame.Answer, error) { g.orphaned(); return nil, errLinkDown }

	refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")
}

func TestAFailModeServesWithoutAnAgentUntilTheLeaseEnds(t *testing.T) {
	for _, mode := range []string{"allow", "last_known"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			g, c := failingGuard(t, mode)
			c.OnStart = func(*frame.Start) (*frame.Answer, error) { return nil, errLinkDown }
			g.Renew(2000) // time for one request
			g.orphaned()
			in := accept(t, g)
			released(t, in.Admit([]byte(postRequest), nil))
			respond(t, in)

			eventually(t, "its retirement", g.unfit)

			if time.Now().Before(g.leaseEnds) {
				t.Error("retired before the lease ended")
			}
			refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")
		})
	}
}

func TestInOffModeNobodyIsRetired(t *testing.T) {
	g, _ := newGuard(t, "off")

	g.orphaned()

	if a := accept(t, g).Admit([]byte(postRequest), nil); !a.Free {
		t.Errorf("%+v", a)
	}
}

func TestTheEndOfTheLinkRetiresTheInstance(t *testing.T) {
	l, a, g, reports, _ := linked(t)

	a.conn.Close()

	<-reports
	for range pendingMax + 1 { // questions to nobody do not pile up
		if _, err := l.Start(soon(), &frame.Start{Step: newStep()}); !errors.Is(err, errLinkDown) {
			t.Fatal(err)
		}
	}
	refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")
}

func TestQuestionsDoNotWaitBehindVerdicts(t *testing.T) {
	l, a, _, _, _ := linked(t)
	const verdicts = 200
	for range verdicts {
		if err := l.Log(soon(), &frame.VerdictRecord{Event: frame.EventVerdict, Reason: "allowed"}); err != nil {
			t.Fatal(err)
		}
	}
	go l.Invoke(soon(), &frame.Invoke{Step: newStep()})
	deadline := soon()
	for len(l.asks) == 0 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}

	var kinds []frame.Type
	for !slices.Contains(kinds, frame.TypeInvoke) {
		_, m := a.next()
		kinds = append(kinds, m.Type())
	}

	if len(kinds) > 3 { // one was being written
		t.Errorf("it came behind %d frames", len(kinds)-1)
	}
}
