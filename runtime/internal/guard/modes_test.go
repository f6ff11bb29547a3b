package guard

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

func TestInOffModeEverythingPassesUnseen(t *testing.T) {
	g, c := newGuard(t, "off")
	c.OnStart = func(*frame.Start) (*frame.Answer, error) { return nil, errors.New("nobody is asked") }
	if !g.Off() {
		t.Error("the guard is not off")
	}

	in := accept(t, g)
	if !in.Free() {
		t.Error("a connection from outside is looked at")
	}
	answer(t, in, "anything", 8, Allowed)
	if in, outcome := g.Accept(8081, netip.MustParseAddrPort("10.1.2.3:4")); outcome == Denied || !in.Free() {
		t.Error("another listener is not reached")
	}
	stranger := netip.MustParseAddrPort("10.9.9.9:9")
	if g.Datagram(stranger) == Denied || g.Associate(stranger) == Denied || g.DatagramFrom(stranger) == Denied {
		t.Error("a datagram does not pass")
	}
	judged(t, g, Marked, postB)
	if g.could(postB, "http") == Denied || !g.knows(&policy.Message{}) {
		t.Error("a message is looked at")
	}

	if len(c.Verdicts()) != 0 || len(c.Started()) != 0 {
		t.Errorf("verdicts %+v, starts %+v", c.Verdicts(), c.Started())
	}
}

func TestOffNeedsNoLease(t *testing.T) {
	g, _ := newGuard(t, "off")
	g.now = func() time.Time { return time.Now().Add(time.Hour) }

	judged(t, g, Marked, postB)

	g.now = time.Now
	setPolicy(t, g, "audit", "4")
	g.now = func() time.Time { return time.Now().Add(time.Hour) }
	judged(t, g, Denied, postB)
}

func TestAModeIsSwitchedWithoutARestart(t *testing.T) {
	g, c := newGuard(t, "off")
	steps := []struct {
		version, mode string
		want          Outcome
	}{{"4", "enforce", Denied}, {"5", "audit", Marked}, {"6", "enforce", Denied}, {"7", "learn", Marked}, {"8", "off", Marked}, {"9", "enforce", Denied}}
	for _, step := range steps {
		setPolicy(t, g, step.mode, step.version)

		in := accept(t, g)
		if step.mode == "off" {
			if !in.Free() {
				t.Error("off: the connection is looked at")
			}
			continue
		}
		released(t, in.Admit([]byte(postRequest), nil))
		judged(t, g, step.want, postB)
		if r := c.Last(t); r.Mode != step.mode {
			t.Errorf("verdict %+v", r)
		}
		answer(t, in, noContentAnswer, len(noContentAnswer), Allowed)
	}
}

func TestOneFunctionsModeDoesNotDependOnAnothers(t *testing.T) {
	g, _ := edited(t, "enforce", `"mode":"enforce","quiet_ms":200,"retire_ms":30000,"reuse":"always","start":[0],"states":5`,
		`"mode":"audit","quiet_ms":200,"retire_ms":30000,"reuse":"always","start":[0],"states":5`)
	released(t, accept(t, g).Admit([]byte(postRequest), nil))

	judged(t, g, Marked, postB)
}

func TestAMarkedConnectionDiesWithTheSwitchToEnforceAlsoDuringAnInvocation(t *testing.T) {
	for _, mode := range []string{"off", "audit"} {
		g, c := newGuard(t, mode)
		in := accept(t, g)
		if mode == "audit" {
			released(t, in.Admit([]byte(postRequest), nil))
		}
		out, outcome := g.Connect(netip.MustParseAddrPort("10.9.9.9:9"))
		if outcome == Denied {
			t.Fatal("denied")
		}
		expect(t, out, "bytes", "bytes", Allowed)

		setPolicy(t, g, "enforce", "4")

		expect(t, out, "bytes", "", Denied)
		lastReason(t, c, policy.ReasonConnectionDead)
		if mode == "off" {
			answer(t, in, "bytes", 0, Denied)
		} else {
			judged(t, g, Marked, postB) // the call keeps its mode
		}
	}
}

func TestOffComesAtOnceAndTheInvocationGoesOnAfterIt(t *testing.T) {
	g, _, in := invoked(t, "enforce")
	setPolicy(t, g, "off", "4")
	judged(t, g, Marked, postB)
	setPolicy(t, g, "audit", "5")

	judged(t, g, Denied, postB)
	judged(t, g, Allowed, getA)

	answer(t, in, noContentAnswer, len(noContentAnswer), Allowed)
	setPolicy(t, g, "off", "6")
	if a := in.Admit([]byte("G"), nil); !a.Free {
		t.Errorf("admission %+v", a)
	}
}

func TestARequestThatWaitsPassesWhenTheGuardIsSwitchedOff(t *testing.T) {
	g, c, in := invoked(t, "enforce")
	next := make(chan Admission, 1)
	second := accept(t, g)
	go func() { next <- second.Admit([]byte(postRequest), nil) }()
	untilWaiting(t, g, 1)
	setPolicy(t, g, "off", "4")

	answer(t, in, noContentAnswer, len(noContentAnswer), Allowed)

	if a := <-next; !a.Free {
		t.Errorf("admission %+v", a)
	}
	if n := len(c.Started()); n != 1 {
		t.Errorf("%d starts", n)
	}
}

