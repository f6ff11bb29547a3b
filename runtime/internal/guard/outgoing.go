package guard

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/foreign"
)

// Outgoing judges what a program sends on one connection to a peer. Bytes go in as they were written and come out when
// the unit that they belong to was judged.
//
// Its memory is bounded. Between writes it has what its parsers keep (a head of 16 KiB, the dynamic table of HTTP/2, the
// statements of MySQL: at most about 130 KiB, and mostly less than 2) and the unfinished unit: holdBytesMax, or a packet of
// MySQL more, and under TLS an unfinished record beside it. During a write it has what leaves in place of what was written,
// which is as long and belongs to a pool.
type Outgoing struct {
	g *Guard
	t *timing // nil when nothing is measured

	watching atomic.Bool  // what the server says has to be known
	came     atomic.Int64 // bytes from the peer since the last request

	mu    sync.Mutex
	peers []policy.Peer // that have the connection's address, by name; fewer when the program has said whom it means
	front channel       // the bytes as the program writes them
	tls   *tlsSpeaker   // of front; nil in clear
	// TLS that ends here: whether it does, and with what, from the hello on.
	terminates bool
	ending     *Termination
	rate       bucket        // of support traffic
	sent       []sentRequest // without an answer
}

func newOutgoing(g *Guard, peers []policy.Peer, terminates bool) *Outgoing {
	o := &Outgoing{g: g, t: g.timing(), peers: peers, terminates: terminates}
	o.front = channel{o: o}
	o.choose()
	o.watch()
	return o
}

// choose finds the protocol by what the peers at this address speak.
func (o *Outgoing) choose() {
	speaks := map[string]bool{}
	for _, peer := range o.peers {
		speaks[peer.Protocol] = true
	}
	switch {
	case len(speaks) == 1 && speaks[policy.ProtocolHTTP]:
		o.front.speaker = &http1Speaker{o: o, protocol: policy.ProtocolHTTP}
	case len(speaks) == 1 && speaks[policy.ProtocolHTTPS]:
		o.startTLS(func(t *tlsSpeaker) speaker { return httpOpener{t} })
	case len(speaks) == 1 && speaks[policy.ProtocolMySQL]:
		o.front.speaker = newMySQLSpeaker(o)
	case len(speaks) == 1 && speaks[policy.ProtocolSMTP]:
		o.front.speaker = newSMTPSpeaker(o)
	default:
		o.front.speaker = opener{o}
	}
}

// newMarked is a connection that enforce would have refused.
func newMarked(g *Guard) *Outgoing {
	o := &Outgoing{g: g, t: g.timing()}
	o.front = channel{o: o, opaque: true}
	return o
}

// Write takes bytes that the program sends and returns those that may leave now, before and beside those that are held.
// send is b itself, cut, when all of it passes as it is, and otherwise memory that is valid until the next call. Denied:
// send holds what was judged before the denied unit; none of the bytes behind it leave, and the connection must be ended.
func (o *Outgoing) Write(b []byte) (send []byte, outcome Outcome) {
	o.g.stir()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.t.begin()
	defer o.t.end()
	send, outcome = o.front.take(b)
	o.watch()
	return send, outcome
}

// Sent is told that what Write or Expire returned has left or was copied: its memory is used again.
func (o *Outgoing) Sent() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.front.rest()
}

// Watches tells whether the server's bytes have to be shown to Inbound before the program reads them. Once it says no, it
// stays so.
func (o *Outgoing) Watches() bool { return o.watching.Load() }

// Inbound takes what the server has sent, in its order and each byte once.
func (o *Outgoing) Inbound(b []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.tls != nil {
		o.tls.client.Inbound(b)
	} else if listener, ok := o.front.speaker.(listener); ok {
		listener.server(b)
	}
	o.watch()
}

// listener is a speaker that has to know what the server says.
type listener interface{ server(b []byte) }

// watch says whether Inbound is needed. The lock is held.
func (o *Outgoing) watch() {
	needed := false
	switch {
	case o.front.dead || o.front.opaque:
	case o.tls != nil:
		needed = !o.tls.client.InboundDone()
	default:
		switch o.front.speaker.(type) {
		case listener, opener:
			needed = true
		}
	}
	o.watching.Store(needed)
}

// Held tells how many bytes wait for the rest of their unit, and since when.
func (o *Outgoing) Held() (n int, since time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ending != nil {
		return len(o.ending.plain.held.b), o.ending.plain.since
	}
	if o.tls != nil && len(o.tls.inner.held.b) > 0 {
		n, since = len(o.tls.inner.held.b), o.tls.inner.since
	}
	if outer := len(o.front.held.b); outer > 0 && (o.tls == nil || !o.tls.patient) {
		if n += outer; since.IsZero() || o.front.since.Before(since) {
			since = o.front.since
		}
	}
	return n, since
}

