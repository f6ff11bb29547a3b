package guard

import (
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/http1"
	"kalium.dev/kalium/runtime/internal/wire/mysql"
	"kalium.dev/kalium/runtime/internal/wire/tlshello"
)

// Bounds of what is held on one stream. A unit beyond them is refused; the parsers' own bounds are below these.
const (
	holdBytesMax      = 64 << 10
	holdBytesMaxMySQL = mysql.PacketBytesMax + 64<<10
)

// phase is where a stream stands between units.
type phase uint8

const (
	opening phase = iota // nothing was sent yet: the first byte tells TLS from HTTP
	inHead               // of an HTTP request
	inBody
	inPackets // of MySQL
	inTLS     // after the ClientHello: records flow as long as the invocation lasts
	opaque    // a connection that enforce would have ended: bytes flow
	dead
)

// Outgoing judges what a program sends on one connection to a peer. Bytes go in as they were written and come out when
// the unit that they belong to was judged.
type Outgoing struct {
	g     *Guard
	peers []policy.Peer // that have the connection's address, by name

	cut atomic.Pointer[func()] // ends the connection

	mu      sync.Mutex
	phase   phase
	held    []byte // of a unit that is not whole; our own memory
	since   time.Time
	body    *http1.Body
	clients []*mysql.Client // one for each peer until the handshake tells them apart
	peer    policy.Peer     // of mysql and TLS, once it is known
	records *tlshello.Records
	inv     *invocation // that a TLS connection or the body of a request belongs to
}

func newOutgoing(g *Guard, peers []policy.Peer) *Outgoing {
	return &Outgoing{g: g, peers: peers}
}

// OnSever sets how the guard ends the connection by itself. cut must not call back.
func (o *Outgoing) OnSever(cut func()) { o.cut.Store(&cut) }

func (o *Outgoing) sever() {
	if cut := o.cut.Load(); cut != nil {
		(*cut)()
	}
}

// Write takes bytes that the program sends and returns those that may leave now, before and beside those that are held.
// send is b itself when all of it passes as it is, and otherwise memory of its own. Denied: send holds what was judged
// before the denied unit; none of the bytes behind it leave, and the connection must be ended.
func (o *Outgoing) Write(b []byte) (send []byte, outcome Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.phase == opaque {
		// Audit may have become enforce since the connection was marked.
		if s := o.g.stand(); s.lenient() {
			return b, Allowed
		}
		o.phase = dead
	}
	data := b
	if len(o.held) > 0 {
		data = append(o.held, b...)
	}
	waiting := len(o.held) > 0
	o.held = nil
	var out []byte // nil as long as data[:at] leaves as it is
	from, at := 0, 0
	outcome = Allowed
	for at < len(data) {
		n, instead, result, short := o.unit(data[at:])
		if short {
			if len(data)-at <= o.holdMax() {
				break
			}
			result = o.refuse("", policy.ReasonTooLarge)
		}
		if result == Denied {
			outcome = Denied
			break
		}
		if instead != nil {
			out = append(append(out, data[from:at]...), instead...)
			from = at + n
		}
		at += n
		if result == Marked {
			// What enforce would have ended goes on unseen, so that the sequence up to here is the same in both modes.
			o.phase, at = opaque, len(data)
		}
	}
	if outcome == Denied {
		o.phase = dead
	} else if at < len(data) {
		if waiting && at == 0 {
			o.held = data // is ours already and grows
		} else {
			o.held, o.since = append(make([]byte, 0, len(data)-at+512), data[at:]...), o.g.now()
		}
	}
	if out == nil && from == 0 {
		return data[:at], outcome
	}
	return append(out, data[from:at]...), outcome
}

func (o *Outgoing) holdMax() int {
	if o.phase == inPackets {
		return holdBytesMaxMySQL
	}
	return holdBytesMax
}

// Held tells how many bytes wait for the rest of their unit, and since when.
func (o *Outgoing) Held() (n int, since time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.held), o.since
}

