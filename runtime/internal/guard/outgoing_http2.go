package guard

import (
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/http2"
)

// http2Speaker judges the requests of an HTTP/2 connection, each stream by its head.
type http2Speaker struct {
	o      *Outgoing
	client *http2.Client
	bodies map[uint32]*streamBody // of requests that have not ended
}

// streamBody is what may follow on a stream.
type streamBody struct {
	inv  *invocation // that the head belongs to
	left int64
}

func newHTTP2Speaker(o *Outgoing) *http2Speaker {
	return &http2Speaker{o: o, client: http2.NewClient(), bodies: map[uint32]*streamBody{}}
}

func (*http2Speaker) whole([]byte) int { return 0 }
func (*http2Speaker) holdMax() int     { return http2.UnitBytesMax }

func (h *http2Speaker) unit(data []byte, _ *output) ruling {
	n, unit, err := h.client.Next(data)
	if err != nil {
		return h.o.refuseFor(err, data)
	}
	switch unit.Kind {
	case http2.Support:
		return ruling{n: n, outcome: h.o.support(policy.ProtocolHTTPS, "https "+unit.Text)}
	case http2.Reset:
		delete(h.bodies, unit.Stream)
		return ruling{n: n, outcome: h.o.support(policy.ProtocolHTTPS, "https RST_STREAM")}
	case http2.Request:
		return ruling{n: n, outcome: h.request(&unit)}
	case http2.Data:
		return ruling{n: n, outcome: h.content(&unit)}
	}
	return ruling{outcome: h.o.refuse("a frame of unknown use", policy.ReasonUnsupported)}
}

func (h *http2Speaker) request(unit *http2.Unit) Outcome {
	head := unit.Head
	message := &policy.Message{Kind: policy.KindHTTPS, Method: head.Method, Path: head.Path, Query: head.Query, GRPC: head.GRPC}
	peer, bound, outcome := h.o.addressed(message, policy.ProtocolHTTPS, head.Authority, head.ContentLength)
	if outcome != Allowed {
		return outcome
	}
	if head.Scheme != policy.ProtocolHTTPS || peer.Gateway {
		return h.o.refuse(message.Text()+" by HTTP/2", policy.ReasonUnsupported) // a token cannot be put in
	}
	outcome, inv := h.o.g.judge(h.o.t, message, policy.ProtocolHTTPS)
	if outcome == Allowed {
		h.o.asked(inv, cloned(message), 0)
	}
	if outcome == Allowed && !unit.End {
		h.bodies[unit.Stream] = &streamBody{inv: inv, left: bound}
	}
	return outcome
}

// content passes a part of a body, as long as its invocation lasts.
func (h *http2Speaker) content(unit *http2.Unit) Outcome {
	body := h.bodies[unit.Stream]
	switch {
	case body == nil || body.inv.over():
		return h.o.refuse("a body beyond its invocation", policy.ReasonNoInvocation)
	case int64(unit.Bytes) > body.left:
		return h.o.refuse("a body beyond its bound", policy.ReasonTooLarge)
	}
	if body.left -= int64(unit.Bytes); unit.End {
		delete(h.bodies, unit.Stream)
	}
	return h.o.flow(policy.ProtocolHTTPS, "https body")
}
