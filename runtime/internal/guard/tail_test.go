package guard

import (
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

// In these policies the select is the tail: GET /a belongs to the body, and the select may follow the answer.
const selectText = `"peer":"database","read":["items"],"tail":false`
const selectTail = `"peer":"database","read":["items"],"tail":true`

func request1(t *testing.T, g *Guard) *Incoming {
	t.Helper()
	in := accept(t, g)
	released(t, in.Admit([]byte(postRequest), nil))
	return in
}

func respond(t *testing.T, in *Incoming) {
	t.Helper()
	answer(t, in, noContentAnswer, len(noContentAnswer), Allowed)
}

func tails(g *Guard) (count int) {
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	for _, inv := range g.walk.parts {
		if inv.tailing {
			count++
		}
	}
	return count
}

func TestTheTailGoesOnAfterTheAnswerWithTheSameCursor(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := edited(t, mode, selectText, selectTail)
		in := request1(t, g)
		judged(t, g, Allowed, getA)
		respond(t, in)
		if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "answered" {
			t.Errorf("ends %+v", ends)
		}
		if outcome, _ := g.judge(nil, getA, "http"); (outcome == Denied) != (mode == "enforce") {
			t.Errorf("a message of the body after the answer: outcome %d", outcome)
		}
		lastReason(t, c, policy.ReasonOutOfOrder)

		outcome, inv := g.judge(nil, selectItems, "mysql")

		if r := c.Last(t); outcome != Allowed || r.Call != guardtest.Call || r.Reason != "allowed" {
			t.Errorf("outcome %d, verdict %+v", outcome, r)
		}
		if tails(g) != 0 || !inv.over() {
			t.Error("a complete tail is not over")
		}
		if outcome, _ := g.judge(nil, selectItems, "mysql"); outcome == Allowed {
			t.Error("the tail was sent twice")
		}
	}
}

func TestWithoutATailTheAnswerIsTheEnd(t *testing.T) {
	g, c := edited(t, "enforce", selectText, selectTail)
	in := request1(t, g)
	respond(t, in) // before GET /a: the tail cannot be reached

	judged(t, g, Denied, selectItems)
	lastReason(t, c, policy.ReasonNoInvocation)
}

func TestATailHasATime(t *testing.T) {
	g, c := edited(t, "enforce", selectText, selectTail, guardtest.TailTime, `"tail_ms":300`)
	in := request1(t, g)
	judged(t, g, Allowed, getA)
	inv := g.live
	began := time.Now()
	respond(t, in)
	if over := inv.over(); over && time.Since(began) < 300*time.Millisecond {
		t.Error("over before its time")
	}

	eventually(t, "the end of the tail", func() bool { return tails(g) == 0 })

	judged(t, g, Denied, selectItems)
	lastReason(t, c, policy.ReasonNoInvocation)
	if !inv.over() {
		t.Error("not over")
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come", what)
		}
	}
}

func TestAMessageOfATailGoesToTheOldestThatAllowsIt(t *testing.T) {
	g, _ := edited(t, "enforce", selectText, selectTail)
	var invocations []*invocation
	for range 2 {
		in := request1(t, g)
		judged(t, g, Allowed, getA)
		invocations = append(invocations, g.live)
		respond(t, in)
	}
	in := request1(t, g)
	judged(t, g, Allowed, getA)
	invocations = append(invocations, g.live)

	for i, inv := range invocations {
		if outcome, by := g.judge(nil, selectItems, "mysql"); outcome != Allowed || by != inv {
			t.Errorf("message %d: outcome %d, another invocation: %t", i, outcome, by != inv)
		}
	}
	judged(t, g, Denied, selectItems)
	respond(t, in)
}

func TestAnAnswerFreesTheInstanceWhileATailIsPending(t *testing.T) {
	g, _ := edited(t, "enforce", selectText, selectTail)
	in := request1(t, g)
	judged(t, g, Allowed, getA)
	respond(t, in)

	request1(t, g)

	judged(t, g, Allowed, getA, selectItems, selectItems)
}

func TestPendingTailsAreBounded(t *testing.T) {
	g, _ := edited(t, "enforce", selectText, selectTail)
	var first *invocation
	for range tailsMax + 1 {
		in := request1(t, g)
		judged(t, g, Allowed, getA)
		if first == nil {
			first = g.live
		}
		respond(t, in)
	}
	if n := tails(g); n != tailsMax || !first.over() {
		t.Errorf("%d tails", n)
	}
	for range tailsMax {
		judged(t, g, Allowed, selectItems)
	}
	judged(t, g, Denied, selectItems)
}

