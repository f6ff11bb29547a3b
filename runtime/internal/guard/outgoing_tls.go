package guard

import (
	"errors"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/http2"
	"kalium.dev/kalium/runtime/internal/wire/tlsopen"
)

const (
	contentHandshake  = 22 // the first byte of a TLS connection (RFC 8446 section 5.1)
	recordHeaderBytes = 5
	alpnHTTP1         = "http/1.1"
	alpnHTTP2         = "h2"
)

// tlsSpeaker opens the records of a TLS client, has what is inside judged as another channel, and seals what passes. A
// record that does not open is refused; what is inside of one that does belongs to the inner speaker.
type tlsSpeaker struct {
	o      *Outgoing
	client *tlsopen.Client
	alpn   []string
	inner  channel

	patient bool // audit waits for the rest of a record that enforce would have given up
}

// startTLS makes what follows on the connection TLS. inside speaks in it.
func (o *Outgoing) startTLS(inside func(*tlsSpeaker) speaker) {
	t := &tlsSpeaker{o: o, client: tlsopen.NewClient(o.g.keys)}
	if o.t != nil {
		t.client.OnRecord = func() { o.t.mark(phaseRecord) }
	}
	t.inner = channel{o: o, speaker: inside(t)}
	o.tls, o.front.speaker = t, t
}

// whole reads the length in a record's header.
func (*tlsSpeaker) whole(data []byte) int {
	if len(data) < recordHeaderBytes {
		return 0
	}
	return recordHeaderBytes + (int(data[3])<<8 | int(data[4]))
}

func (*tlsSpeaker) holdMax() int { return holdBytesMax }

func (t *tlsSpeaker) unit(data []byte, w *output) ruling {
	n, unit, err := t.client.Next(data)
	t.o.t.mark(phaseOpen)
	switch {
	case err == nil:
	case err != wire.ErrShort && t.client.Opened():
		// It cannot leave as it is in any mode: a record of ours has used its nonce.
		return ruling{outcome: t.o.settle(err.Error(), reasonOf(err), true)}
	default:
		return t.refuseFor(err, data)
	}
	protocol := t.o.peers[0].Protocol
	switch unit.Kind {
	case tlsopen.KindHello:
		outcome := t.hello(unit.Hello)
		if outcome == Allowed && t.o.terminates && protocol == policy.ProtocolHTTPS {
			return ruling{outcome: t.o.terminate(unit.Hello.SNI, unit.Hello.ALPN)} // which takes the hello, too
		}
		return ruling{n: n, outcome: outcome}
	case tlsopen.KindPass:
		return ruling{n: n, outcome: t.o.support(protocol, protocol+" handshake")}
	case tlsopen.KindControl:
		w.instead()
		w.b = t.client.SealControl(w.b)
		outcome := t.o.support(protocol, protocol+" upkeep")
		if outcome == Marked { // what is inside goes on unseen, and sealed by us
			t.inner.opaque, outcome = true, Allowed
		}
		return ruling{n: n, outcome: outcome}
	case tlsopen.KindData:
		send, outcome := t.inner.take(unit.Data)
		w.instead()
		t.o.t.skip()
		w.b = t.client.Seal(w.b, send)
		t.o.t.mark(phaseReseal)
		t.inner.rest()
		return ruling{n: n, outcome: outcome}
	}
	return ruling{outcome: t.o.refuse("a record of unknown use", policy.ReasonUnsupported)}
}

// refuseFor says what opens a connection whose keys are not known.
func (t *tlsSpeaker) refuseFor(err error, data []byte) ruling {
	var refused *wire.Error
	if errors.As(err, &refused) && refused.Reason == policy.ReasonNoKey && !t.o.terminates {
		text := err.Error() + ", perhaps because the program logs no keys: `tls: terminate` for this function opens it"
		if t.o.g.identity.Trusting {
			text += "; the bundle's annotation kalium.io/tls says so, and the policy does not"
		}
		return ruling{outcome: t.o.refuse(text, refused.Reason)}
	}
	return t.o.refuseFor(err, data)
}

// giveUp settles what is held of the plain bytes. What leaves nevertheless is sealed.
func (t *tlsSpeaker) giveUp(reason policy.Reason) (send []byte, outcome Outcome) {
	plain, outcome := t.inner.giveUp(reason)
	if outcome == Denied {
		t.o.front.held.end()
		t.o.front.dead = true
		return nil, Denied
	}
	w := &t.o.front.out
	w.begin()
	w.b = t.client.Seal(w.b[:0], plain)
	t.inner.rest()
	return w.b, outcome
}

// lose settles a record that does not become whole. Behind records of ours it cannot leave as it is: its rest may come.
func (t *tlsSpeaker) lose(reason policy.Reason, cut bool) Outcome {
	outcome := t.o.refuse("an unfinished record", reason)
	if outcome == Denied || cut {
		t.o.front.held.end()
	}
	t.o.front.dead = outcome == Denied
	t.inner.opaque, t.patient = true, true
	return outcome
}

// hello judges whom the connection is for, and that nothing else can be spoken in it than what is read.
func (t *tlsSpeaker) hello(hello *tlsopen.Hello) Outcome {
	o := t.o
	var peers []policy.Peer
	for _, peer := range o.peers {
		// A mail server and a database are chosen by address alone, and their clients often leave the name out.
		if peer.Host == hello.SNI || hello.SNI == "" && peer.Protocol != policy.ProtocolHTTPS {
			peers = append(peers, peer)
		}
	}
	switch {
	case len(peers) == 0 && hello.SNI == "":
		return o.refuse("a hello without a server name", policy.ReasonSNIMismatch)
	case len(peers) == 0:
		return o.refuse("server name "+hello.SNI, policy.ReasonSNIMismatch)
	}
	for _, name := range hello.ALPN {
		if name != alpnHTTP1 && name != alpnHTTP2 || peers[0].Protocol != policy.ProtocolHTTPS {
			return o.refuse("ALPN "+name, policy.ReasonUnsupported)
		}
	}
	if peers[0].Protocol == policy.ProtocolHTTPS {
		o.peers = peers
	}
	t.alpn = hello.ALPN
	return o.support(peers[0].Protocol, peers[0].Protocol+" handshake")
}

// offers tells whether the client has offered a protocol to the server.
func (t *tlsSpeaker) offers(name string) bool {
	for _, offered := range t.alpn {
		if offered == name {
			return true
		}
	}
	return false
}

// httpOpener tells HTTP/2 from HTTP/1.1 by the preface, which no request of HTTP/1.1 begins with. Which of the two the
// server has chosen is encrypted; if it is not the one that is read here, it finds nothing but an error.
type httpOpener struct{ t *tlsSpeaker }

func (p httpOpener) unit(data []byte, _ *output) ruling {
	n := min(len(data), len(http2.Preface))
	inner := &p.t.inner
	switch {
	case string(data[:n]) != http2.Preface[:n]:
		inner.speaker = &http1Speaker{o: p.t.o, protocol: policy.ProtocolHTTPS}
	case n < len(http2.Preface):
		return short
	case !p.t.offers(alpnHTTP2):
		return ruling{outcome: p.t.o.refuse("HTTP/2 that the hello did not offer", policy.ReasonUnsupported)}
	default:
		inner.speaker = newHTTP2Speaker(p.t.o)
	}
	return ruling{outcome: Allowed}
}

func (httpOpener) whole([]byte) int { return 0 }
func (httpOpener) holdMax() int     { return holdBytesMax }
