package guard

import (
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

func refuseStart(reason string) func(*frame.Start) (*frame.Answer, error) {
	return func(*frame.Start) (*frame.Answer, error) { return &frame.Answer{Reason: reason}, nil }
}

const probe = "GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"

// admitted tells how long a request waits.
func admitted(t *testing.T, g *Guard) time.Duration {
	t.Helper()
	began := time.Now()
	released(t, accept(t, g).Admit([]byte(postRequest), nil))
	return time.Since(began)
}

func TestAfterTroubleTheInstanceHasToBeSilent(t *testing.T) {
	const quiet = 60 * time.Millisecond
	for name, trouble := range map[string]func(*Guard, *Incoming){
		"the program closes":                   func(_ *Guard, in *Incoming) { in.Close(false) },
		"the peer goes, and the program sees":  func(_ *Guard, in *Incoming) { in.Lost(); in.Close(false) },
		"the answer comes after the peer went": func(_ *Guard, in *Incoming) { in.Lost(); in.Answer([]byte(noContentAnswer)) },
		"a timeout and an answer": func(g *Guard, in *Incoming) {
			g.finish(g.live, outcomeTimeout)
			in.Answer([]byte(noContentAnswer))
		},
	} {
		g, _ := edited(t, "enforce", guardtest.Quiet, `"quiet_ms":60`)
		in := request1(t, g)
		began := time.Now()
		trouble(g, in)

		admitted(t, g)

		if waited := time.Since(began); waited < quiet {
			t.Errorf("%s: the next request waited %v", name, waited)
		}
	}
}

func TestWhatTheProgramSendsPutsTheRestOff(t *testing.T) {
	t.Parallel()
	const quiet = time.Second
	for range 5 { // the program itself may not get to send for so long: that shows nothing
		g, _ := edited(t, "enforce", guardtest.Quiet, `"quiet_ms":1000`)
		in := request1(t, g)
		out := connect(t, g, api)
		began := time.Now()
		in.Close(false)
		done := make(chan time.Time, 1)
		go func() { admitted(t, g); done <- time.Now() }()

		stood := time.Duration(0) // the longest time between two attempts to send
		for last := began; time.Since(began) < 3*quiet/2; {
			time.Sleep(20 * time.Millisecond)
			before := last
			last = time.Now()
			out.Write([]byte("x")) // held or denied: an attempt all the same
			stood = max(stood, time.Since(before))
		}

		waited := (<-done).Sub(began)
		if waited >= 3*quiet/2 {
			return
		}
		if stood < quiet {
			t.Fatalf("the next request waited %v", waited)
		}
	}
	t.Error("the program never got to send in time")
}

func TestAnAnsweredInvocationNeedsNoSilence(t *testing.T) {
	g, _ := edited(t, "enforce", guardtest.Quiet, `"quiet_ms":9000`) // sooner than a request is refused that waits
	respond(t, request1(t, g))

	if waited := admitted(t, g); waited > 5*time.Second {
		t.Errorf("the next request waited %v", waited)
	}
}

func TestAnInstanceThatDoesNotComeToRestIsRetired(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := edited(t, mode, guardtest.Retire, `"retire_ms":30`)
		in := request1(t, g)
		waiting := make(chan Admission, 1)
		go func() { waiting <- accept(t, g).Admit([]byte(postRequest), nil) }()
		untilWaiting(t, g, 1)

		in.Lost() // and the program goes on working

		refusedWith(t, <-waiting, "503", "retired")
		if r := c.Last(t); r.Kind != "start" || r.Allowed || r.Reason != "retired" {
			t.Errorf("verdict %+v", r)
		}
		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")
		refusedWith(t, accept(t, g).Admit([]byte(probe), nil), "503", "retired")
		in.Close(false)
		time.Sleep(250 * time.Millisecond)
		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")
		if n := len(c.Started()); n != 1 {
			t.Errorf("%d starts", n)
		}
	}
}

func TestAnInstanceThatCameToRestIsNotRetired(t *testing.T) {
	t.Parallel()
	g, _ := edited(t, "enforce", guardtest.Retire, `"retire_ms":1500`, guardtest.Quiet, `"quiet_ms":1`)
	request1(t, g).Close(false)
	respond(t, request1(t, g))
	time.Sleep(2 * time.Second)

	released(t, accept(t, g).Admit([]byte(probe), nil))
	released(t, accept(t, g).Admit([]byte(postRequest), nil))
}

