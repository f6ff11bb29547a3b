package guard

import (
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// Incoming follows one connection that was made to the sandbox from outside. The program sees a request when it was
// released, and what it writes leaves as the answer to that request only.
//
// Admit is called by one goroutine of the connection's holder; the other methods may be called at any time.
type Incoming struct {
	g    *Guard
	from netip.AddrPort
	free atomic.Bool // audit lets a connection go on that enforce would have ended

	mu       sync.Mutex
	exchange *exchange     // released and not answered
	idle     chan struct{} // closed when exchange is nil
	over     bool
}

// exchange is one released request and its answer.
type exchange struct {
	inv    *invocation // nil for a probe
	method string

	head    []byte // of the answer, as far as it is there
	body    *http1.Body
	toClose bool // the end of the connection ends the answer
}

var closedChannel = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// Accept judges a connection from outside to a port of the sandbox. Denied: it must be reset before a byte passes.
func (g *Guard) Accept(port uint16, from netip.AddrPort) (*Incoming, Outcome) {
	began := g.clock()
	s := g.stand()
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if g == nil {
		return nil, Denied
	}
	in := &Incoming{g: g, from: from, idle: closedChannel}
	what := subject{kind: "incoming", text: fmt.Sprintf("incoming %s to port %d", from, port)}
	outcome := Allowed
	if port != g.port || s.off() || !slices.ContainsFunc(g.sources, func(source netip.Prefix) bool { return source.Contains(from.Addr()) }) {
		if outcome = g.refuse(s, what, policy.ReasonIncomingNotDeclared, began); outcome == Denied {
			return nil, Denied
		}
		in.free.Store(true)
	}
	if !g.enter(&s) {
		return nil, g.crowded(s, what, began)
	}
	if s.off() && port == g.port {
		g.begun()
	}
	return in, outcome
}

// Free tells that nothing on this connection is held or judged.
func (in *Incoming) Free() bool { return in.free.Load() }

// Admission is what becomes of the bytes at the front of a connection. Exactly one of its forms is set.
type Admission struct {
	Short bool // the head is not whole: ask again with more bytes

	// A released request: Release takes the place of the first Taken bytes, and Body follows its body, which comes next.
	Taken   int
	Release []byte
	Body    *http1.Body

	Refusal []byte // the answer that the guard gives; the program sees no request
	Free    bool   // audit: all bytes pass from here on
	Gone    bool   // the connection ended meanwhile
}

// bodyBytesMax does not bound the body of a released request: it stays between the gateway and the program.
const bodyBytesMax = math.MaxInt64 / 2

// probeAnswerMax bounds the body of the answer to a probe, which nobody has a use for.
const probeAnswerMax = 16 << 10

// Admit reads the head at the front of b and waits until its request may be released: for the answer to the request
// before it, for the instance, and for the controller. gone ends the waiting.
func (in *Incoming) Admit(b []byte, gone <-chan struct{}) Admission {
	head, n, err := http1.ParseIncoming(b)
	if err == wire.ErrShort && !in.g.Off() {
		return Admission{Short: true}
	}
	// The earlier answer on this connection comes first in any case; it has the invocation's own deadline.
	in.mu.Lock()
	idle := in.idle
	in.mu.Unlock()
	select {
	case <-idle:
	case <-gone:
		return Admission{Gone: true}
	}
	// Nobody could answer: a start would only use up the request's token.
	in.mu.Lock()
	over := in.over
	in.mu.Unlock()
	if over {
		return Admission{Gone: true}
	}
	g := in.g
	if g.Off() {
		g.begun()
		in.free.Store(true)
		return Admission{Free: true}
	}
	if err != nil {
		if in.refuse(err.Error(), reasonOf(err), false) == Marked {
			in.free.Store(true)
			return Admission{Free: true}
		}
		return refusal(reasonOf(err), err.Error())
	}
	if isProbe(head, g.healthPath) {
		if g.unfit() {
			return refusal(policy.ReasonRetired, detailRetired)
		}
		return in.release(head, n, nil)
	}
	began := g.now()
	s := g.standNew()
	switch g.slot.acquire(s.maxInflight(), HoldMax, gone) {
	case turnGone:
		return Admission{Gone: true}
	case turnRetired:
		return in.turnAway(policy.ReasonRetired, detailRetired, began)
	case turnTaken:
	default:
		return in.turnAway(policy.ReasonHeldTooLong, "the instance is busy with another request", began)
	}
	if s = g.standNew(); s.off() { // since the request waits
		g.begun()
		g.slot.release()
		in.free.Store(true)
		return Admission{Free: true}
	}
	began = g.now() // what a verdict took does not count the requests before it
	inv, reason, detail := g.start(s, head, began)
	if inv == nil {
		g.slot.release()
		return refusal(reason, detail)
	}
	select {
	case <-gone:
		return in.abandon(inv)
	default:
	}
	return in.release(head, n, inv)
}

const detailRetired = "the instance takes no more requests and waits to be replaced"

// turnAway refuses a request that cannot have its turn. No mode lets it pass: it would be mixed up with another one.
func (in *Incoming) turnAway(reason policy.Reason, detail string, began time.Time) Admission {
	what := subject{kind: "start", text: "start " + in.g.identity.Function, never: true}
	in.g.refuse(in.g.stand(), what, reason, began)
	return refusal(reason, detail)
}

// abandon ends an invocation whose request the program did not see.
func (in *Incoming) abandon(inv *invocation) Admission {
	in.g.finish(inv, outcomeClosed)
	in.g.slot.release()
	return Admission{Gone: true}
}

func (s *standing) maxInflight() int {
	if s.function == nil {
		return 1
	}
	return s.function.MaxInflight
}

// Overdue refuses a head that did not become whole in HoldMax.
func (in *Incoming) Overdue() Admission {
	in.refuse("an unfinished head", policy.ReasonHeldTooLong, true)
	return refusal(policy.ReasonHeldTooLong, "the request's head did not arrive in time")
}

// Broken judges a released request whose body breaks its framing.
func (in *Incoming) Broken(err error) Outcome {
	outcome := in.refuse(err.Error(), reasonOf(err), false)
	if outcome == Marked {
		in.free.Store(true)
	}
	return outcome
}

// isProbe tells a health check by who runs the instance: it carries no work, so it is no invocation. A gateway passes a
// client's request for the same path on, too; that one has fields that say so.
func isProbe(head *http1.RequestHead, healthPath string) bool {
	if healthPath == "" || head.Method != "GET" || head.Target != healthPath || head.ContentLength != 0 || head.Chunked {
		return false
	}
	for i := range head.Fields {
		switch name := strings.ToLower(head.Fields[i].Name); {
		case name == "x-call-id", name == "x-start-time", name == "forwarded", strings.HasPrefix(name, "x-forwarded-"):
			return false
		}
	}
	return true
}

func (in *Incoming) release(head *http1.RequestHead, n int, inv *invocation) Admission {
	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case in.over && inv == nil:
		return Admission{Gone: true}
	case in.over, inv != nil && !in.g.released(inv):
		return in.abandon(inv)
	}
	in.exchange = &exchange{inv: inv, method: head.Method}
	in.idle = make(chan struct{})
	// With several requests at a time, the call of an app edge is told by what the program copies from its request. The
	// client's own label stays with the guard. See judgeEdge.
	var call []http1.Field
	if inv != nil && inv.call != "" && inv.function.MaxInflight > 1 {
		call = []http1.Field{{Name: callField, Value: inv.call}}
	}
	return Admission{
		Taken: n,
		// The token is between guards; a program that knew it could hand it to somebody else.
		Release: head.Append(nil, func(name string) bool {
			return strings.HasPrefix(name, "x-kalium-") || call != nil && name == callFieldLower
		}, call...),
		Body: http1.NewBody(head.ContentLength, head.Chunked, false, bodyBytesMax),
	}
}

