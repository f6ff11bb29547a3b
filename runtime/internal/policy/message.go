// Package policy executes compiled policies: it verifies the operator's signature, reads the automaton and steps it.
//
// Everything here is pure. The same policy, cursor and message give the same verdict and the same next cursor, in
// every mode, so audit and enforce cannot drift apart. The zero value of every type denies.
package policy

import "unicode/utf8"

// Reason says why a verdict came out as it did. The set is closed because it is a metric label and a log field.
type Reason string

// The reasons, in the order in which docs/reference/policy.md lists them. The empty reason belongs to the zero
// verdict, which denies.
const (
	ReasonAllowed               Reason = "allowed"
	ReasonOutOfOrder            Reason = "out_of_order"
	ReasonUnknownPeer           Reason = "unknown_peer"
	ReasonNotInPolicy           Reason = "not_in_policy"
	ReasonNoInvocation          Reason = "no_invocation"
	ReasonUnknownProtocol       Reason = "unknown_protocol"
	ReasonMalformed             Reason = "malformed"
	ReasonUnsupported           Reason = "unsupported"
	ReasonTooLarge              Reason = "too_large"
	ReasonHeldTooLong           Reason = "held_too_long"
	ReasonConnectionDead        Reason = "connection_dead"
	ReasonNoGuard               Reason = "no_guard"
	ReasonLeaseExpired          Reason = "lease_expired"
	ReasonControllerUnavailable Reason = "controller_unavailable"
	ReasonNotAnEntry            Reason = "not_an_entry"
	ReasonBadToken              Reason = "bad_token"
	ReasonUnknownCall           Reason = "unknown_call"
	ReasonEdgeNotAllowed        Reason = "edge_not_allowed"
	ReasonUnknownFunction       Reason = "unknown_function"
	ReasonNameNotListed         Reason = "name_not_listed"
	ReasonSNIMismatch           Reason = "sni_mismatch"
	ReasonGatewayRule           Reason = "gateway_rule"
	ReasonIncomingNotDeclared   Reason = "incoming_not_declared"
	ReasonReentrant             Reason = "reentrant"
	ReasonUnregistered          Reason = "unregistered"
	ReasonPolicyMismatch        Reason = "policy_mismatch"
	ReasonNoKey                 Reason = "no_key"
	ReasonRetired               Reason = "retired"
	ReasonRateBound             Reason = "rate_bound"
	ReasonUnknownState          Reason = "unknown_state"
	ReasonOverloaded            Reason = "overloaded"
)

var reasons = [...]Reason{
	ReasonAllowed, ReasonOutOfOrder, ReasonUnknownPeer, ReasonNotInPolicy, ReasonNoInvocation, ReasonUnknownProtocol,
	ReasonMalformed, ReasonUnsupported, ReasonTooLarge, ReasonHeldTooLong, ReasonConnectionDead, ReasonNoGuard,
	ReasonLeaseExpired, ReasonControllerUnavailable, ReasonNotAnEntry, ReasonBadToken, ReasonUnknownCall,
	ReasonEdgeNotAllowed, ReasonUnknownFunction, ReasonNameNotListed, ReasonSNIMismatch, ReasonGatewayRule,
	ReasonIncomingNotDeclared, ReasonReentrant, ReasonUnregistered, ReasonPolicyMismatch,
	ReasonNoKey, ReasonRetired, ReasonRateBound, ReasonUnknownState, ReasonOverloaded,
}

// Reasons returns the closed set.
func Reasons() []Reason { return append([]Reason(nil), reasons[:]...) }

// Known tells whether r belongs to the closed set. What comes from another process has to be asked.
func (r Reason) Known() bool {
	for _, known := range reasons {
		if r == known {
			return true
		}
	}
	return false
}

// Kind is the protocol family of a message. The zero kind matches no symbol of any policy.
type Kind uint8

// The kinds that a function CFG orders.
const (
	KindUnknown Kind = iota
	KindHTTP
	KindHTTPS
	KindInvoke
	KindMySQL
	KindSMTP
)

