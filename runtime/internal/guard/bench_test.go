package guard

import (
	"io"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

// nobody is a controller that grants and forgets everything.
type nobody struct{}

func (nobody) Start(time.Time, *frame.Start) (*frame.Answer, error) { return guardtest.GrantStart(nil) }
func (nobody) Invoke(time.Time, *frame.Invoke) (*frame.Answer, error) {
	return guardtest.GrantInvoke(nil)
}
func (nobody) Finish(time.Time, *frame.Finish) (*frame.Answer, error) {
	return guardtest.GrantFinish(nil)
}
func (nobody) End(*frame.End)                            {}
func (nobody) Mode(*frame.Mode)                          {}
func (nobody) Log(time.Time, *frame.VerdictRecord) error { return nil }

// logging is nobody with the log of a link.
type logging struct {
	nobody
	link *Link
}

// newLogging begins with a full queue, so that all buffers are there that will ever be.
func newLogging(t testing.TB) logging {
	t.Helper()
	l := logging{link: NewLink(swallowed{make(chan struct{})}, 1, nil)}
	for range queueMax {
		if err := l.link.Log(time.Time{}, &frame.VerdictRecord{Event: frame.EventVerdict, Reason: "allowed"}); err != nil {
			t.Fatal(err)
		}
	}
	go l.link.write(func(string) {})
	return l
}

func (l logging) Log(deadline time.Time, r *frame.VerdictRecord) error {
	return l.link.Log(deadline, r)
}

// swallowed is a connection to an agent that says nothing.
type swallowed struct{ closed chan struct{} }

func (s swallowed) Read([]byte) (int, error)    { <-s.closed; return 0, io.EOF }
func (s swallowed) Write(b []byte) (int, error) { return len(b), nil }
func (s swallowed) Close() error                { close(s.closed); return nil }

// putP may be sent again and again where the CFG is in state 3.
var putP = &policy.Message{Kind: policy.KindHTTPS, Peer: "images", Method: "PUT", Path: "/p"}

func judging(t testing.TB, c Controller) *Guard {
	t.Helper()
	g, err := New(testIdentity, guardtest.PublicKey, guardtest.Welcome(t, "enforce"), c)
	if err != nil {
		t.Fatal(err)
	}
	in, _ := g.Accept(8080, client)
	if a := in.Admit([]byte(postRequest), nil); a.Release == nil {
		t.Fatal("not released")
	}
	g.live.cursor = atState(g, 3)
	return g
}

func judgePut(t testing.TB, g *Guard) {
	if outcome, _ := g.judge(nil, putP, "https"); outcome != Allowed {
		t.Fatal("denied")
	}
}

func TestAMessageIsJudgedWithoutAllocations(t *testing.T) {
	for name, c := range map[string]Controller{
		"nobody": nobody{}, "a link": newLogging(t),
	} {
		g := judging(t, c)
		for range 100 {
			judgePut(t, g)
		}

		if n := testing.AllocsPerRun(1000, func() { judgePut(t, g) }); n != 0 {
			t.Errorf("%s: %v allocations for a message", name, n)
		}
		if n := testing.AllocsPerRun(1000, func() { g.could(putP, "https") }); n != 0 {
			t.Errorf("%s: %v allocations for what could be sent", name, n)
		}
	}
}

func BenchmarkJudge(b *testing.B) {
	for name, c := range map[string]Controller{"controller=none": nobody{}, "controller=link": newLogging(b)} {
		b.Run(name, func(b *testing.B) {
			g := judging(b, c)
			b.ReportAllocs()
			for b.Loop() {
				judgePut(b, g)
			}
		})
	}
}
