package guard

import (
	"kalium.dev/kalium/runtime/internal/policy"
)

// retryJudging marks the verdict of a message that is sent again and moves nothing.
const retryJudging = "retry"

// judge steps the function CFG with m, which is what an invocation wants to send, and returns the invocation that the
// message was attributed to. ask is the app edge's question, nil for other messages; the cursor moves only when both
// agree.
func (g *Guard) judge(t *timing, m *policy.Message, kind string, ask func(*invocation) (policy.Verdict, error)) (Outcome, *invocation) {
	return g.judgeOf(t, "", m, kind, ask)
}

// judgeOf is judge for a message that says which call it belongs to. That is asked for only where an app edge could
// belong to several.
func (g *Guard) judgeOf(t *timing, call string, m *policy.Message, kind string, ask func(*invocation) (policy.Verdict, error)) (Outcome, *invocation) {
	if g == nil {
		return Denied, nil
	}
	began := g.now()
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	what := subject{kind: kind, text: g.walk.text(m), peer: m.Peer}
	s := g.stand()
	switch {
	case s.off():
		return Marked, nil
	case s.refusal != "":
		return g.refuse(s, what, s.refusal, began), nil
	case s.invocation == nil:
		return g.refuse(s, what, policy.ReasonNoInvocation, began), nil
	}
	t.mark(phaseEvent)
	step := g.walk.try(call, m, ask != nil, s.invocation)
	t.mark(phaseLocal)
	inv := step.by
	s.invocation, s.rule = inv, inv.rule
	verdict := step.verdict
	switch {
	case step.again != nil:
		what.judging = retryJudging
	case verdict.Allowed:
		g.walk.states = step.next.AppendStates(g.walk.states[:0])
		verdict.States = g.walk.states
	}
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
		if complete := g.walk.take(&step, m); complete != nil {
			g.drop(complete)
		}
	}
	t.judged(kind, inv)
	return outcome, inv
}

// could tells whether m would be allowed now. Nothing moves, and only a denial is logged.
func (g *Guard) could(m *policy.Message, kind string) Outcome {
	if g == nil {
		return Denied
	}
	began := g.now()
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	what := subject{kind: kind, text: g.walk.text(m), peer: m.Peer}
	s := g.stand()
	switch {
	case s.off():
		return Marked
	case s.refusal != "":
		return g.refuse(s, what, s.refusal, began)
	case s.invocation == nil:
		return g.refuse(s, what, policy.ReasonNoInvocation, began)
	}
	step := g.walk.try("", m, false, s.invocation)
	if step.verdict.Allowed {
		return Allowed
	}
	s.invocation, s.rule = step.by, step.by.rule
	return g.settle(s, what, step.verdict, began)
}

// knows tells whether m stands anywhere in the CFG of an invocation that is not over. A statement that is prepared now
// is judged when it is executed.
func (g *Guard) knows(m *policy.Message) bool {
	if g == nil {
		return false
	}
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	s := g.stand()
	if s.off() {
		return true
	}
	if s.refusal != "" {
		return false
	}
	for _, inv := range g.walk.parts {
		if inv.function.Knows(m) {
			return true
		}
	}
	// Pools prepare their statements when nothing is asked of them.
	return len(g.walk.parts) == 0 && s.function.Knows(m)
}