// callField carries a client's label, or the call where a function works on several at a time.
const (
	callField      = "X-Call-Id"
	callFieldLower = "x-call-id"
)

// start asks for an invocation, by the rule of s.
func (g *Guard) start(s standing, head *http1.RequestHead, began time.Time) (inv *invocation, reason policy.Reason, detail string) {
	what := subject{kind: "start", text: "start " + g.identity.Function}
	verdict := policy.Verdict{Reason: s.refusal}
	inv = &invocation{rule: s.rule}
	token, label, whole := tokenAndLabel(head)
	switch {
	case s.refusal != "":
	case !whole:
		verdict.Reason = policy.ReasonBadToken
	default:
		answer, err := g.controller.Start(g.now().Add(s.deadline()), &frame.Start{
			Step: newStep(), Token: token, Label: label, Version: s.policy.Version,
		})
		function := g.identity.Function
		known := verdictIf(token == "" && s.policy.Entries[function] || s.policy.Invoked(function), policy.ReasonNotAnEntry)
		d := g.decide(s.rule, answer, err, err == nil && isID(answer.Call) && isID(answer.Invocation), known)
		verdict, what.failMode, inv.adrift = d.Verdict, d.failMode, d.unanswered
		switch {
		case err != nil:
			detail = err.Error()
		case verdict.Allowed && !d.unanswered:
			inv.call, inv.id, inv.held = answer.Call, answer.Invocation, answer.Hold
		default:
			detail = answer.Detail
		}
	}
	if inv.adrift && !verdict.Allowed && g.rest.retired.Load() { // the agent went while it was asked for
		verdict.Reason, what.never, detail = policy.ReasonRetired, true, detailRetired
	}
	if inv.call == "" && inv.adrift && s.maxInflight() > 1 {
		inv.call = newID() // by which the program says whose edge it means
	}
	// The verdict belongs to the invocation that it begins.
	s.invocation = inv
	if g.settle(s, what, verdict, began) == Denied {
		if verdict.Allowed {
			if inv.id != "" {
				g.controller.End(&frame.End{Call: inv.call, Invocation: inv.id, Outcome: outcomeClosed})
			}
			verdict.Reason = policy.ReasonOverloaded
		}
		return nil, verdict.Reason, detail
	}
	inv.label = label
	g.begin(inv)
	return inv, "", ""
}

