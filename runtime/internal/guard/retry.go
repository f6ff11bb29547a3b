package guard

import (
	"slices"

	"kalium.dev/kalium/runtime/internal/policy"
)

// lostMax bounds the messages of an invocation that may be sent again.
const lostMax = 16

// lostMessage was sent on a connection that ended without a byte of its answer.
type lostMessage struct {
	message policy.Message
	left    int  // how often it may still be sent again
	waiting bool // it is not on its way now
}

func (l *lostMessage) take() { l.left, l.waiting = l.left-1, false }

// lose is told by the holder of a connection that m, which was allowed for the invocation, got no byte of an answer before
// the connection ended. The same message then stays in the state, as often as the policy's line says. number is that of an
// app edge: only the last one is the controller's to repeat.
func (g *Guard) lose(inv *invocation, m *policy.Message, number int) {
	if inv == nil {
		return
	}
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	if inv.over() || inv.among != nil || number != 0 && number != inv.edges {
		return
	}
	for i := range inv.lost {
		if sameMessage(&inv.lost[i].message, m) {
			inv.lost[i].waiting = true
			return
		}
	}
	if len(inv.lost) < lostMax {
		kept := *m
		kept.Query = slices.Clone(m.Query)
		inv.lost = append(inv.lost, lostMessage{message: kept, left: inv.retries(m), waiting: true})
	}
}

// retries is how often m may be sent again: as often as every line allows that it may belong to.
func (inv *invocation) retries(m *policy.Message) int {
	least, found := 0, false
	for i := range inv.function.Symbols {
		if symbol := &inv.function.Symbols[i]; symbol.Matches(m) && (!found || symbol.Retries < least) {
			least, found = symbol.Retries, true
		}
	}
	return least
}

// retry finds the lost message that m repeats. The walk's lock is held.
func (inv *invocation) retry(m *policy.Message) *lostMessage {
	for i := range inv.lost {
		if l := &inv.lost[i]; l.waiting && l.left > 0 && sameMessage(&l.message, m) {
			return l
		}
	}
	return nil
}

// retryTo finds the lost app edge that m repeats, whatever its callback is. The walk's lock is held.
func (inv *invocation) retryTo(m *policy.Message) *lostMessage {
	repeated := *m
	for i := range inv.lost {
		repeated.Callback = inv.lost[i].message.Callback
		if l := &inv.lost[i]; l.waiting && l.left > 0 && sameMessage(&l.message, &repeated) {
			return l
		}
	}
	return nil
}

// forget is told that m was sent as a message of its own: it may be sent again in its turn, and after an app edge no
// earlier one. The walk's lock is held.
func (inv *invocation) forget(m *policy.Message) {
	inv.lost = slices.DeleteFunc(inv.lost, func(l lostMessage) bool {
		return sameMessage(&l.message, m) || m.Kind == policy.KindInvoke && l.message.Kind == policy.KindInvoke
	})
}

// sameMessage compares requests and invokes. Messages of other kinds are never sent again.
func sameMessage(a, b *policy.Message) bool {
	switch {
	case a.Kind != b.Kind || a.Peer != b.Peer:
		return false
	case a.Kind == policy.KindInvoke:
		return a.Callee == b.Callee && a.Asynchronous == b.Asynchronous && a.Callback == b.Callback
	case a.Kind == policy.KindHTTP, a.Kind == policy.KindHTTPS:
		return a.Method == b.Method && a.Path == b.Path && slices.Equal(a.Query, b.Query) && a.Upgrade == b.Upgrade && a.GRPC == b.GRPC
	}
	return false
}
