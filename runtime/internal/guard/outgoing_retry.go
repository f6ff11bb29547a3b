package guard

import (
	"slices"
	"strings"

	"kalium.dev/kalium/runtime/internal/policy"
)

const (
	unansweredMax = 16 // requests of a connection that are remembered; the others are not sent again
	// tlsFarewell is the longest record of a close_notify, by which a server says under TLS that it has closed: that is no
	// answer. The shortest answer is longer.
	tlsFarewell = 31
)

// sentRequest was allowed, and no byte of its answer has come.
type sentRequest struct {
	inv     *invocation
	message policy.Message
	edge    int // its number, when it is an app edge
}

// asked remembers a request that leaves. The lock is held.
func (o *Outgoing) asked(inv *invocation, m *policy.Message, edge int) {
	if o.isAnswered() {
		o.sent = o.sent[:0]
	}
	if len(o.sent) < unansweredMax {
		o.sent = append(o.sent, sentRequest{inv, *m, edge})
	}
	o.came.Store(0)
}

// cloned is a message whose texts are no parts of a parser's memory.
func cloned(m *policy.Message) *policy.Message {
	c := *m
	c.Method, c.Path, c.Query, c.Callee = strings.Clone(m.Method), strings.Clone(m.Path), slices.Clone(m.Query), strings.Clone(m.Callee)
	for i := range c.Query {
		c.Query[i] = strings.Clone(c.Query[i])
	}
	return &c
}

func (o *Outgoing) isAnswered() bool {
	if o.tls != nil {
		return o.came.Load() > tlsFarewell
	}
	return o.came.Load() > 0
}

// Answered is told how many bytes have come from the peer: those that the program has read and, at the end, those that it
// has not.
func (o *Outgoing) Answered(n int) { o.came.Add(int64(n)) }

// Ended is told that nothing more will come. Requests without an answer may be sent again then, as often as the policy
// says; which of several an answer belonged to is not looked at.
func (o *Outgoing) Ended() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended()
}

func (o *Outgoing) ended() {
	if !o.isAnswered() {
		for i := range o.sent {
			o.g.lose(o.sent[i].inv, cloned(&o.sent[i].message), o.sent[i].edge) // the connection may go on to use the memory
		}
	}
	o.sent = nil
}