// tokenAndLabel reads the fields that are for the guard. Two tokens are not a token, and neither is what no controller mints.
func tokenAndLabel(head *http1.RequestHead) (token, label string, whole bool) {
	tokens := 0
	for i := range head.Fields {
		field := &head.Fields[i]
		switch {
		case strings.EqualFold(field.Name, tokenField):
			token, tokens = field.Value, tokens+1
		case strings.EqualFold(field.Name, callField):
			label = policy.Printable(field.Value, labelMax)
		}
	}
	return token, label, tokens == 0 || tokens == 1 && isID(token)
}

// refusal is the answer that the guard gives in the program's place.
func refusal(reason policy.Reason, detail string) Admission {
	status := "403 Forbidden"
	switch reason {
	case policy.ReasonControllerUnavailable, policy.ReasonLeaseExpired, policy.ReasonReentrant, policy.ReasonHeldTooLong, policy.ReasonRetired,
		policy.ReasonOverloaded:
		status = "503 Service Unavailable"
	}
	body, err := json.Marshal(struct {
		Error  policy.Reason `json:"error"`
		Detail string        `json:"detail"`
	}{reason, policy.Printable(detail, policy.MessageTextMax)})
	if err != nil {
		panic(err) // two strings always have a JSON form
	}
	return Admission{Refusal: fmt.Appendf(nil,
		"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, len(body), body)}
}

// Answer judges bytes that the program writes. The first n of them are the answer to the released request and leave.
// Denied: the rest is not, and the connection must be ended. Where a join waits for the answer, its end waits here until the
// controller knows of it, for the policy's deadline at most.
func (in *Incoming) Answer(b []byte) (n int, outcome Outcome) {
	if in.free.Load() {
		// Audit may have become enforce since the connection was marked.
		if s := in.g.stand(); s.spares() {
			return len(b), Allowed
		}
		return 0, in.refuse("bytes on a connection that was not judged", policy.ReasonConnectionDead, true)
	}
	in.mu.Lock()
	x := in.exchange
	if x == nil {
		in.mu.Unlock()
		return 0, in.refuse("bytes that answer no request", policy.ReasonNoInvocation, false)
	}
	n, done, err := x.feed(b)
	held := done && x.held()
	if done && !held {
		in.finish()
	}
	in.mu.Unlock()
	switch {
	case held:
		outcome = in.deliver(x.inv)
		in.delivered(x, outcome)
		if in.g.left(x.inv); outcome == Denied {
			return 0, Denied
		}
	case done:
		in.g.answered(x, outcomeAnswered)
	}
	switch {
	case err != nil:
		outcome = in.refuse(err.Error(), reasonOf(err), false)
	case n < len(b):
		outcome = in.refuse("bytes behind the answer", policy.ReasonMalformed, false)
	default:
		return n, Allowed
	}
	if outcome == Marked {
		// Where the answer ends is not known any more; the end of the connection ends it.
		in.free.Store(true)
		n = len(b)
	}
	return n, outcome
}

func (in *Incoming) refuse(text string, reason policy.Reason, never bool) Outcome {
	what := subject{kind: "incoming", text: fmt.Sprintf("incoming %s: %s", in.from, text), never: never}
	return in.g.refuse(in.g.stand(), what, reason, in.g.now())
}

// finish makes room for the next request. The lock is held.
func (in *Incoming) finish() {
	in.exchange = nil
	close(in.idle)
}

// answered ends the invocation of x, whose program is done with it.
func (g *Guard) answered(x *exchange, outcome string) {
	if x.inv != nil {
		g.finish(x.inv, outcome)
		g.left(x.inv)
	}
}

// Lost is told that the peer's side of the connection failed. The invocation is over, but the program may not know it
// yet.
func (in *Incoming) Lost() {
	in.mu.Lock()
	x := in.exchange
	in.mu.Unlock()
	if x != nil && x.inv != nil {
		in.g.finish(x.inv, outcomeClosed)
	}
}

// held tells that a join waits for the answer.
func (x *exchange) held() bool { return x.inv != nil && x.inv.held }

// deliver ends an invocation by its whole answer, for which a join waits, and says whether the end of the answer may leave: the
// caller must not go on before the controller knows. It is called with no lock held.
func (in *Incoming) deliver(inv *invocation) Outcome {
	g := in.g
	began := g.now()
	g.mu.RLock()
	s := standing{rule: inv.rule, force: g.force.mode, invocation: inv}
	g.mu.RUnlock()
	what := subject{kind: "incoming", text: fmt.Sprintf("incoming %s: the end of an answer that a join waits for", in.from)}
	if !g.end(inv, outcomeAnswered) {
		return g.refuse(s, what, policy.ReasonNoInvocation, began)
	}
	answer, err := g.controller.Finish(began.Add(s.deadline()), &frame.Finish{Call: inv.call, Invocation: inv.id, Outcome: outcomeAnswered})
	d := g.decide(s.rule, answer, err, true, verdictIf(true, ""))
	if d.Allowed && !d.unanswered {
		return Allowed
	}
	what.failMode = d.failMode
	outcome := g.settle(s, what, d.Verdict, began)
	over := &frame.End{Call: inv.call, Invocation: inv.id, Outcome: outcomeAnswered} // means nothing where the FINISH has arrived
	if outcome == Denied {
		over.Outcome = outcomeClosed
	}
	g.controller.End(over)
	return outcome
}

// delivered makes room for the next request behind x, unless the connection is to be ended.
func (in *Incoming) delivered(x *exchange, outcome Outcome) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.over = in.over || outcome == Denied
	if in.exchange == x {
		in.finish()
	}
}

// Close is told that the program closed the connection, or its writing side; cut: by a reset, which is no end of an answer.
// Denied: the end must not look like that of an answer.
func (in *Incoming) Close(cut bool) Outcome {
	in.mu.Lock()
	if in.over {
		in.mu.Unlock()
		return Allowed
	}
	in.over = true
	x := in.exchange
	if x != nil {
		in.finish()
	}
	in.mu.Unlock()
	if x == nil {
		return Allowed
	}
	whole := x.toClose && !cut
	switch {
	case whole && x.held():
		outcome := in.deliver(x.inv)
		in.g.left(x.inv)
		return outcome
	case whole:
		in.g.answered(x, outcomeAnswered)
	default:
		in.g.answered(x, outcomeClosed)
	}
	return Allowed
}

// feed follows the answer to its end.
func (x *exchange) feed(b []byte) (n int, done bool, err error) {
	for n < len(b) {
		if x.body != nil {
			taken, done, err := x.body.Feed(b[n:])
			n += taken
			if err != nil || done {
				return n, done, err
			}
			continue
		}
		known := len(x.head)
		x.head = append(x.head, b[n:min(len(b), n+http1.HeadBytesMax)]...)
		head, length, err := http1.ParseResponse(x.head, x.method)
		if err == wire.ErrShort {
			n += len(x.head) - known
			continue
		}
		if err != nil {
			return n, false, err
		}
		n += length - known
		x.head = nil
		switch {
		case head.Interim && x.inv == nil:
			return n, false, wire.Malformed("an interim answer to a probe")
		case head.Interim: // another head follows
		case head.NoBody:
			return n, true, nil
		default:
			x.toClose = head.UntilClose
			bound := int64(bodyBytesMax)
			if x.inv == nil {
				bound = probeAnswerMax
			}
			x.body = http1.NewBody(head.ContentLength, head.Chunked, head.UntilClose, bound)
			if taken, done, err := x.body.Feed(nil); err != nil || done {
				return n + taken, done, err
			}
		}
	}
	return n, false, nil
}
