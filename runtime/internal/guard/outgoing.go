package guard

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// Outgoing judges what a program sends on one connection to a peer. Bytes go in as they were written and come out when
// the unit that they belong to was judged.
type Outgoing struct {
	g *Guard
	t *timing // nil when nothing is measured

	cut atomic.Pointer[func()] // ends the connection

	mu    sync.Mutex
	peers []policy.Peer // that have the connection's address, by name; fewer when the program has said whom it means
	front channel       // the bytes as the program writes them
	bound *invocation   // that the connection belongs to
}

func newOutgoing(g *Guard, peers []policy.Peer) *Outgoing {
	o := &Outgoing{g: g, t: g.timing(), peers: peers}
	o.front = channel{o: o, speaker: opener{o}}
	return o
}

// newMarked is a connection that enforce would have refused.
func newMarked(g *Guard) *Outgoing {
	o := &Outgoing{g: g}
	o.front = channel{o: o, opaque: true}
	return o
}

// OnSever sets how the guard ends the connection by itself. cut must not call back.
func (o *Outgoing) OnSever(cut func()) { o.cut.Store(&cut) }

func (o *Outgoing) sever() {
	if cut := o.cut.Load(); cut != nil {
		(*cut)()
	}
}

// Write takes bytes that the program sends and returns those that may leave now, before and beside those that are held.
// send is b itself, cut, when all of it passes as it is, and otherwise memory that is valid until the next call. Denied:
// send holds what was judged before the denied unit; none of the bytes behind it leave, and the connection must be ended.
func (o *Outgoing) Write(b []byte) (send []byte, outcome Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.t.begin()
	defer o.t.end()
	return o.front.take(b)
}

// Held tells how many bytes wait for the rest of their unit, and since when.
func (o *Outgoing) Held() (n int, since time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.front.held), o.front.since
}

// Expire judges bytes that waited longer than HoldMax, or that nothing can follow any more (cut). Marked: send leaves as
// it is.
func (o *Outgoing) Expire(cut bool) (send []byte, outcome Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.front.held) == 0 {
		return nil, Allowed
	}
	reason := policy.ReasonHeldTooLong
	if cut {
		reason = policy.ReasonMalformed
	}
	return o.front.giveUp(reason)
}

// Close forgets the connection.
func (o *Outgoing) Close() {
	o.mu.Lock()
	inv := o.bound
	o.bound = nil
	o.mu.Unlock()
	if inv != nil {
		inv.unbind(o)
	}
}

// opener chooses the protocol by what the peers at this address speak; only where one port has both, the first byte tells.
type opener struct{ o *Outgoing }

func (p opener) unit(data []byte, _ *output) ruling {
	o := p.o
	speaks := map[string]bool{}
	for _, peer := range o.peers {
		speaks[peer.Protocol] = true
	}
	switch {
	case speaks[policy.ProtocolMySQL] && len(speaks) == 1: // its server speaks first, so nothing could tell it from others
		o.front.speaker = newMySQLSpeaker(o)
	case speaks[policy.ProtocolMySQL]:
		return ruling{outcome: o.refuse("bytes where two protocols are", policy.ReasonUnknownProtocol)}
	case speaks[policy.ProtocolHTTPS] && (!speaks[policy.ProtocolHTTP] || data[0] == recordHandshake):
		o.front.speaker = &tlsSpeaker{o: o}
	default:
		o.front.speaker = &http1Speaker{o: o}
	}
	return ruling{outcome: Allowed}
}

func (opener) whole([]byte) int { return 0 }
func (opener) holdMax() int     { return 0 }

// refuse settles a denial that no message stands for.
func (o *Outgoing) refuse(text string, reason policy.Reason) Outcome {
	return o.settle(text, reason, false)
}

// deny settles bytes of a connection that is over in every mode.
func (o *Outgoing) deny() Outcome { return o.settle("bytes", policy.ReasonConnectionDead, true) }

func (o *Outgoing) settle(text string, reason policy.Reason, never bool) Outcome {
	kind := "other"
	if len(o.peers) > 0 {
		kind = o.peers[0].Protocol
	}
	s := o.g.stand()
	if s.refusal != "" {
		reason = s.refusal
	}
	return o.g.refuse(s, subject{kind: kind, text: kind + " " + text, peer: o.peer(), never: never}, reason, o.g.now())
}

// peer names the peer once it is known.
func (o *Outgoing) peer() string {
	if len(o.peers) == 1 {
		return o.peers[0].Name
	}
	return ""
}

// refuseFor settles what a parser said.
func (o *Outgoing) refuseFor(err error, prefix string) ruling {
	if err == wire.ErrShort {
		return short
	}
	return ruling{outcome: o.refuse(prefix+err.Error(), reasonOf(err))}
}

func reasonOf(err error) policy.Reason {
	var refused *wire.Error
	if errors.As(err, &refused) {
		return refused.Reason
	}
	return policy.ReasonMalformed
}

// support passes what carries messages and is none. It is logged only when there is no right to decide anything.
func (o *Outgoing) support(kind, text string) Outcome {
	s := o.g.stand()
	if s.refusal == "" {
		return Allowed
	}
	return o.g.refuse(s, subject{kind: kind, text: text, peer: o.peer()}, s.refusal, o.g.now())
}
