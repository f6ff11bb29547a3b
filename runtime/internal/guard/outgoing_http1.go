package guard

import (
	"strconv"
	"strings"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// http1Speaker judges HTTP/1.1 requests by their heads.
type http1Speaker struct {
	o        *Outgoing
	protocol string      // http or https
	body     *http1.Body // of the request whose head has passed
	inv      *invocation // that the body belongs to

	// The memory of one request after the other.
	head    http1.RequestHead
	message policy.Message
}

func (*http1Speaker) whole([]byte) int { return 0 }
func (*http1Speaker) holdMax() int     { return holdBytesMax }

func (h *http1Speaker) unit(data []byte, w *output) ruling {
	if h.body != nil {
		return h.content(data)
	}
	return h.request(data, w)
}

// request judges the head of a request.
func (h *http1Speaker) request(data []byte, w *output) ruling {
	o := h.o
	o.sent = o.sent[:0] // of requests that wait for their answers together none is sent again
	head, message := &h.head, &h.message
	n, err := head.Parse(data)
	if err != nil {
		return o.refuseFor(err, data)
	}
	*message = policy.Message{Kind: policy.KindHTTP, Method: head.Method, Path: head.Path, Query: head.Query, Upgrade: head.Upgrade != ""}
	if h.protocol == policy.ProtocolHTTPS {
		message.Kind = policy.KindHTTPS
	}
	peer, bound, outcome := o.addressed(message, h.protocol, head.Host, head.ContentLength)
	switch {
	case outcome != Allowed:
		return ruling{n: n, outcome: outcome}
	case peer.Gateway:
		outcome, h.inv = o.invoke(peer, head, message, w)
	default:
		if outcome, h.inv = o.g.judge(o.t, message, h.protocol); outcome == Allowed {
			o.asked(h.inv, message, 0)
		}
	}
	if outcome == Allowed && message.Upgrade {
		o.speak(&webSocketSpeaker{o: o, kind: h.protocol, inv: h.inv})
	}
	if outcome == Allowed && (head.Chunked || head.ContentLength > 0) {
		h.body = http1.NewBody(head.ContentLength, head.Chunked, false, bound)
	}
	return ruling{n: n, outcome: outcome}
}

// addressed finds the peer that a request is for, whose body has length bytes if that is said, and the bound of its body.
func (o *Outgoing) addressed(m *policy.Message, protocol, host string, length int64) (peer policy.Peer, bound int64, outcome Outcome) {
	peer, found := o.peerOfHost(protocol, host)
	if !found {
		return peer, 0, o.refuse(m.Text()+" to host "+host, policy.ReasonUnknownPeer)
	}
	m.Peer = peer.Name
	if bound = o.bodyMax(); length > bound {
		return peer, 0, o.refuse(m.Text(), policy.ReasonTooLarge)
	}
	return peer, bound, Allowed
}

// content passes the body of a request. It ends with the invocation that its head belongs to: what a later request brings
// must not leave on the path of an earlier one.
func (h *http1Speaker) content(data []byte) ruling {
	if h.inv.over() {
		return ruling{outcome: h.o.refuse("a body beyond its invocation", policy.ReasonNoInvocation)}
	}
	n, done, err := h.body.Feed(data)
	if err != nil {
		// A stream violation: the head has left. What of this write belongs to the body and came before the fault stays
		// behind, too.
		return h.o.refuseFor(err, nil)
	}
	if done {
		h.body = nil
	}
	return ruling{n: n, outcome: h.o.flow(h.protocol, h.protocol+" body")}
}

// defaultPorts may be left out of a Host field (RFC 9110 sections 4.2.1 and 4.2.2).
var defaultPorts = map[string]uint16{policy.ProtocolHTTP: 80, policy.ProtocolHTTPS: 443}

// peerOfHost finds the peer that a Host field means, which is one by its grammar.
func (o *Outgoing) peerOfHost(protocol, host string) (policy.Peer, bool) {
	name, text, hasPort := strings.Cut(host, ":")
	port := uint64(defaultPorts[protocol])
	if hasPort {
		var err error
		if port, err = strconv.ParseUint(text, 10, 16); err != nil {
			return policy.Peer{}, false
		}
	}
	for i := range o.peers {
		if peer := &o.peers[i]; peer.Protocol == protocol && peer.Host == name && uint64(peer.Port) == port {
			return *peer, true
		}
	}
	return policy.Peer{}, false
}