func TestOnlyAnAnswerBeginsATail(t *testing.T) {
	g, _ := edited(t, "enforce", selectText, selectTail)
	in := request1(t, g)
	judged(t, g, Allowed, getA)
	in.Close(false)

	judged(t, g, Denied, selectItems)
}

func withStartup(more ...string) []string {
	return append([]string{guardtest.Inflight, guardtest.Startup + guardtest.Inflight}, more...)
}

func TestAStartupIsJudgedUntilTheFirstRequest(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := edited(t, mode, withStartup()...)
		judged(t, g, Allowed, getA)
		if r := c.Last(t); r.Call != "" || r.Invocation != "" || r.Line != 9 {
			t.Errorf("verdict %+v", r)
		}
		if outcome, _ := g.judge(nil, getA, "http"); (outcome == Denied) != (mode == "enforce") {
			t.Errorf("a second one: outcome %d", outcome)
		}
		lastReason(t, c, policy.ReasonOutOfOrder)

		in := request1(t, g)
		judged(t, g, Allowed, getA) // the invocation's own
		respond(t, in)
		if outcome, _ := g.judge(nil, getA, "http"); outcome == Allowed {
			t.Error("the startup is still there after the first request")
		}
		lastReason(t, c, policy.ReasonNoInvocation)
	}
}

func TestAProbeDoesNotEndTheStartup(t *testing.T) {
	g, _ := edited(t, "enforce", withStartup()...)
	in := accept(t, g)
	released(t, in.Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"), nil))

	judged(t, g, Allowed, getA)
}

func TestARefusedStartDoesNotEndTheStartup(t *testing.T) {
	g, c := edited(t, "enforce", withStartup()...)
	c.OnStart = refuseStart("bad_token")
	refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "403", "bad_token")

	judged(t, g, Allowed, getA)
}

func TestANewPolicyRenewsAStartup(t *testing.T) {
	other := guardtest.Inflight
	for name, try := range map[string]struct {
		before, after string
		sent          bool
		pairs         []string
		want          Outcome
	}{
		"the same one, nothing sent":  {"enforce", "enforce", false, withStartup(), Allowed},
		"the same one, half of it":    {"enforce", "enforce", true, withStartup(), Denied},
		"another one, nothing sent":   {"enforce", "enforce", false, withStartup(`"line":9`, `"line":8`), Allowed},
		"another one, half of it":     {"enforce", "enforce", true, withStartup(`"line":9`, `"line":8`), Denied},
		"none any more":               {"enforce", "enforce", false, []string{other, other}, Denied},
		"out of off":                  {"off", "enforce", false, withStartup(), Allowed},
		"out of audit, half of it":    {"audit", "enforce", true, withStartup(), Denied},
		"into audit, half of it":      {"enforce", "audit", true, withStartup(), Marked},
		"off does not count as begun": {"off", "enforce", true, withStartup(), Allowed},
	} {
		g, _ := edited(t, try.before, withStartup()...)
		if try.sent {
			g.judge(nil, getA, "http")
		}
		setPolicy(t, g, try.after, "4", try.pairs...)

		if outcome, _ := g.judge(nil, getA, "http"); outcome != try.want {
			t.Errorf("%s: outcome %d, want %d", name, outcome, try.want)
		}
	}
}

func TestThereIsNoStartupBehindTheRequestsOfOffMode(t *testing.T) {
	for name, come := range map[string]func(*Guard){
		"a connection in off mode": func(g *Guard) { accept(t, g) },
		"a request in off mode on an older connection": func(g *Guard) {
			setPolicy(t, g, "enforce", "4", withStartup()...)
			in := accept(t, g)
			setPolicy(t, g, "off", "5", withStartup()...)
			if a := in.Admit([]byte(postRequest), nil); !a.Free {
				t.Errorf("%+v", a)
			}
		},
	} {
		g, c := edited(t, "off", withStartup()...)
		come(g)
		setPolicy(t, g, "enforce", "6", withStartup()...)

		if outcome, _ := g.judge(nil, getA, "http"); outcome != Denied {
			t.Errorf("%s: outcome %d", name, outcome)
		}
		lastReason(t, c, policy.ReasonNoInvocation)
	}
}
