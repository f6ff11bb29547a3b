package guard

import (
	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// retryJudging marks the verdict of a message that is sent again and moves nothing.
const retryJudging = "retry"

// edge is what an app edge has besides its message.
type edge struct {
	// call is what the program says that it belongs to. That is looked at only where it could belong to several.
	call string
	// ask asks the controller. again: the same edge once more, whose connection ended without a byte of an answer.
	ask func(inv *invocation, again bool) (*frame.Answer, error)

	token, callback string // that were granted
	number          int    // among the edges that its invocation has taken
}

// judge steps the function CFG with m, which is what an invocation wants to send, and returns the invocation that the
// message was attributed to.
func (g *Guard) judge(t *timing, m *policy.Message, kind string) (Outcome, *invocation) {
	return g.judgeEdge(t, m, kind, nil)
}

// judgeEdge is judge for an app edge, where e is not nil. The cursor moves only when function CFG and controller agree. The
// callback of an asynchronous one is written into m.
func (g *Guard) judgeEdge(t *timing, m *policy.Message, kind string, e *edge) (Outcome, *invocation) {
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
	call := ""
	if e != nil {
		call = e.call
		if m.Asynchronous {
			clear := g.walk.callback(call, m, s.invocation)
			what.text = g.walk.text(m)
			if !clear {
				return g.refuse(s, what, policy.ReasonGatewayRule, began), nil
			}
		}
	}
	step := g.walk.try(call, m, e != nil, s.invocation)
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
	if verdict.Allowed && e != nil {
		states, line := verdict.States, verdict.Line
		verdict, what.failMode = g.cross(inv, m, e, step.again != nil)
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
		if e != nil {
			e.number = inv.edges
		}
	}
	t.judged(kind, inv)
	return outcome, inv
}

// cross decides an app edge that the function CFG allows. The walk's lock is held.
func (g *Guard) cross(inv *invocation, m *policy.Message, e *edge, again bool) (v policy.Verdict, failMode string) {
	known := verdictIf(inv.policy.Edge(g.identity.Function, m.Callee), policy.ReasonEdgeNotAllowed)
	switch {
	case inv.unknown:
		return policy.Verdict{Reason: policy.ReasonUnknownState}, ""
	case inv.adrift:
		d := g.unanswered(inv.rule, known)
		if d.Reason == policy.ReasonControllerUnavailable {
			d.Reason = policy.ReasonUnknownState // it may have come back
		}
		return d.Verdict, d.failMode
	}
	answer, err := e.ask(inv, again)
	complete := err == nil && isID(answer.Token) && (m.Callback == "" && answer.Callback == "" || m.Callback != "" && isID(answer.Callback))
	d := g.decide(inv.rule, answer, err, complete, known)
	inv.adrift, inv.unknown = d.unanswered, d.unknown
	if d.Allowed && !d.unanswered {
		e.token, e.callback = answer.Token, answer.Callback
	}
	return d.Verdict, d.failMode
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
