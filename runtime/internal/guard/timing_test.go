package guard

import (
	"crypto/tls"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// told keeps the frames that timers tell, and takes none while it is deaf.
type told struct {
	frames []*frame.Times
	deaf   bool
}

func (o *told) take(m *frame.Times) bool {
	if !o.deaf {
		o.frames = append(o.frames, m)
	}
	return !o.deaf
}

func measured() (*told, *timers, *timing) {
	listener := &told{}
	ts := newTimers(listener.take)
	return listener, ts, &timing{to: ts}
}

func (o *told) samples() (n, dropped int) {
	for _, m := range o.frames {
		n, dropped = n+len(m.Kind), dropped+m.Dropped
	}
	return n, dropped
}

func TestAPhaseThatDidNotOccurIsNoZero(t *testing.T) {
	listener, ts, timing := measured()

	timing.begin()
	timing.mark(phaseEvent)
	time.Sleep(time.Millisecond)
	timing.mark(phaseLocal)
	timing.mark(phaseEvent) // once more: what it took is added
	timing.skip()
	timing.judged("http", &invocation{id: "i"})
	timing.sized(77)
	timing.sized(99) // of the stream around it
	timing.end()
	ts.flush()

	if len(listener.frames) != 1 {
		t.Fatalf("%d frames", len(listener.frames))
	}
	m := listener.frames[0]
	for name, list := range map[string][]int{"record": m.Record, "open": m.Open, "controller": m.Controller, "reseal": m.Reseal} {
		if !slices.Equal(list, []int{notTimed}) {
			t.Errorf("%s is %v", name, list)
		}
	}
	if m.Event[0] < 0 || m.Local[0] < int(time.Millisecond) || m.Total[0] < m.Event[0]+m.Local[0] {
		t.Errorf("event %d, local %d, total %d", m.Event[0], m.Local[0], m.Total[0])
	}
	if m.Kind[0] != "http" || m.Invocation[0] != "i" || m.Bytes[0] != 77 || m.Dropped != 0 {
		t.Errorf("%+v", m)
	}
	if _, err := frame.Append(nil, 0, m); err != nil {
		t.Error(err)
	}
}

func TestAUnitThatWasNoMessageLeavesNoTrace(t *testing.T) {
	listener, ts, timing := measured()

	timing.begin()
	timing.mark(phaseRecord)
	timing.begin()
	timing.judged("off", nil)
	timing.end()
	timing.end() // nothing more
	ts.flush()

	if m := listener.frames[0]; len(m.Kind) != 1 || m.Record[0] != notTimed || m.Invocation[0] != "" || m.Total[0] < 0 {
		t.Errorf("%+v", m)
	}
}

func TestSamplesComeInOrderAndInFramesOfABoundedSize(t *testing.T) {
	listener, ts, timing := measured()
	for i := range 2*timesFrameMax + 1 {
		timing.begin()
		timing.judged("http", nil)
		timing.sized(i)
		timing.end()
	}
	ts.flush()
	ts.flush() // nothing is told twice

	var sizes, bytes []int
	for _, m := range listener.frames {
		sizes, bytes = append(sizes, len(m.Kind)), append(bytes, m.Bytes...)
	}
	if !slices.Equal(sizes, []int{timesFrameMax, timesFrameMax, 1}) || !slices.IsSorted(bytes) {
		t.Errorf("frames of %v samples, bytes %v", sizes, bytes)
	}
}

func TestSamplesWithoutRoomAreCountedAndTold(t *testing.T) {
	listener, ts, timing := measured()
	many := func(n int) {
		for range n {
			timing.begin()
			timing.judged("http", nil)
			timing.end()
		}
	}
	many(timesWaitingMax + 3)
	listener.deaf = true
	ts.flush() // the agent takes nothing: all of them are lost
	many(2)
	listener.deaf = false
	ts.flush()
	many(1)
	ts.flush()

	if n, dropped := listener.samples(); n != 3 || dropped != timesWaitingMax+3 {
		t.Errorf("%d samples and %d dropped", n, dropped)
	}
	// What was lost is told even when nothing else is.
	listener.deaf, listener.frames = true, nil
	many(1)
	ts.flush()
	listener.deaf = false
	ts.flush()
	if n, dropped := listener.samples(); n != 0 || dropped != 1 {
		t.Errorf("%d samples and %d dropped", n, dropped)
	}
}

func TestALinkThatIsHalfFullIsLeftToVerdicts(t *testing.T) {
	ours, _ := net.Pipe() // nobody reads
	l := NewLink(ours, 1, nil)
	for range timesQueueMax {
		if !l.times(timesOf(nil, 0)) {
			t.Fatal("refused too early")
		}
	}

	if l.times(timesOf(nil, 0)) {
		t.Error("taken beyond the half")
	}
	if err := l.Log(soon(), &frame.VerdictRecord{Event: frame.EventVerdict, Reason: "allowed"}); err != nil {
		t.Error(err)
	}
}

func TestTheAgentHearsOfSamples(t *testing.T) {
	l, a, g, _, _ := linked(t)
	if g.timing() != nil {
		t.Fatal("timers that nobody asked for")
	}
	g.StartTimers(l)
	timing := g.timing()
	timing.begin()
	timing.judged("https", nil)
	timing.sized(9)
	timing.end()

	if _, m := a.next(); m.(*frame.Times).Bytes[0] != 9 {
		t.Errorf("the agent heard %+v", m)
	}
}

func TestWithoutTimersNothingIsDone(t *testing.T) {
	var g *Guard
	timing := g.timing()

	if n := testing.AllocsPerRun(10, func() { judgedOnce(timing) }); n != 0 || timing != nil {
		t.Errorf("%v allocations", n)
	}
}

func TestAMeasuredMessageAllocatesNothing(t *testing.T) {
	timing := &timing{to: newTimers((&told{deaf: true}).take)}

	if n := testing.AllocsPerRun(100, func() { judgedOnce(timing) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestBytesThatPassUnseenAreMeasuredOnlyWhenTheModeIsOff(t *testing.T) {
	for mode, want := range map[string]int{"off": 1, "audit": 0} {
		g, _ := newGuard(t, mode)
		listener := &told{}
		g.timers = newTimers(listener.take)
		if _, outcome := newMarked(g).Write([]byte("anything")); outcome != Allowed {
			t.Fatalf("%s: %v", mode, outcome)
		}
		g.timers.flush()

		n, _ := listener.samples()
		if n != want || n == 1 && (listener.frames[0].Kind[0] != "off" || listener.frames[0].Bytes[0] != 8) {
			t.Errorf("%s: %d samples, %+v", mode, n, listener.frames)
		}
	}
}

func TestUnderTLSEveryPhaseButTheControllersIsMeasured(t *testing.T) {
	for name, version := range versions {
		g, c, _ := invoked(t, "enforce")
		listener := &told{}
		g.timers = newTimers(listener.take)
		s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test", MaxVersion: version}), &tls.Config{})
		for range 3 {
			if _, err := io.WriteString(s, getI); err != nil {
				t.Fatalf("%s: %v, %+v", name, err, c.Verdicts())
			}
		}
		g.timers.flush()

		m := listener.frames[0]
		if len(listener.frames) != 1 || len(m.Kind) != 3 {
			t.Fatalf("%s: %+v", name, m)
		}
		for i := range m.Kind {
			sum := m.Record[i] + m.Open[i] + m.Event[i] + m.Local[i] + m.Reseal[i]
			least := min(m.Record[i], m.Open[i], m.Event[i], m.Local[i], m.Reseal[i])
			if least < 0 || m.Controller[i] != notTimed || m.Total[i] < sum || m.Kind[i] != "https" || m.Bytes[i] != len(getI) {
				t.Errorf("%s: sample %d of %+v", name, i, m)
			}
		}
	}
}

// judgedOnce is what a TLS message does to its timing.
func judgedOnce(t *timing) {
	t.begin()
	t.mark(phaseRecord)
	t.mark(phaseOpen)
	t.mark(phaseEvent)
	t.mark(phaseLocal)
	t.mark(phaseController)
	t.judged("https", nil)
	t.sized(1024)
	t.skip()
	t.mark(phaseReseal)
	t.end()
}

// BenchmarkTimedWrite is a request of 1 KiB in clear from its write to what leaves, measured and not.
func BenchmarkTimedWrite(b *testing.B) {
	head := request("GET /a", "api.test:8080", "X-Filling: "+strings.Repeat("x", 1024-len(request("GET /a", "api.test:8080", "X-Filling: \r\n")))+"\r\n")
	for _, timers := range []string{"off", "on"} {
		b.Run("timers="+timers, func(b *testing.B) {
			g := judging(b, newLogging(b))
			if timers == "on" {
				g.timers = newTimers((&told{deaf: true}).take)
			}
			out := connect(b, g, guardtest.HostAddress+":8080")
			data := []byte(head)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				g.live.cursor[0] = 1 << 0 // the state where it may be sent
				if _, outcome := out.Write(data); outcome != Allowed {
					b.Fatal("denied")
				}
				if timers == "on" && i%timesWaitingMax == 0 {
					g.timers.flush()
				}
			}
		})
	}
}