// Expire judges bytes that waited longer than HoldMax, or that nothing can follow any more (cut). Marked: send leaves as
// it is.
func (o *Outgoing) Expire(cut bool) (send []byte, outcome Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.held) == 0 {
		return nil, Allowed
	}
	reason := policy.ReasonHeldTooLong
	if cut {
		reason = policy.ReasonMalformed
	}
	outcome = o.refuse("an unfinished unit", reason)
	send, o.held = o.held, nil
	o.phase = opaque
	if outcome == Denied {
		send, o.phase = nil, dead
	}
	return send, outcome
}

// Close forgets the connection.
func (o *Outgoing) Close() {
	o.mu.Lock()
	inv := o.inv
	o.inv = nil
	o.mu.Unlock()
	if inv != nil {
		inv.unbind(o)
	}
}

// unit judges the unit at the front of data. n counts its bytes, or those of a body that may go on; instead replaces
// them when it is not nil.
func (o *Outgoing) unit(data []byte) (n int, instead []byte, outcome Outcome, short bool) {
	if o.phase == opening {
		o.open(data[0])
	}
	switch o.phase {
	case inHead:
		return o.request(data)
	case inBody:
		return o.content(data)
	case inPackets:
		return o.packet(data)
	case inTLS:
		if o.records == nil {
			return o.hello(data)
		}
		return o.record(data)
	}
	return 0, nil, o.refuse("bytes", policy.ReasonConnectionDead), false
}

// open chooses the protocol by what the peers at this address speak; only where one port has both, the first byte tells.
func (o *Outgoing) open(first byte) {
	speaks := map[string]bool{}
	for _, peer := range o.peers {
		speaks[peer.Protocol] = true
	}
	switch {
	case speaks[policy.ProtocolMySQL]:
		o.phase = inPackets
		if len(speaks) > 1 {
			o.phase = dead // the server speaks first in mysql, so nothing tells them apart
		}
	case speaks[policy.ProtocolHTTPS] && (!speaks[policy.ProtocolHTTP] || first == 22):
		o.phase = inTLS
	case speaks[policy.ProtocolHTTP]:
		o.phase = inHead
	default:
		o.phase = dead
	}
}

// refuse settles a denial that no message stands for.
func (o *Outgoing) refuse(text string, reason policy.Reason) Outcome {
	kind := "other"
	if len(o.peers) > 0 {
		kind = o.peers[0].Protocol
	}
	peer := o.peer.Name
	if peer == "" && len(o.peers) == 1 {
		peer = o.peers[0].Name
	}
	if text == "" {
		text = "a unit beyond its bound"
	}
	s := o.g.stand()
	if s.refusal != "" {
		reason = s.refusal
	}
	return o.g.refuse(s, subject{kind: kind, text: kind + " " + text, peer: peer}, reason, o.g.now())
}

func reasonOf(err error) policy.Reason {
	var refused *wire.Error
	if errors.As(err, &refused) {
		return refused.Reason
	}
	return policy.ReasonMalformed
}

// request judges the head of an HTTP request.
func (o *Outgoing) request(data []byte) (int, []byte, Outcome, bool) {
	head, n, err := http1.ParseRequest(data)
	if err == wire.ErrShort {
		return 0, nil, Denied, true
	}
	if err != nil {
		return 0, nil, o.refuse(err.Error(), reasonOf(err)), false
	}
	peer, found := o.peerOfHost(head.Host)
	message := &policy.Message{Kind: policy.KindHTTP, Peer: peer.Name, Method: head.Method, Path: head.Path, Query: head.Query}
	if !found {
		return 0, nil, o.refuse(message.Text()+" to host "+head.Host, policy.ReasonUnknownPeer), false
	}
	bound := int64(0)
	if s := o.g.stand(); s.refusal == "" {
		if bound = s.policy.Functions[o.g.identity.Function].MaxBody; head.ContentLength > bound {
			return 0, nil, o.refuse(message.Text(), policy.ReasonTooLarge), false
		}
	}
	var instead []byte
	var outcome Outcome
	if peer.Gateway {
		instead, outcome = o.invoke(peer, head, message)
	} else {
		outcome, o.inv = o.g.judge(message, "http", nil)
	}
	if outcome == Allowed && (head.Chunked || head.ContentLength > 0) {
		o.phase, o.body = inBody, http1.NewBody(head.ContentLength, head.Chunked, false, bound)
	}
	return n, instead, outcome, false
}