func TestATimeoutCountsAsTrouble(t *testing.T) {
	g, c := edited(t, "enforce", guardtest.Timeout, `"invocation_timeout_ms":200`, guardtest.Retire, `"retire_ms":20`)
	request1(t, g)

	refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")

	if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "timeout" {
		t.Errorf("ends %+v", ends)
	}
}

func TestReuseNever(t *testing.T) {
	never := []string{guardtest.Reuse, `"reuse":"never"`}
	t.Run("the second request", func(t *testing.T) {
		g, c := edited(t, "enforce", never...)
		in := request1(t, g)
		released(t, accept(t, g).Admit([]byte(probe), nil)) // while the first one runs the instance is well
		waiting := make(chan Admission, 1)
		go func() { waiting <- accept(t, g).Admit([]byte(postRequest), nil) }()
		untilWaiting(t, g, 1)
		respond(t, in)

		refusedWith(t, <-waiting, "503", "retired")
		refusedWith(t, in.Admit([]byte(postRequest), nil), "503", "retired")
		refusedWith(t, accept(t, g).Admit([]byte(probe), nil), "503", "retired")
		if n := len(c.Started()); n != 1 {
			t.Errorf("%d starts", n)
		}
	})
	t.Run("a refused start takes nothing", func(t *testing.T) {
		g, c := edited(t, "enforce", never...)
		c.OnStart = refuseStart("bad_token")
		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "403", "bad_token")
		c.OnStart = guardtest.GrantStart

		request1(t, g)
	})
	t.Run("the peer goes", func(t *testing.T) {
		g, _ := edited(t, "enforce", never...)
		request1(t, g).Lost()

		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")
	})
	t.Run("the tail is not cut", func(t *testing.T) {
		g, _ := edited(t, "enforce", append(never, selectText, selectTail)...)
		in := request1(t, g)
		judged(t, g, Allowed, getA)
		respond(t, in)
		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "503", "retired")

		released(t, accept(t, g).Admit([]byte(probe), nil))
		judged(t, g, Allowed, selectItems)
		refusedWith(t, accept(t, g).Admit([]byte(probe), nil), "503", "retired")
	})
}

func TestARequestThatTheProgramNeverSawNeedsNoSilence(t *testing.T) {
	g, c := edited(t, "enforce", guardtest.Quiet, `"quiet_ms":9000`, guardtest.Reuse, `"reuse":"never"`)
	gone := make(chan struct{})
	c.OnStart = func(m *frame.Start) (*frame.Answer, error) { close(gone); return guardtest.GrantStart(m) }
	if a := accept(t, g).Admit([]byte(postRequest), gone); !a.Gone {
		t.Fatalf("admission %+v", a)
	}
	c.OnStart = guardtest.GrantStart

	if waited := admitted(t, g); waited > 5*time.Second {
		t.Errorf("the next request waited %v", waited)
	}
	if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "closed" {
		t.Errorf("ends %+v", ends)
	}
}

// The ends of a framing in which an answer without a body is whole by its head.
func TestAnswersWithoutABodyEndTheInvocation(t *testing.T) {
	for name, try := range map[string]struct{ request, answer string }{
		"HEAD with a length": {"HEAD / HTTP/1.1\r\nHost: f\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"},
		"HEAD in chunks":     {"HEAD / HTTP/1.1\r\nHost: f\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
		"204":                {postRequest, "HTTP/1.1 204 No Content\r\n\r\n"},
		"304":                {postRequest, "HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n"},
		"early hints":        {postRequest, "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"},
		"two interim ones":   {postRequest, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"},
		"chunks": {postRequest,
			"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"},
	} {
		for _, size := range []int{1, len(try.answer)} {
			g, c := newGuard(t, "enforce")
			in := accept(t, g)
			released(t, in.Admit([]byte(try.request), nil))
			for at := 0; at < len(try.answer); at += size {
				if len(c.Ended()) != 0 {
					t.Fatalf("%s: over at byte %d", name, at)
				}
				if n, outcome := in.Answer([]byte(try.answer[at:min(at+size, len(try.answer))])); outcome != Allowed || n == 0 {
					t.Fatalf("%s: outcome %d at byte %d", name, outcome, at)
				}
			}
			if ends := c.Ended(); len(ends) != 1 || ends[0].Outcome != "answered" {
				t.Errorf("%s in pieces of %d: ends %+v", name, size, ends)
			}
			released(t, in.Admit([]byte(postRequest), nil)) // keep-alive
		}
	}
}
