package guard

import (
	"testing"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

const retryOnce = `"query":[],"retries":1,"tail":false,"text":"http GET api /a"`

func TestAMessageWithoutAnAnswerMayBeSentAgain(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := edited(t, mode, guardtest.RetriesOfGet, retryOnce)
		request1(t, g)
		_, inv := g.judge(nil, getA, "http")
		if outcome, _ := g.judge(nil, getA, "http"); outcome == Allowed {
			t.Error("it was sent again while the first one may be answered")
		}
		g.lose(inv, getA, 0)

		outcome, by := g.judge(nil, getA, "http")

		if r := c.Last(t); outcome != Allowed || by != inv || r.Judging != "retry" || len(r.States) != 1 || r.States[0] != 1 {
			t.Errorf("outcome %d, verdict %+v", outcome, r)
		}
		g.lose(inv, getA, 0)
		if outcome, _ := g.judge(nil, getA, "http"); outcome == Allowed {
			t.Error("it was sent a third time")
		}
		judged(t, g, Allowed, selectItems) // the cursor is where it was
	}
}

func TestWhatMayNotBeSentAgainIsNot(t *testing.T) {
	other := *getA
	other.Path = "/A"
	for name, try := range map[string]struct {
		pairs      []string
		lost, next *policy.Message
	}{
		"no retries":      {nil, getA, getA},
		"another message": {[]string{guardtest.RetriesOfGet, retryOnce}, getA, &other},
		"a statement":     {[]string{guardtest.RetriesOfGet, retryOnce}, selectItems, selectItems},
	} {
		g, _ := edited(t, "enforce", try.pairs...)
		request1(t, g)
		judged(t, g, Allowed, getA, selectItems)
		g.lose(g.live, try.lost, 0)

		if outcome, _ := g.judge(nil, try.next, "http"); outcome != Denied {
			t.Errorf("%s: outcome %d", name, outcome)
		}
	}
}

func TestRetriesEndWithTheInvocationAndAreBounded(t *testing.T) {
	g, _ := edited(t, "enforce", guardtest.RetriesOfGet, retryOnce)
	in := request1(t, g)
	judged(t, g, Allowed, getA)
	inv := g.live
	for i := range 2 * lostMax {
		m := *getA
		m.Path += string(rune('a' + i))
		g.lose(inv, &m, 0)
	}
	if len(inv.lost) != lostMax {
		t.Errorf("%d messages are kept", len(inv.lost))
	}
	g.lose(nil, getA, 0)
	respond(t, in)
	g.lose(inv, getA, 0)
	request1(t, g)
	judged(t, g, Allowed, getA)
	judged(t, g, Denied, getA)
}
