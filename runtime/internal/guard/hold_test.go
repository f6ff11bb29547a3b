package guard

import (
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

// awaited is a guard with a request whose answer a join waits for.
func awaited(t *testing.T, mode string, pairs ...string) (*Guard, *guardtest.Controller, *Incoming) {
	t.Helper()
	g, c := edited(t, mode, pairs...)
	c.OnStart = func(*frame.Start) (*frame.Answer, error) {
		answer, _ := guardtest.GrantStart(nil)
		answer.Hold = true
		return answer, nil
	}
	return g, c, request1(t, g)
}

func TestTheEndOfAnAwaitedAnswerLeavesWhenTheControllerKnowsOfIt(t *testing.T) {
	for name, whole := range map[string]string{
		"length":  "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
		"chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"204":     noContentAnswer,
	} {
		for _, size := range []int{1, 7, len(whole)} {
			g, c, in := awaited(t, "enforce")
			asked := make(chan frame.Finish)
			grant := make(chan struct{})
			c.OnFinish = func(m *frame.Finish) (*frame.Answer, error) {
				asked <- *m
				<-grant
				return guardtest.GrantFinish(m)
			}
			at := 0
			for ; at+size < len(whole); at += size {
				answer(t, in, whole[at:at+size], size, Allowed)
			}
			next := make(chan Admission, 1)
			go func() { next <- in.Admit([]byte("GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"), nil) }()
			left := make(chan int, 1)
			go func() {
				n, outcome := in.Answer([]byte(whole[at:]))
				if outcome != Allowed {
					n = -1
				}
				left <- n
			}()

			m := <-asked

			if m.Call != guardtest.Call || m.Invocation != guardtest.Invocation || m.Outcome != "answered" {
				t.Errorf("%s: asked %+v", name, m)
			}
			select {
			case n := <-left:
				t.Fatalf("%s in pieces of %d: %d bytes left before the controller knew", name, size, n)
			case <-next:
				t.Fatal("the next request came before the answer")
			case <-time.After(10 * time.Millisecond):
			}
			verdicts := len(c.Verdicts())
			close(grant)
			if n := <-left; n != len(whole)-at {
				t.Errorf("%s in pieces of %d: %d bytes left", name, size, n)
			}
			released(t, <-next)
			if len(c.Verdicts()) != verdicts || len(c.Ended()) != 0 || g.live != nil {
				t.Errorf("%s: verdicts %d, ends %+v", name, len(c.Verdicts())-verdicts, c.Ended())
			}
		}
	}
}

func TestAnAwaitedAnswerThatNobodyHeardOfIsDecidedByTheFailMode(t *testing.T) {
	for name, silence := range silences {
		for _, try := range []struct {
			mode, failMode, reason, end string
			outcome                     Outcome
		}{
			{"enforce", "deny", "controller_unavailable", "closed", Denied},
			{"enforce", "allow", "allowed", "answered", Allowed},
			{"enforce", "last_known", "allowed", "answered", Allowed},
			{"audit", "deny", "controller_unavailable", "answered", Allowed}, // a would-deny
		} {
			g, c, in := awaited(t, try.mode, failDeny, failing(try.failMode))
			c.OnFinish = func(*frame.Finish) (*frame.Answer, error) { return silence.answer, silence.err }
			want := len(noContentAnswer)
			if try.outcome == Denied {
				want = 0
			}

			answer(t, in, noContentAnswer, want, try.outcome)

			if r := c.Last(t); r.Reason != try.reason || r.FailMode != try.failMode || r.Kind != "incoming" || r.Invocation != guardtest.Invocation ||
				r.WouldDeny != (try.mode == "audit") {
				t.Errorf("%s: %+v: verdict %+v", name, try, r)
			}
			if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != try.end {
				t.Errorf("%s: %+v: ends %+v", name, try, ends)
			}
			if a := in.Admit([]byte(postRequest), nil); a.Gone != (try.outcome == Denied) {
				t.Errorf("%s: %+v: the next request on the connection: %+v", name, try, a)
			}
			in.Close(false)
			if g.live != nil {
				t.Error("the invocation goes on")
			}
			released(t, accept(t, g).Admit([]byte(postRequest), nil)) // the instance is free
		}
	}
}

func TestAnAwaitedAnswerThatTheControllerRefusesDoesNotEnd(t *testing.T) {
	for _, failMode := range []string{"deny", "allow", "last_known"} {
		for reason, refused := range map[string]struct {
			answer *frame.Answer
			err    error
		}{
			"unknown_call": {&frame.Answer{Reason: "unknown_call"}, nil},
			"overloaded":   {nil, errLinkFull},
			"malformed":    {&frame.Answer{Allowed: true, Reason: "unknown_call"}, nil},
		} {
			_, c, in := awaited(t, "enforce", failDeny, failing(failMode))
			c.OnFinish = func(*frame.Finish) (*frame.Answer, error) { return refused.answer, refused.err }

			answer(t, in, noContentAnswer, 0, Denied)

			if r := c.Last(t); r.Reason != reason || r.FailMode != "" {
				t.Errorf("verdict %+v", r)
			}
		}
	}
}

func TestAnAnswerThatTheConnectionEndsWaitsWithThat(t *testing.T) {
	const head = "HTTP/1.0 200 OK\r\n\r\nbody"
	_, c, in := awaited(t, "enforce")
	answer(t, in, head, len(head), Allowed)
	if outcome := in.Close(false); outcome != Allowed || len(c.Ended()) != 0 {
		t.Errorf("outcome %d, ends %+v", outcome, c.Ended())
	}

	_, c, in = awaited(t, "enforce")
	c.OnFinish = func(*frame.Finish) (*frame.Answer, error) { return nil, errNoAnswer }
	answer(t, in, head, len(head), Allowed)
	if outcome := in.Close(false); outcome != Denied || c.Ended()[0].Outcome != "closed" {
		t.Errorf("outcome %d, ends %+v", outcome, c.Ended())
	}

	// A reset is no end of an answer.
	_, c, in = awaited(t, "enforce")
	c.OnFinish = func(*frame.Finish) (*frame.Answer, error) { t.Error("asked"); return nil, errNoAnswer }
	answer(t, in, head, len(head), Allowed)
	if in.Close(true); c.Ended()[0].Outcome != "closed" {
		t.Errorf("ends %+v", c.Ended())
	}
}

func TestAnAwaitedInvocationThatTimedOutCompletesNothing(t *testing.T) {
	for _, failMode := range []string{"deny", "allow"} {
		g, c, in := awaited(t, "enforce", failDeny, failing(failMode))
		c.OnFinish = func(*frame.Finish) (*frame.Answer, error) { t.Error("asked"); return guardtest.GrantFinish(nil) }
		g.finish(g.live, outcomeTimeout)

		answer(t, in, noContentAnswer, 0, Denied)

		lastReason(t, c, policy.ReasonNoInvocation)
		if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "timeout" {
			t.Errorf("ends %+v", ends)
		}
	}
}

func TestBytesBehindAnAwaitedAnswerAreDenied(t *testing.T) {
	_, c, in := awaited(t, "enforce")

	answer(t, in, noContentAnswer+"more", len(noContentAnswer), Denied)

	lastReason(t, c, policy.ReasonMalformed)
}

// The program may end its side while the end of its answer waits.
func TestAShutdownWhileTheEndOfAnAnswerWaitsEndsItOnce(t *testing.T) {
	_, c, in := awaited(t, "enforce")
	asked, grant := make(chan struct{}), make(chan struct{})
	c.OnFinish = func(m *frame.Finish) (*frame.Answer, error) {
		close(asked)
		<-grant
		return guardtest.GrantFinish(m)
	}
	left := make(chan Outcome, 1)
	go func() {
		_, outcome := in.Answer([]byte(noContentAnswer))
		left <- outcome
	}()
	<-asked

	in.Close(false)
	in.Lost()
	close(grant)

	if outcome := <-left; outcome != Allowed || len(c.Ended()) != 0 {
		t.Errorf("outcome %d, ends %+v", outcome, c.Ended())
	}
}

func TestTheWordOfAnAwaitedEndHasADeadline(t *testing.T) {
	_, a, g, _, _ := linked(t)
	in := accept(t, g)
	admitted := make(chan Admission, 1)
	go func() { admitted <- in.Admit([]byte(postRequest), nil) }()
	id, _ := a.next()
	a.say(id, &frame.Answer{Allowed: true, Reason: "allowed", Call: guardtest.Call, Invocation: guardtest.Invocation, Hold: true})
	a.next() // the verdict
	released(t, <-admitted)
	began := time.Now()

	answer(t, in, noContentAnswer, 0, Denied) // nobody answers

	if took := time.Since(began); took < 250*time.Millisecond || took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	var kinds []string
	for len(kinds) < 3 {
		_, m := a.next()
		switch m := m.(type) {
		case *frame.Finish:
			kinds = append(kinds, "finish "+m.Outcome)
		case *frame.End:
			kinds = append(kinds, "end "+m.Outcome)
		case *frame.Verdict:
			kinds = append(kinds, "verdict "+m.Record.Reason)
		}
	}
	if got := strings.Join(kinds, ", "); got != "finish answered, verdict controller_unavailable, end closed" {
		t.Errorf("told: %s", got)
	}
}
