package guard

import (
	"fmt"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

// inflight is a guard whose function works on n requests at a time, each a call of its own.
func inflight(t *testing.T, mode string, n int, pairs ...string) (*Guard, *guardtest.Controller) {
	t.Helper()
	g, c := edited(t, mode, append([]string{guardtest.Inflight, fmt.Sprintf(`"max_inflight":%d`, n)}, pairs...)...)
	count := 0
	c.OnStart = func(*frame.Start) (*frame.Answer, error) {
		count++
		return &frame.Answer{Allowed: true, Reason: "allowed", Call: fmt.Sprintf("%032x", count), Invocation: fmt.Sprintf("%032x", 1000+count)}, nil
	}
	return g, c
}

var invokePayer = &policy.Message{Kind: policy.KindInvoke, Peer: "gateway", Callee: "payer"}

// granted is an app edge that the controller grants, of a call.
func granted(call string) *edge {
	return &edge{call: call, ask: func(*invocation, bool) (*frame.Answer, error) { return guardtest.GrantInvoke(nil) }}
}

func TestSeveralRequestsRunAtATimeAndNoMore(t *testing.T) {
	g, _ := inflight(t, "enforce", 2)
	first := request1(t, g)
	request1(t, g)
	next := make(chan Admission, 1)
	go func() { next <- accept(t, g).Admit([]byte(postRequest), nil) }()
	untilWaiting(t, g, 1)

	respond(t, first)

	released(t, <-next)
}

func TestTheMessagesOfSeveralInvocationsAreAllowedInEveryOrderThatTheirCFGsAllow(t *testing.T) {
	for name, try := range map[string]struct {
		messages []*policy.Message
		want     string // + allowed, - denied
	}{
		"one after the other": {[]*policy.Message{getA, selectItems, getA, selectItems}, "++++"},
		"in step":             {[]*policy.Message{getA, getA, selectItems, selectItems}, "++++"},
		"three of two":        {[]*policy.Message{getA, getA, getA, selectItems}, "++-+"},
		"ahead of the first":  {[]*policy.Message{selectItems, getA, selectItems, selectItems, getA}, "-++-+"},
	} {
		for _, mode := range []string{"enforce", "audit"} {
			g, _ := inflight(t, mode, 2)
			request1(t, g)
			request1(t, g)
			var got strings.Builder
			for _, m := range try.messages {
				outcome, _ := g.judge(nil, m, m.Kind.String())
				got.WriteByte("-+"[map[bool]int{true: 1}[outcome == Allowed]])
			}
			if got.String() != try.want {
				t.Errorf("%s in %s: %s, want %s", name, mode, got.String(), try.want)
			}
		}
	}
}

func TestWhoseAMessageIsStaysOpenUntilItMatters(t *testing.T) {
	g, c := inflight(t, "enforce", 2)
	first, second := request1(t, g), request1(t, g)
	outcome, inv := g.judge(nil, getA, "http")
	if r := c.Last(t); outcome != Allowed || len(inv.among) != 2 || r.Call != "" || inv.over() {
		t.Errorf("outcome %d, verdict %+v", outcome, r)
	}
	if len(g.walk.branches) != 2 {
		t.Errorf("%d branches", len(g.walk.branches))
	}

	respond(t, first)
	if inv.over() {
		t.Error("over while one of the two runs")
	}
	// The select proves that the GET belonged to the second one, so that one may not send it again.
	judged(t, g, Allowed, selectItems)
	judged(t, g, Denied, getA)
	respond(t, second)
	if !inv.over() || len(g.walk.branches) != 0 || g.live != nil {
		t.Error("something is left")
	}
}

func TestAnAppEdgeNeedsTheCallThatTheProgramCopied(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := inflight(t, mode, 2)
		in := accept(t, g)
		a := in.Admit([]byte("POST / HTTP/1.1\r\nHost: f\r\nx-call-id: label\r\nContent-Length: 0\r\n\r\n"), nil)
		if want := "X-Call-Id: " + fmt.Sprintf("%032x", 1); !strings.Contains(string(a.Release), want) || strings.Contains(string(a.Release), "label") {
			t.Errorf("released %q", a.Release)
		}
		request1(t, g)
		judged(t, g, Allowed, getA, getA, selectItems, selectItems)

		for _, call := range []string{"", "label", fmt.Sprintf("%032x", 3)} {
			outcome, _ := g.judgeEdge(nil, invokePayer, "invoke", granted(call))
			if outcome == Allowed {
				t.Errorf("call %q: outcome %d", call, outcome)
			}
			lastReason(t, c, policy.ReasonUnknownCall)
		}
		for i := 2; i > 0; i-- {
			call := fmt.Sprintf("%032x", i)
			outcome, inv := g.judgeEdge(nil, invokePayer, "invoke", granted(call))
			if r := c.Last(t); outcome != Allowed || inv.call != call || r.Call != call || inv.label != map[int]string{1: "label"}[i] {
				t.Errorf("outcome %d, verdict %+v", outcome, r)
			}
		}
		if outcome, _ := g.judgeEdge(nil, invokePayer, "invoke", granted(fmt.Sprintf("%032x", 1))); outcome == Allowed {
			t.Error("the edge was taken twice")
		}
		lastReason(t, c, policy.ReasonOutOfOrder)
	}
}

