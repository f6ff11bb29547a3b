package guard

import (
	"errors"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// Denials beyond this rate may be why an answer is late: the agent writes each of them down.
const (
	noiseBurst     = 200
	noisePerSecond = 100
	noiseLasts     = 5 * time.Second
)

// noise knows whether the program has its messages denied at a rate that keeps the agent busy.
type noise struct {
	bucket
	last atomic.Pointer[time.Time] // when it was beyond the rate
}

func (n *noise) hear(now time.Time) {
	if !n.take(now, noiseBurst, noisePerSecond) {
		n.last.Store(&now)
	}
}

func (n *noise) loud(now time.Time) bool {
	last := n.last.Load()
	return last != nil && now.Sub(*last) < noiseLasts
}

// decision is what became of a question about an app edge.
type decision struct {
	policy.Verdict
	failMode   string // by which it was decided; "" when an answer decided
	unanswered bool   // nobody has answered
	unknown    bool   // whether the controller has taken the step is not known, and no fail mode may say
}

// decide reads the answer to a question, or its absence. complete says that an answer carries what a grant has to carry.
//
// Nobody has answered when the agent is gone, when nothing came until the deadline, or when the agent or a controller says
// that there was nobody. Only then the fail mode decides, by known where that is last_known. An instance that may have
// brought it about by itself is denied in every mode, and so is one whose answer contradicts itself.
func (g *Guard) decide(r rule, answer *frame.Answer, err error, complete bool, known policy.Verdict) decision {
	switch {
	case errors.Is(err, errLinkDown), errors.Is(err, errNoAnswer) && !g.noise.loud(g.now()):
		return g.unanswered(r, known)
	case err != nil:
		return decision{Verdict: policy.Verdict{Reason: policy.ReasonOverloaded}, unknown: !errors.Is(err, errLinkFull)}
	}
	reason := policy.Reason(answer.Reason)
	switch {
	case answer.Allowed && complete && reason == policy.ReasonAllowed:
		return decision{Verdict: policy.Verdict{Allowed: true, Reason: policy.ReasonAllowed}}
	case answer.Allowed, reason == policy.ReasonAllowed, !reason.Known():
		return decision{Verdict: policy.Verdict{Reason: policy.ReasonMalformed}, unknown: true}
	case reason == policy.ReasonControllerUnavailable:
		return g.unanswered(r, known)
	}
	expected := answer.Expected
	if len(expected) > policy.ExpectedMax {
		expected = expected[:policy.ExpectedMax]
	}
	return decision{Verdict: policy.Verdict{Reason: reason, Expected: expected}}
}

// unanswered decides an app edge by the fail mode of r. known is the verdict of last_known. Without a lease no mode lets
// anything pass.
func (g *Guard) unanswered(r rule, known policy.Verdict) decision {
	if !g.leased() {
		return decision{Verdict: policy.Verdict{Reason: policy.ReasonLeaseExpired}, unanswered: true}
	}
	d := decision{failMode: r.policy.AppEdge.String(), unanswered: true}
	switch r.policy.AppEdge {
	case policy.FailAllow:
		d.Verdict = policy.Verdict{Allowed: true, Reason: policy.ReasonAllowed}
	case policy.FailLastKnown:
		d.Verdict = known
	default:
		d.Verdict = policy.Verdict{Reason: policy.ReasonControllerUnavailable}
	}
	return d
}

// verdictIf says yes, or no for a reason.
func verdictIf(yes bool, otherwise policy.Reason) policy.Verdict {
	if yes {
		return policy.Verdict{Allowed: true, Reason: policy.ReasonAllowed}
	}
	return policy.Verdict{Reason: otherwise}
}

func (g *Guard) leased() bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.now().Before(g.leaseEnds)
}

// orphaned is told that the agent is gone. The connection cannot be made again from inside of the sandbox, so the instance
// has to be replaced: at once, or, where the fail mode lets it serve without a controller, when its lease has ended.
func (g *Guard) orphaned() {
	s := g.standNew()
	if g == nil || s.off() {
		return
	}
	if s.policy.AppEdge != policy.FailAllow && s.policy.AppEdge != policy.FailLastKnown {
		g.retire()
		return
	}
	g.mu.RLock()
	left := g.leaseEnds.Sub(g.now())
	g.mu.RUnlock()
	time.AfterFunc(max(left, 0), g.retire)
}

// isID tells what the controller mints: calls, invocations and tokens.
func isID(text string) bool {
	if len(text) != idDigits {
		return false
	}
	for i := range len(text) {
		if c := text[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

const idDigits = 32