// Expire judges bytes that waited longer than HoldMax, or that nothing can follow any more (cut). Marked: send leaves as
// it is.
func (o *Outgoing) Expire(cut bool) (send []byte, outcome Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	reason := unfinished(cut)
	switch {
	case o.ending != nil: // what is held there leaves inside TLS or not at all
		return nil, Allowed
	case o.tls != nil && len(o.tls.inner.held.b) > 0:
		send, outcome = o.tls.giveUp(reason)
	case len(o.front.held.b) > 0 && o.tls != nil && o.tls.client.Opened():
		outcome = o.tls.lose(reason, cut)
	case len(o.front.held.b) > 0:
		send, outcome = o.front.giveUp(reason)
	default:
		return nil, Allowed
	}
	o.watch()
	return send, outcome
}

func unfinished(cut bool) policy.Reason {
	if cut {
		return policy.ReasonMalformed
	}
	return policy.ReasonHeldTooLong
}

// Close forgets the connection.
func (o *Outgoing) Close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended()
	if o.tls != nil {
		o.tls.client.Close()
	}
	if o.ending != nil {
		o.ending.plain.dead = true
	}
	o.front.dead = true
	o.watch()
}

// speak has another speaker go on with the plain bytes.
func (o *Outgoing) speak(s speaker) {
	switch {
	case o.ending != nil:
		o.ending.plain.speaker = s
	case o.tls != nil:
		o.tls.inner.speaker = s
	default:
		o.front.speaker = s
	}
}

// takePlain is Write for what a termination has found in the program's TLS, expirePlain is Expire, and sentPlain is Sent.
func (o *Outgoing) takePlain(b []byte) (send []byte, outcome Outcome) {
	o.g.stir()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.t.begin()
	defer o.t.end()
	return o.ending.plain.take(b)
}

func (o *Outgoing) expirePlain(cut bool) (send []byte, outcome Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.ending.plain.held.b) == 0 {
		return nil, Allowed
	}
	return o.ending.plain.giveUp(unfinished(cut))
}

func (o *Outgoing) sentPlain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ending.plain.rest()
}

// opener tells TLS from HTTP by the first byte where one port has both. Other protocols do not share a port: their servers
// speak first.
type opener struct{ o *Outgoing }

func (p opener) unit(data []byte, _ *output) ruling {
	o := p.o
	wanted := policy.ProtocolHTTP
	if data[0] == contentHandshake {
		wanted = policy.ProtocolHTTPS
	}
	var peers []policy.Peer
	for _, peer := range o.peers {
		switch peer.Protocol {
		case wanted:
			peers = append(peers, peer)
		case policy.ProtocolHTTP, policy.ProtocolHTTPS:
		default:
			return ruling{outcome: o.refuse("bytes where several protocols are", policy.ReasonUnknownProtocol)}
		}
	}
	o.peers = peers
	o.choose()
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

// refuseFor settles what a parser said of data. What begins like another protocol is called by its name.
func (o *Outgoing) refuseFor(err error, data []byte) ruling {
	if err == wire.ErrShort {
		return short
	}
	text := err.Error()
	if name := foreign.Name(data); name != "" {
		text += ", which begins like " + name
	}
	return ruling{outcome: o.refuse(text, reasonOf(err))}
}

func reasonOf(err error) policy.Reason {
	var refused *wire.Error
	if errors.As(err, &refused) {
		return refused.Reason
	}
	return policy.ReasonMalformed
}

// support passes what carries messages and is none, at a bounded rate. It is logged only when it does not pass.
func (o *Outgoing) support(kind, text string) Outcome {
	now := o.g.now()
	if !o.rate.take(now, supportBurst, supportPerSecond) || !o.g.rate.take(now, sandboxBurst, sandboxPerSecond) {
		return o.refuse(text, policy.ReasonRateBound)
	}
	return o.flow(kind, text)
}

// flow passes what belongs to a message that was judged. It is logged only when there is no right to decide anything.
func (o *Outgoing) flow(kind, text string) Outcome {
	s := o.g.stand()
	if s.refusal == "" {
		return Allowed
	}
	return o.g.refuse(s, subject{kind: kind, text: text, peer: o.peer()}, s.refusal, o.g.now())
}

// bodyMax bounds the body of a message.
func (o *Outgoing) bodyMax() int64 {
	s := o.g.stand()
	if s.function == nil {
		return 0
	}
	return s.function.MaxBody
}
