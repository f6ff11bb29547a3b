package guard

import (
	"crypto/rand"
	"encoding/hex"
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// How an invocation ends, as End spells it.
const (
	outcomeAnswered = "answered"
	outcomeClosed   = "closed"
	outcomeTimeout  = "timeout"
)

// invocation is one released request and its place in the function CFG.
type invocation struct {
	policy   *policy.Policy
	function *policy.Function
	call, id string // "" when the controller granted none, which only audit goes on with

	mu      sync.Mutex // held while the controller is asked: the messages of an invocation have an order
	cursor  policy.Cursor
	ended   bool
	unknown bool // the outcome of an app edge is not known, so where the call stands is not known either
	timer   *time.Timer
}

// judge steps the function CFG with m, which is what the live invocation wants to send. ask is the app edge's question,
// nil for other messages; the cursor moves only when both agree.
func (g *Guard) judge(t *timing, m *policy.Message, kind string, ask func(*invocation) (policy.Verdict, error)) (Outcome, *invocation) {
	began := g.clock()
	s := g.stand()
	what := subject{kind: kind, text: m.Text(), peer: m.Peer, judging: m.Judging}
	inv := s.invocation
	if s.refusal != "" {
		return g.refuse(s, what, s.refusal, began), nil
	}
	if inv == nil {
		return g.refuse(s, what, policy.ReasonNoInvocation, began), nil
	}
	inv.mu.Lock()
	defer inv.mu.Unlock()
	if inv.ended {
		return g.refuse(s, what, policy.ReasonNoInvocation, began), nil
	}
	t.mark(phaseEvent)
	verdict, next := inv.function.Step(inv.cursor, m)
	t.mark(phaseLocal)
	if verdict.Allowed && ask != nil {
		states, line := verdict.States, verdict.Line
		if inv.unknown {
			verdict = policy.Verdict{Reason: policy.ReasonControllerUnavailable}
		} else if answered, err := ask(inv); err != nil {
			inv.unknown = true
			verdict = policy.Verdict{Reason: policy.ReasonControllerUnavailable}
		} else {
			verdict = answered
		}
		t.mark(phaseController)
		if verdict.Line, verdict.States = line, states; !verdict.Allowed {
			verdict.States = inv.cursor.States()
		}
	}
	outcome := g.settle(s, what, verdict, began)
	if outcome == Allowed {
		inv.cursor = next
	}
	t.judged(kind, inv)
	return outcome, inv
}

// begin makes the live invocation. The caller holds the slot.
func (g *Guard) begin(p *policy.Policy, call, id string) *invocation {
	function := p.Functions[g.identity.Function]
	inv := &invocation{policy: p, function: function, call: call, id: id, cursor: function.Start()}
	inv.timer = time.AfterFunc(time.Duration(function.InvocationTimeoutMS)*time.Millisecond, func() { g.end(inv, outcomeTimeout) })
	g.mu.Lock()
	g.live = inv
	g.mu.Unlock()
	return inv
}

// end takes the invocation's cursor away. Only the first end counts. The slot is released by whoever knows that the
// program is done with the request: until then a message could still be a late one of this invocation.
func (g *Guard) end(inv *invocation, outcome string) {
	inv.mu.Lock()
	if inv.ended {
		inv.mu.Unlock()
		return
	}
	inv.ended = true
	inv.mu.Unlock()
	inv.timer.Stop()
	g.mu.Lock()
	if g.live == inv {
		g.live = nil
	}
	g.mu.Unlock()
	if inv.id != "" {
		g.controller.End(&frame.End{Call: inv.call, Invocation: inv.id, Outcome: outcome})
	}
}

// over tells that nothing more may leave for the invocation. No invocation is one that is over.
func (inv *invocation) over() bool {
	if inv == nil {
		return true
	}
	inv.mu.Lock()
	defer inv.mu.Unlock()
	return inv.ended
}

// newStep names one question. The same step asked again would get the stored answer.
func newStep() string {
	var raw [frame.StepBytes / 2]byte
	rand.Read(raw[:]) // never fails, see its documentation
	return hex.EncodeToString(raw[:])
}

// slot lets one request into the instance at a time, in the order of arrival.
type slot struct {
	mu      sync.Mutex
	busy    bool
	waiting []chan struct{}
}

// acquire waits for the slot until the deadline or until gone is closed.
func (s *slot) acquire(wait time.Duration, gone <-chan struct{}) bool {
	s.mu.Lock()
	if !s.busy {
		s.busy = true
		s.mu.Unlock()
		return true
	}
	if len(s.waiting) >= waitingMax {
		s.mu.Unlock()
		return false
	}
	turn := make(chan struct{})
	s.waiting = append(s.waiting, turn)
	s.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-turn:
		return true
	case <-gone:
	case <-timer.C:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, other := range s.waiting {
		if other == turn {
			s.waiting = append(s.waiting[:i], s.waiting[i+1:]...)
			return false
		}
	}
	// The turn came at the same moment: pass it on.
	s.next()
	return false
}

func (s *slot) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next()
}

// next gives the slot to the first in the queue. The lock is held.
func (s *slot) next() {
	if len(s.waiting) == 0 {
		s.busy = false
		return
	}
	turn := s.waiting[0]
	s.waiting = s.waiting[1:]
	close(turn)
}