// String spells the kind as the compiled policy and the verdict record do.
func (k Kind) String() string {
	switch k {
	case KindHTTP:
		return "http"
	case KindHTTPS:
		return "https"
	case KindInvoke:
		return "invoke"
	case KindMySQL:
		return "mysql"
	case KindSMTP:
		return "smtp"
	default:
		return "other"
	}
}

func kindOf(name string) Kind {
	for k := KindHTTP; k <= KindSMTP; k++ {
		if k.String() == name {
			return k
		}
	}
	return KindUnknown
}

// Message is an outgoing unit that the function CFG orders, normalised by the parser that read it. It never carries
// payload: no header values, no bodies, no literals of a statement.
type Message struct {
	Kind         Kind
	Peer         string   // the policy's name for the peer
	Method       string   // http, https
	Path         string   // http, https: without query, as it went over the wire
	Query        []string // http, https: the keys, in any order
	Upgrade      bool     // http, https: asks for an upgrade to websocket
	GRPC         bool     // https: its content type is that of gRPC
	Callee       string   // invoke
	Asynchronous bool     // invoke: through the gateway's queue
	Callback     string   // invoke: the function that its result goes to, "" for none
	Verb         string   // mysql, in the spelling of the compiled policy
	Read         []string // mysql: tables, sorted, unqualified in the peer's schema
	Write        []string // mysql: as Read
	From         string   // smtp: local@domain, the domain in lower case; "" is the null reverse-path
	To           []string // smtp: the recipients so far, each as From, in any order
}

// MessageTextMax bounds Message.Text in bytes: the text goes into frames and logs.
const MessageTextMax = 300

// Text renders the message as a symbol of a policy is rendered, so that a log line can be compared with the policy
// by eye. At most MessageTextMax bytes of printable ASCII; a path that is longer is cut and marked with "...".
func (m *Message) Text() string {
	var room [MessageTextMax]byte
	return Printable(string(m.AppendText(room[:0])), MessageTextMax)
}

// AppendText appends what Text makes printable and cuts.
func (m *Message) AppendText(b []byte) []byte {
	b = append(b, m.Kind.String()...)
	switch m.Kind {
	case KindHTTP, KindHTTPS:
		for _, part := range [...]string{m.Method, m.Peer, m.Path} {
			b = append(append(b, ' '), part...)
		}
		b = appendList(b, "?", m.Query, '&')
		if m.Upgrade {
			b = append(b, " websocket"...)
		}
		if m.GRPC {
			b = append(b, " grpc"...)
		}
		return b
	case KindInvoke:
		b = append(append(b, ' '), m.Callee...)
		if m.Asynchronous {
			b = append(b, " async"...)
		}
		if m.Callback != "" {
			b = append(append(b, " callback "...), m.Callback...)
		}
		return b
	case KindMySQL:
		b = append(append(b, ' '), m.Verb...)
		return appendList(appendList(b, " read ", m.Read, ','), " write ", m.Write, ',')
	case KindSMTP:
		b = append(append(b, " mail "...), m.Peer...)
		if m.From != "" {
			b = append(append(b, " from "...), m.From...)
		}
		return appendList(b, " to ", m.To, ',')
	default:
		return append(append(b, ' '), m.Peer...)
	}
}

// appendList writes a list behind its name, or nothing for an empty one.
func appendList(b []byte, name string, list []string, separator byte) []byte {
	for i, element := range list {
		if i == 0 {
			b = append(b, name...)
		} else {
			b = append(b, separator)
		}
		b = append(b, element...)
	}
	return b
}

// Printable replaces everything but printable ASCII by '?' and cuts at max bytes. Names inside messages are chosen by
// the function; a log reader's terminal must not interpret them.
func Printable(text string, max int) string {
	clean := len(text) <= max
	for i := 0; i < len(text) && clean; i++ {
		clean = text[i] >= 0x20 && text[i] < 0x7f
	}
	if clean {
		return text
	}
	out := make([]byte, 0, min(len(text), max))
	for len(text) > 0 && len(out) < max {
		r, size := utf8.DecodeRuneInString(text)
		if r < 0x20 || r >= 0x7f {
			r = '?'
		}
		out = append(out, byte(r))
		text = text[size:]
	}
	if len(text) > 0 && max >= 3 {
		copy(out[len(out)-3:], "...")
	}
	return string(out)
}