func TestWithOneRequestAtATimeTheCallIdIsALabel(t *testing.T) {
	g, _ := newGuard(t, "enforce")
	request1(t, g)
	judged(t, g, Allowed, getA, selectItems)

	if outcome, _ := g.judgeEdge(nil, invokePayer, "invoke", granted("any label")); outcome != Allowed {
		t.Errorf("outcome %d", outcome)
	}
}

func TestBranchesAreBounded(t *testing.T) {
	g, c := inflight(t, "enforce", 16)
	for range 16 {
		request1(t, g)
	}
	allowed := 0
	for range 16 {
		outcome, _ := g.judge(nil, getA, "http")
		if len(g.walk.branches) > branchesMax {
			t.Fatalf("%d branches", len(g.walk.branches))
		}
		if outcome == Allowed {
			allowed++
		} else {
			lastReason(t, c, policy.ReasonTooLarge)
		}
	}
	if allowed == 0 || allowed == 16 {
		t.Errorf("%d of 16 were allowed", allowed)
	}
}

func TestATailOfOneOfSeveralKeepsWhatIsKnownOfTheOthers(t *testing.T) {
	g, _ := inflight(t, "enforce", 2, selectText, selectTail)
	first, second := request1(t, g), request1(t, g)
	judged(t, g, Allowed, getA) // of either
	respond(t, first)
	judged(t, g, Allowed, selectItems) // of the first one's tail, or of the second one

	// Whoever it was: one GET bought one select.
	judged(t, g, Denied, selectItems)
	judged(t, g, Allowed, getA)
	judged(t, g, Allowed, selectItems)
	judged(t, g, Denied, selectItems, getA)
	respond(t, second)
}

func TestALowerBoundOfRequestsHoldsForThoseThatWait(t *testing.T) {
	g, _ := inflight(t, "enforce", 2)
	first, second := request1(t, g), request1(t, g)
	setPolicy(t, g, "enforce", "4")
	next := make(chan Admission, 1)
	go func() { next <- accept(t, g).Admit([]byte(postRequest), nil) }()
	untilWaiting(t, g, 1)
	respond(t, first)
	untilWaiting(t, g, 1)

	respond(t, second)

	released(t, <-next)
}

func TestAnInvokeCarriesTheLabelOfItsOwnRequest(t *testing.T) {
	g, c := inflight(t, "enforce", 2)
	for _, label := range []string{"first", "second"} {
		released(t, accept(t, g).Admit([]byte(request("POST /", "f", "X-Call-Id: "+label+"\r\n", "Content-Length: 0\r\n")), nil))
	}
	judged(t, g, Allowed, getA, getA, selectItems, selectItems)
	out := connect(t, g, "10.137.0.1:8080")
	call := fmt.Sprintf("%032x", 2)
	invoke := func(fields ...string) string { return request("POST /function/payer", "gateway:8080", fields...) }

	expect(t, out, invoke("X-Call-Id: "+call+"\r\n"), invoke("X-Kalium-Token: "+guardtest.Token+"\r\n", "X-Call-Id: second\r\n"), Allowed)

	if r := c.Last(t); r.Call != call {
		t.Errorf("verdict %+v", r)
	}
	expect(t, out, invoke("X-Call-Id: "+call+"\r\n", "X-Call-Id: "+call+"\r\n"), "", Denied)
	lastReason(t, c, policy.ReasonUnknownCall)
}
