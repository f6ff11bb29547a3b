package guard

import (
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/tlshello"
)

const recordHandshake = 22 // the first byte of a TLS connection (RFC 8446 section 5.1)

// tlsSpeaker judges a TLS connection by its ClientHello: whom it is for and that nothing in it hides another name.
type tlsSpeaker struct {
	o       *Outgoing
	records *tlshello.Records
}

func (*tlsSpeaker) whole([]byte) int { return 0 }
func (*tlsSpeaker) holdMax() int     { return holdBytesMax }

func (t *tlsSpeaker) unit(data []byte, _ *output) ruling {
	if t.records == nil {
		return t.hello(data)
	}
	return t.record(data)
}

func (t *tlsSpeaker) hello(data []byte) ruling {
	o := t.o
	hello, n, err := tlshello.Parse(data)
	if err != nil {
		return o.refuseFor(err, "")
	}
	if hello.ECH || hello.EarlyData {
		return ruling{outcome: o.refuse("encrypted hello or early data", policy.ReasonUnsupported)}
	}
	var peers []policy.Peer
	for _, peer := range o.peers {
		if peer.Protocol == policy.ProtocolHTTPS && peer.Host == hello.SNI {
			peers = []policy.Peer{peer}
		}
	}
	if peers == nil {
		return ruling{outcome: o.refuse("server name "+hello.SNI, policy.ReasonSNIMismatch)}
	}
	o.peers = peers
	message := &policy.Message{Kind: policy.KindHTTPS, Peer: o.peer(), Judging: policy.JudgingConnection}
	outcome, inv := o.g.judge(o.t, message, "https", nil)
	if outcome == Allowed {
		if inv == nil || !inv.bind(o) {
			return ruling{outcome: o.refuse("a connection beyond its invocation", policy.ReasonNoInvocation)}
		}
		o.bound, t.records = inv, tlshello.NewRecords(&hello)
	}
	return ruling{n: n, outcome: outcome}
}

// record passes what follows the hello. The connection ends with its invocation; a write that comes at the same moment
// is refused here.
func (t *tlsSpeaker) record(data []byte) ruling {
	if t.o.bound.over() {
		return ruling{outcome: t.o.refuse("a connection beyond its invocation", policy.ReasonNoInvocation)}
	}
	n, err := t.records.Next(data)
	if err != nil {
		return t.o.refuseFor(err, "")
	}
	return ruling{n: n, outcome: t.o.support("https", "https records")}
}