// content passes the body of a request. It ends with the invocation that its head belongs to: what a later request brings
// must not leave on the path of an earlier one.
func (o *Outgoing) content(data []byte) (int, []byte, Outcome, bool) {
	if o.inv.over() {
		return 0, nil, o.refuse("a body beyond its invocation", policy.ReasonNoInvocation), false
	}
	n, done, err := o.body.Feed(data)
	if err != nil {
		// A stream violation: the head has left. What of this write belongs to the body and came before the fault stays
		// behind, too.
		return 0, nil, o.refuse("a body: "+err.Error(), reasonOf(err)), false
	}
	if done {
		o.phase, o.body = inHead, nil
	}
	return n, nil, o.support("http", "http body"), false
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

// invoke judges a request to the gateway. It has one spelling; everything else at the gateway, its administration above
// all, is reached by nobody. The head is written anew, in audit too: a token comes from the controller or not at all.
func (o *Outgoing) invoke(peer policy.Peer, head *http1.RequestHead, message *policy.Message) ([]byte, Outcome) {
	callee, spelled := strings.CutPrefix(head.Path, "/function/")
	spelled = spelled && callee != "" && !strings.Contains(callee, "/") && head.Method == "POST" && !strings.Contains(head.Target, "?")
	for i := range head.Fields {
		spelled = spelled && !strings.EqualFold(head.Fields[i].Name, "X-Callback-Url")
	}
	var outcome Outcome
	var token []http1.Field
	if spelled {
		outcome, token = o.edge(&policy.Message{Kind: policy.KindInvoke, Peer: peer.Name, Callee: callee})
	} else {
		s := o.g.stand()
		reason := policy.ReasonGatewayRule
		if s.refusal != "" {
			reason = s.refusal
		}
		outcome = o.g.refuse(s, subject{kind: "invoke", text: "invoke by " + message.Text(), peer: peer.Name}, reason, o.g.now())
	}
	if outcome == Denied {
		return nil, Denied
	}
	return head.Append(nil, func(name string) bool {
		return strings.HasPrefix(name, "x-forwarded-") || strings.HasPrefix(name, "x-kalium-")
	}, token...), outcome
}

// edge judges an app edge: the function CFG first, which costs nothing, and then the controller.
func (o *Outgoing) edge(m *policy.Message) (Outcome, []http1.Field) {
	var token []http1.Field
	outcome, inv := o.g.judge(m, "invoke", func(inv *invocation) (policy.Verdict, error) {
		answer, err := o.g.controller.Invoke(o.g.now().Add(time.Duration(inv.policy.DeadlineMS)*time.Millisecond), &frame.Invoke{
			Step: newStep(), Call: inv.call, Invocation: inv.id, Callee: m.Callee, Version: inv.policy.Version,
		})
		if err != nil {
			return policy.Verdict{}, err
		}
		verdict := verdictOf(answer, answer.Token != "")
		if verdict.Allowed {
			token = []http1.Field{{Name: tokenField, Value: answer.Token}}
		}
		return verdict, nil
	})
	o.inv = inv
	return outcome, token
}

// tokenField carries the workflow token between guards. No program reads or writes it.
const tokenField = "X-Kalium-Token"

// verdictOf reads the controller's answer. complete says that it carries what a grant has to carry.
func verdictOf(answer *frame.Answer, complete bool) policy.Verdict {
	reason := policy.Reason(answer.Reason)
	if answer.Allowed && complete && reason == policy.ReasonAllowed {
		return policy.Verdict{Allowed: true, Reason: policy.ReasonAllowed}
	}
	if reason == policy.ReasonAllowed || !reason.Known() {
		reason = policy.ReasonControllerUnavailable // an answer that contradicts itself is none
	}
	expected := answer.Expected
	if len(expected) > policy.ExpectedMax {
		expected = expected[:policy.ExpectedMax]
	}
	return policy.Verdict{Reason: reason, Expected: expected}
}

// packet judges one packet of a MySQL client.
func (o *Outgoing) packet(data []byte) (int, []byte, Outcome, bool) {
	if o.clients == nil {
		for _, peer := range o.peers {
			o.clients = append(o.clients, mysql.NewClient(peer.Schema))
		}
	}
	var n int
	var unit mysql.Unit
	var err error
	// Peers at one address differ by schema. The handshake names it, so only one client gets past it.
	for i, client := range o.clients {
		n, unit, err = client.Next(data)
		if err == wire.ErrShort {
			return 0, nil, Denied, true
		}
		if err == nil {
			o.clients, o.peers, o.peer = o.clients[i:i+1], o.peers[i:i+1], o.peers[i]
			break
		}
	}
	if err != nil {
		return 0, nil, o.refuse(err.Error(), reasonOf(err)), false
	}
	if unit.Support {
		return n, nil, o.support("mysql", unit.Text), false
	}
	message := &policy.Message{Kind: policy.KindMySQL, Peer: o.peer.Name, Verb: unit.Verb, Read: unit.Read, Write: unit.Write}
	outcome, _ := o.g.judge(message, "mysql", nil)
	return n, nil, outcome, false
}

// support passes what carries messages and is none. It is logged only when there is no right to decide anything.
func (o *Outgoing) support(kind, text string) Outcome {
	s := o.g.stand()
	if s.refusal == "" {
		return Allowed
	}
	return o.g.refuse(s, subject{kind: kind, text: text, peer: o.peer.Name}, s.refusal, o.g.now())
}

// hello judges the ClientHello that begins a TLS connection: whom it is for and that nothing in it hides another name.
func (o *Outgoing) hello(data []byte) (int, []byte, Outcome, bool) {
	hello, n, err := tlshello.Parse(data)
	if err == wire.ErrShort {
		return 0, nil, Denied, true
	}
	if err != nil {
		return 0, nil, o.refuse(err.Error(), reasonOf(err)), false
	}
	if hello.ECH || hello.EarlyData {
		return 0, nil, o.refuse("encrypted hello or early data", policy.ReasonUnsupported), false
	}
	for _, peer := range o.peers {
		if peer.Protocol == policy.ProtocolHTTPS && peer.Host == hello.SNI {
			o.peer = peer
		}
	}
	if o.peer.Name == "" {
		return 0, nil, o.refuse("server name "+hello.SNI, policy.ReasonSNIMismatch), false
	}
	message := &policy.Message{Kind: policy.KindHTTPS, Peer: o.peer.Name, Judging: policy.JudgingConnection}
	outcome, inv := o.g.judge(message, "https", nil)
	if outcome == Allowed {
		if inv == nil || !inv.bind(o) {
			return 0, nil, o.refuse("a connection beyond its invocation", policy.ReasonNoInvocation), false
		}
		o.inv, o.records = inv, tlshello.NewRecords(&hello)
	}
	return n, nil, outcome, false
}

// record passes what follows the hello. The connection ends with its invocation; a write that comes at the same moment
// is refused here.
func (o *Outgoing) record(data []byte) (int, []byte, Outcome, bool) {
	if o.inv.over() {
		return 0, nil, o.refuse("a connection beyond its invocation", policy.ReasonNoInvocation), false
	}
	n, err := o.records.Next(data)
	if err == wire.ErrShort {
		return 0, nil, Denied, true
	}
	if err != nil {
		return 0, nil, o.refuse(err.Error(), reasonOf(err)), false
	}
	return n, nil, o.support("https", "https records"), false
}
