package guard

import (
	"strconv"
	"strings"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// http1Speaker judges HTTP/1.1 requests by their heads.
type http1Speaker struct {
	o    *Outgoing
	body *http1.Body // of the request whose head has passed
	inv  *invocation // that the body belongs to
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
	head, n, err := http1.ParseRequest(data)
	if err != nil {
		return o.refuseFor(err, "")
	}
	peer, found := o.peerOfHost(head.Host)
	message := &policy.Message{Kind: policy.KindHTTP, Peer: peer.Name, Method: head.Method, Path: head.Path, Query: head.Query}
	if !found {
		return ruling{outcome: o.refuse(message.Text()+" to host "+head.Host, policy.ReasonUnknownPeer)}
	}
	if head.Upgrade != "" {
		return ruling{outcome: o.refuse(message.Text()+" with an upgrade to "+head.Upgrade, policy.ReasonUnsupported)}
	}
	bound := int64(0)
	if s := o.g.stand(); s.refusal == "" {
		if bound = s.policy.Functions[o.g.identity.Function].MaxBody; head.ContentLength > bound {
			return ruling{outcome: o.refuse(message.Text(), policy.ReasonTooLarge)}
		}
	}
	var outcome Outcome
	if peer.Gateway {
		outcome, h.inv = o.invoke(peer, head, message, w)
	} else {
		outcome, h.inv = o.g.judge(o.t, message, "http", nil)
	}
	if outcome == Allowed && (head.Chunked || head.ContentLength > 0) {
		h.body = http1.NewBody(head.ContentLength, head.Chunked, false, bound)
	}
	return ruling{n: n, outcome: outcome}
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
		return h.o.refuseFor(err, "a body: ")
	}
	if done {
		h.body = nil
	}
	return ruling{n: n, outcome: h.o.support("http", "http body")}
}

const httpPort = 80 // may be left out of a Host field (RFC 9110 section 4.2.1)

// peerOfHost finds the peer that a Host field means.
func (o *Outgoing) peerOfHost(host string) (policy.Peer, bool) {
	name, port, hasPort := strings.Cut(host, ":")
	for _, peer := range o.peers {
		right := port == strconv.Itoa(int(peer.Port)) || !hasPort && peer.Port == httpPort
		if peer.Protocol == policy.ProtocolHTTP && name == peer.Host && right {
			return peer, true
		}
	}
	return policy.Peer{}, false
}