func TestWhatCouldBeSentMovesNothing(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c, _ := invoked(t, mode)
		before := len(c.Verdicts())

		for range 2 { // the first moves nothing, so the second is the same
			if g.could(getA, "http") != Allowed || len(c.Verdicts()) != before {
				t.Error("it could not be sent, or a verdict was logged")
			}
		}
		if outcome := g.could(postB, "http"); (outcome == Denied) != (mode == "enforce") {
			t.Errorf("outcome %d", outcome)
		}
		lastReason(t, c, policy.ReasonOutOfOrder)
		judged(t, g, Allowed, getA)
	}
	g, c := newGuard(t, "enforce")
	if g.could(getA, "http") != Denied {
		t.Error("it could be sent outside of an invocation")
	}
	lastReason(t, c, policy.ReasonNoInvocation)
	if (*Guard)(nil).could(getA, "http") != Denied {
		t.Error("it could be sent without a guard")
	}
}

func TestAKnownMessageStandsSomewhereInTheCFG(t *testing.T) {
	unknown := &policy.Message{Kind: policy.KindHTTP, Peer: "api", Method: "GET", Path: "/c"}
	g, _ := newGuard(t, "enforce")
	if !g.knows(postB) || g.knows(unknown) {
		t.Error("outside of an invocation")
	}
	released(t, accept(t, g).Admit([]byte(postRequest), nil))
	if !g.knows(postB) || g.knows(unknown) || (*Guard)(nil).knows(postB) {
		t.Error("inside of an invocation")
	}
	g.Renew(0)
	if g.knows(postB) {
		t.Error("after the lease")
	}
}

func TestKeysAreTheSandboxsOwn(t *testing.T) {
	g, _ := newGuard(t, "enforce")
	first, second := g.Keys(), g.Keys()
	if first == nil || first != second || (*Guard)(nil).Keys() == nil {
		t.Error("no store of keys")
	}
}

func modes(c *guardtest.Controller) string {
	var list []string
	for _, m := range c.Modes() {
		list = append(list, fmt.Sprintf("%s %d", m.Mode, m.Version))
	}
	return strings.Join(list, ", ")
}

func TestTheModeInForceIsToldAtEachChange(t *testing.T) {
	g, c := newGuard(t, "enforce")
	for _, next := range []struct{ mode, version string }{{"enforce", "4"}, {"enforce", "4"}, {"off", "5"}, {"learn", "6"}, {"audit", "7"}, {"enforce", "8"}} {
		setPolicy(t, g, next.mode, next.version)
		respond(t, request1OrFree(t, g))
	}

	if got := modes(c); got != "enforce 3, enforce 4, off 5, learn 6, audit 7, enforce 8" {
		t.Errorf("told: %s", got)
	}
}

// request1OrFree is a request that nobody looks at in mode off.
func request1OrFree(t *testing.T, g *Guard) *Incoming {
	t.Helper()
	in := accept(t, g)
	if a := in.Admit([]byte(postRequest), nil); a.Release == nil && !a.Free {
		t.Fatalf("%+v", a)
	}
	return in
}

// What an invocation does by an older and more lenient version is not enforced, so nobody may say that it is.
func TestTheModeInForceIsTheMostLenientOneThatStillCounts(t *testing.T) {
	g, c := newGuard(t, "audit")
	in := request1(t, g)

	setPolicy(t, g, "enforce", "4")

	if got := modes(c); got != "audit 3" {
		t.Errorf("told: %s", got)
	}
	respond(t, in)
	if got := modes(c); got != "audit 3, enforce 4" {
		t.Errorf("told: %s", got)
	}
	// A stricter one that still runs weakens nothing; the new mode counts for the next.
	in = request1(t, g)
	setPolicy(t, g, "audit", "5")
	respond(t, in)
	if got := modes(c); got != "audit 3, enforce 4, audit 5" {
		t.Errorf("told: %s", got)
	}
	// Off is for everything at once.
	request1(t, g)
	setPolicy(t, g, "off", "6")
	if got := modes(c); got != "audit 3, enforce 4, audit 5, off 6" {
		t.Errorf("told: %s", got)
	}
}

func TestAFunctionThatThePolicyLacksIsNotInAnyLenientMode(t *testing.T) {
	g, c := newGuard(t, "audit")

	setPolicy(t, g, "audit", "4", `"functions":{"buyer":`, `"functions":{"another":`, `"entries":["buyer"]`, `"entries":["another"]`,
		`"app_cfg":{"buyer"`, `"app_cfg":{"another"`)

	if got := modes(c); got != "audit 3, enforce 4" {
		t.Errorf("told: %s", got)
	}
	refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "403", "unknown_function")
}

func TestTheNewestModeIsToldWhenTheAgentReads(t *testing.T) {
	_, a, g, _, _ := linked(t)
	for version := 4; version < 9; version++ { // nobody reads
		setPolicy(t, g, "audit", fmt.Sprint(version))
	}
	setPolicy(t, g, "enforce", "9")

	last := frame.Mode{}
	for last != (frame.Mode{Mode: "enforce", Version: 9}) {
		_, m := a.next()
		last = *m.(*frame.Mode)
	}
}

func TestAWelcomeInAnotherVersionOfTheProtocolIsRefused(t *testing.T) {
	for _, proto := range []int{0, 1, 3, -1} {
		welcome := guardtest.Welcome(t, "enforce")
		welcome.Proto = proto

		if g, err := New(testIdentity, guardtest.PublicKey, welcome, guardtest.NewController()); err == nil || g != nil || !strings.Contains(err.Error(), "version") {
			t.Errorf("proto %d: %v", proto, err)
		}
	}
}
