package guard

import (
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// timedPhase is a part of judging one message.
type timedPhase uint8

// The phases, in the order of experiment E2.
const (
	phaseRecord     timedPhase = iota // a TLS record is found and its head read
	phaseOpen                         // its key is looked up, and it is opened
	phaseEvent                        // the unit is parsed and becomes a policy.Message
	phaseLocal                        // the function CFG is stepped
	phaseController                   // the controller is asked
	phaseTotal                        // everything from the first byte's arrival on, without the send itself
	phaseReseal                       // the judged bytes are sealed again
	timedPhases
)

const (
	notTimed = -1 // the phase cannot occur for this message

	timesWaitingMax = 4096                  // samples that wait to be told
	timesFrameMax   = 64                    // samples of one frame: a question never waits long behind it
	timesEvery      = 20 * time.Millisecond // between two looks at what waits
	timesQueueMax   = queueMax / 2          // beyond it the link's queue is kept for verdicts
)

// Relations between the bounds; a negative length does not compile.
var _ [frame.ItemsMax - timesFrameMax]struct{}

// sample is what one judged message took, in nanoseconds.
type sample struct {
	invocation string
	kind       string
	bytes      int
	spans      [timedPhases]time.Duration
}

// timers collects the samples of one guard and tells them to the agent in batches. Nobody waits for it: a sample that
// finds no room is counted and lost. It is woken by its own clock, so that a judged message wakes nobody.
type timers struct {
	origin time.Time
	tell   func(*frame.Times) bool

	mu      sync.Mutex
	waiting []sample
	spare   []sample
	dropped int
}

// StartTimers begins to measure judged messages and to tell the agent. It is called before anything is judged, and without it
// there is no clock to read.
func (g *Guard) StartTimers(l *Link) {
	g.timers = newTimers(l.times)
	go g.timers.run(l.down)
}

func newTimers(tell func(*frame.Times) bool) *timers {
	return &timers{
		origin: time.Now(), tell: tell,
		waiting: make([]sample, 0, timesWaitingMax), spare: make([]sample, 0, timesWaitingMax),
	}
}

func (ts *timers) run(down <-chan struct{}) {
	tick := time.NewTicker(timesEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			ts.flush()
		case <-down:
			return
		}
	}
}

// flush tells what waits. What the agent does not take now is lost, and counted in the next frame that it takes.
func (ts *timers) flush() {
	ts.mu.Lock()
	batch, dropped := ts.waiting, ts.dropped
	ts.waiting, ts.dropped = ts.spare, 0
	ts.mu.Unlock()
	for from := 0; from < len(batch) || dropped > 0; {
		to := min(from+timesFrameMax, len(batch))
		if !ts.tell(timesOf(batch[from:to], dropped)) {
			dropped += len(batch) - from
			break
		}
		from, dropped = to, 0
	}
	ts.mu.Lock()
	ts.spare = batch[:0]
	ts.dropped += dropped
	ts.mu.Unlock()
}

func timesOf(samples []sample, dropped int) *frame.Times {
	m := &frame.Times{Dropped: dropped}
	// One of the lists for each phase, in the phases' order.
	lists := [timedPhases]*[]int{&m.Record, &m.Open, &m.Event, &m.Local, &m.Controller, &m.Total, &m.Reseal}
	for i := range samples {
		s := &samples[i]
		m.Invocation, m.Kind, m.Bytes = append(m.Invocation, s.invocation), append(m.Kind, s.kind), append(m.Bytes, s.bytes)
		for phase, list := range lists {
			*list = append(*list, int(s.spans[phase]))
		}
	}
	return m
}

func (ts *timers) add(s *sample) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if len(ts.waiting) == cap(ts.waiting) {
		ts.dropped++
		return
	}
	ts.waiting = append(ts.waiting, *s)
}

// timing measures the messages of one connection, one after the other. A nil timing does nothing, and reads no clock.
type timing struct {
	to      *timers
	begun   time.Duration // since origin
	last    time.Duration // where the next phase begins
	pending bool          // now is of a message that was judged
	now     sample
}

// timing is what a connection measures with: nil unless StartTimers was called.
func (g *Guard) timing() *timing {
	if g == nil || g.timers == nil {
		return nil
	}
	return &timing{to: g.timers}
}

// begin says that bytes have come.
func (t *timing) begin() {
	if t == nil {
		return
	}
	t.pending = false
	for phase := range t.now.spans {
		t.now.spans[phase] = notTimed
	}
	t.begun = time.Since(t.to.origin)
	t.last = t.begun
}

// mark says that what was done since the last mark was phase.
func (t *timing) mark(phase timedPhase) {
	if t == nil {
		return
	}
	now := time.Since(t.to.origin)
	if t.now.spans[phase] == notTimed {
		t.now.spans[phase] = 0
	}
	t.now.spans[phase] += now - t.last
	t.last = now
}

// skip says that what was done since the last mark belongs to the total only.
func (t *timing) skip() {
	if t == nil {
		return
	}
	t.last = time.Since(t.to.origin)
}

// judged says that the unit was a message. inv may be nil.
func (t *timing) judged(kind string, inv *invocation) {
	if t == nil {
		return
	}
	t.pending = true
	t.now.kind, t.now.bytes, t.now.invocation = kind, 0, ""
	if inv != nil {
		t.now.invocation = inv.id
	}
}

// passed says that n bytes went by unseen; they are measured as a message when that is because nothing is looked at.
func (t *timing) passed(off bool, n int) {
	if off {
		t.judged("off", nil)
		t.sized(n)
	}
}

// sized says how many bytes the unit has. The innermost stream says it first, and what it says counts: a message under
// TLS has the size of its plaintext.
func (t *timing) sized(n int) {
	if t != nil && t.pending && t.now.bytes == 0 {
		t.now.bytes = n
	}
}

// next says that another unit follows in the same bytes. Measured so far is a message of its own.
func (t *timing) next() {
	if t != nil && t.pending {
		t.end()
		t.begin()
	}
}

// end says that everything that was at hand is judged.
func (t *timing) end() {
	if t == nil || !t.pending {
		return
	}
	t.pending = false
	t.now.spans[phaseTotal] = time.Since(t.to.origin) - t.begun
	t.to.add(&t.now)
}

// times tells the agent samples, without waiting. It says no when the agent does not take them now.
func (l *Link) times(m *frame.Times) bool {
	if len(l.queue) >= timesQueueMax {
		return false
	}
	b, err := frame.Append(nil, 0, m)
	return err == nil && l.send(&b, nil) == nil
}
