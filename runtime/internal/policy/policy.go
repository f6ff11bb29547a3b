package policy

import (
	"crypto/sha256"
	"fmt"
	"math/bits"
	"slices"
	"strings"
)

// Mode says what becomes of a denial. The zero mode is invalid and has to be treated as enforce with everything
// denied.
type Mode uint8

// The modes of docs/reference/policy.md. In ModeOff the guard looks at nothing.
const (
	ModeInvalid Mode = iota
	ModeOff
	ModeLearn
	ModeAudit
	ModeEnforce
)

// String spells the mode as the policy does.
func (m Mode) String() string {
	switch m {
	case ModeOff:
		return "off"
	case ModeLearn:
		return "learn"
	case ModeAudit:
		return "audit"
	case ModeEnforce:
		return "enforce"
	default:
		return "invalid"
	}
}

// FailMode says what becomes of an app edge, a start or an invocation, that no controller decides. The zero mode denies.
type FailMode uint8

// The fail modes of docs/reference/policy.md.
const (
	FailDeny      FailMode = iota // refused
	FailLastKnown                 // allowed if the policy has the edge at some place: see Policy.Edge and Policy.Invoked
	FailAllow                     // allowed
)

// String spells the fail mode as the policy does; one that is none of them denies, and is spelled so.
func (m FailMode) String() string {
	switch m {
	case FailLastKnown:
		return "last_known"
	case FailAllow:
		return "allow"
	default:
		return "deny"
	}
}

// Protocols of a peer, as the compiled policy spells them.
const (
	ProtocolHTTP  = "http"
	ProtocolHTTPS = "https"
	ProtocolMySQL = "mysql"
	ProtocolSMTP  = "smtp"
)

// Peer is one name that functions may reach.
type Peer struct {
	Name     string // the policy's name for it
	Host     string // lower case
	Port     uint16
	Protocol string
	Gateway  bool   // role gateway: reached by invocations only
	Schema   string // mysql: what unqualified table names belong to
}

// Policy is one verified version of an app's policy. It is never changed after Parse, so it may be shared.
type Policy struct {
	App          string
	Version      int
	Mode         Mode
	AppEdge      FailMode // what becomes of an app edge that no controller decides
	DeadlineMS   int      // after so long without an answer, no controller has decided it
	SourceSHA256 string
	SHA256       [sha256.Size]byte // of the compiled bytes: two policies of one version are the same one or a mistake
	Peers        map[string]Peer
	Entries      map[string]bool
	Functions    map[string]*Function

	invokes map[edgeOfApp]bool // the app CFG without its order
	invoked map[string]bool    // the callees of all its edges, callbacks included
}

type edgeOfApp struct{ caller, callee string }

// Edge tells whether an invocation of caller may invoke callee at some place of the app CFG.
func (p *Policy) Edge(caller, callee string) bool {
	return p != nil && p.invokes[edgeOfApp{caller, callee}]
}

// Invoked tells whether some function may invoke callee, or have a result sent to it.
func (p *Policy) Invoked(callee string) bool { return p != nil && p.invoked[callee] }

// ModeOf is the mode of one function: its own, or else the policy's. A function that the policy does not have, and a
// missing policy, have the invalid mode, which denies.
func (p *Policy) ModeOf(function string) Mode {
	if p == nil || p.Functions[function] == nil {
		return ModeInvalid
	}
	return p.Functions[function].Mode
}

// Function is the automaton of one function's CFG: nondeterministic, without empty transitions.
type Function struct {
	Name                string
	Symbols             []Symbol
	States              int
	MaxBody             int64 // bytes of a message's body
	InvocationTimeoutMS int
	Mode                Mode
	Terminate           bool      // TLS ends in the guard, which speaks to the program under its own CA
	Startup             *Function // of what is sent before the first request; nil when nothing may be. Only its automaton counts
	TailMS              int       // how long after the answer the symbols of the tail may be sent
	QuietMS             int       // after an invocation without an answer: silence before the next request
	RetireMS            int       // and how long that silence is waited for before the instance is replaced
	MaxInflight         int       // invocations at a time
	ReuseNever          bool      // one invocation an instance

	start  Cursor
	accept Cursor
	// edges of state s are edges[first[s]:first[s+1]], sorted by symbol and target.
	edges []edge
	first []int32
}

type edge struct{ symbol, to int32 }

// Symbol is one line of the policy: a set of messages that may be sent where its edges are.
type Symbol struct {
	Kind         Kind
	Peer         string
	Method, Path string
	Query        []string // the keys that the message may carry, sorted
	Callee       string
	Asynchronous bool   // invoke: through the gateway's queue
	Callback     string // invoke: the function that its result goes to, "" for none
	Verb         string
	Read, Write  []string
	From         string   // smtp: "" stands for any sender
	To           []string // smtp: whom the mail may go to, sorted; empty stands for anybody
	Upgrade      bool     // http, https: to websocket
	GRPC         bool     // https
	Retries      int      // http, https, invoke: how often a message without an answer may be sent again
	Tail         bool     // may be sent after the answer
	Line         int      // in the YAML source
	Text         string

	segments []segment // of Path, without the leading slash
}

type segment struct {
	literal string
	any     bool // {name}: one non-empty segment
}

// Expected renders the symbol as verdicts list it.
func (s *Symbol) Expected() string { return fmt.Sprintf("%s @line %d", s.Text, s.Line) }

// Cursor is the set of states in which an invocation may be. It belongs to one invocation and is never changed in
// place; the zero cursor is in no state and allows nothing.
type Cursor []uint64

// States lists the cursor's states in rising order.
func (c Cursor) States() []int { return c.AppendStates(make([]int, 0, 4)) }

// AppendStates appends the cursor's states to dst in rising order.
func (c Cursor) AppendStates(dst []int) []int {
	for w, word := range c {
		for ; word != 0; word &= word - 1 {
			dst = append(dst, w*64+bits.TrailingZeros64(word))
		}
	}
	return dst
}

func (c Cursor) has(state int) bool {
	return state/64 < len(c) && c[state/64]>>(state%64)&1 != 0
}

func (c Cursor) set(state int) { c[state/64] |= 1 << (state % 64) }

func newCursor(states int) Cursor { return make(Cursor, (states+63)/64) }

// cleared is an empty cursor for so many states, in dst's memory if that is enough.
func cleared(dst Cursor, states int) Cursor {
	words := (states + 63) / 64
	if cap(dst) < words {
		return newCursor(states)
	}
	dst = dst[:words]
	clear(dst)
	return dst
}

// Verdict is all that the send path consults. The zero value denies, so a forgotten assignment fails closed.
type Verdict struct {
	Allowed  bool
	Reason   Reason
	Expected []string // what the policy would have accepted here; nil when Allowed
	Line     int      // of the symbol that matched, wherever it stands in the function's CFG; 0 when none does
	States   []int    // of the returned cursor; after a denial the ones that denied
	Retries  int      // of the symbol that matched, 0 when denied
}

// ExpectedMax bounds Verdict.Expected: a verdict has to fit a frame and a reader's eye.
const ExpectedMax = 16

// Start is the cursor at the beginning of an invocation.
func (f *Function) Start() Cursor {
	if f == nil {
		return nil
	}
	return append(Cursor(nil), f.start...)
}

// Accepts tells whether an invocation may end at c. The guard only logs it: a function that stops early has sent
// nothing that was not allowed.
func (f *Function) Accepts(c Cursor) bool {
	if f == nil {
		return false
	}
	for i := range min(len(c), len(f.accept)) {
		if c[i]&f.accept[i] != 0 {
			return true
		}
	}
	return false
}

// Knows tells whether any symbol of the function matches m, at whatever place. Prepared statements and callers that
// judge without a cursor use it.
func (f *Function) Knows(m *Message) bool {
	if f == nil {
		return false
	}
	for i := range f.Symbols {
		if f.Symbols[i].Matches(m) {
			return true
		}
	}
	return false
}

// Step judges m at c. Allowed: the cursor moves to all states that a matching symbol leads to. Denied: c itself is
// returned, so that audit, which sends the message nevertheless, stands where enforce stands.
//
// The cost depends on the edges that leave c's states, never on the length of the path behind it.
func (f *Function) Step(c Cursor, m *Message) (Verdict, Cursor) {
	return withStates(f.step(nil, c, m, false))
}

// StepTail judges a message that is sent after the answer: as Step, over the symbols of the tail alone.
func (f *Function) StepTail(c Cursor, m *Message) (Verdict, Cursor) {
	return withStates(f.step(nil, c, m, true))
}

// StepInto is Step without allocations when m is allowed: the next cursor is made in dst's memory, which c must not
// share, and Verdict.States is left out; AppendStates of the returned cursor has them. A denial does not touch dst.
func (f *Function) StepInto(dst, c Cursor, m *Message) (Verdict, Cursor) {
	return f.step(dst, c, m, false)
}

func withStates(v Verdict, c Cursor) (Verdict, Cursor) {
	if v.Allowed {
		v.States = c.States()
	}
	return v, c
}

func (f *Function) step(dst, c Cursor, m *Message, tail bool) (Verdict, Cursor) {
	if f == nil {
		return Verdict{Reason: ReasonUnknownFunction}, c
	}
	// Each symbol is compared once however many edges carry it.
	var tried, matched [symbolsMax / 64]uint64
	var next Cursor
	var first *Symbol
	for w, word := range c {
		for ; word != 0; word &= word - 1 {
			state := w*64 + bits.TrailingZeros64(word)
			if state >= f.States {
				break // no cursor of this function
			}
			for _, e := range f.edges[f.first[state]:f.first[state+1]] {
				symbol, bit := &f.Symbols[e.symbol], uint64(1)<<(e.symbol%64)
				if tried[e.symbol/64]&bit == 0 {
					tried[e.symbol/64] |= bit
					if (symbol.Tail || !tail) && symbol.Matches(m) {
						matched[e.symbol/64] |= bit
					}
				}
				if matched[e.symbol/64]&bit == 0 {
					continue
				}
				if first == nil {
					next, first = cleared(dst, f.States), symbol
				}
				next.set(int(e.to))
			}
		}
	}
	if first != nil {
		return Verdict{Allowed: true, Reason: ReasonAllowed, Line: first.Line, Retries: first.Retries}, next
	}
	verdict := Verdict{Reason: ReasonNotInPolicy, Expected: f.expected(c, tail), States: c.States()}
	for i := range f.Symbols {
		if f.Symbols[i].Matches(m) {
			verdict.Reason, verdict.Line = ReasonOutOfOrder, f.Symbols[i].Line
			break
		}
	}
	return verdict, c
}

// expected lists the symbols that leave c, in the order of the policy's text; tail: those of the tail alone.
func (f *Function) expected(c Cursor, tail bool) []string {
	var leaving [symbolsMax / 64]uint64
	for state := range f.States {
		if !c.has(state) {
			continue
		}
		for _, e := range f.edges[f.first[state]:f.first[state+1]] {
			leaving[e.symbol/64] |= 1 << (e.symbol % 64)
		}
	}
	var texts []string
	for i := range f.Symbols {
		if leaving[i/64]>>(i%64)&1 == 0 || tail && !f.Symbols[i].Tail {
			continue
		}
		if len(texts) == ExpectedMax {
			break
		}
		texts = append(texts, f.Symbols[i].Expected())
	}
	return texts
}

// Matches tells whether m is one of the symbol's messages.
func (s *Symbol) Matches(m *Message) bool {
	if m == nil || m.Kind == KindUnknown || s.Kind != m.Kind || s.Peer != m.Peer {
		return false
	}
	switch s.Kind {
	case KindHTTP, KindHTTPS:
		return s.Method == m.Method && s.Upgrade == m.Upgrade && s.GRPC == m.GRPC && matchPath(s.segments, m.Path) &&
			subset(m.Query, s.Query)
	case KindInvoke:
		return s.Callee == m.Callee && m.Callee != "" && s.Asynchronous == m.Asynchronous && s.Callback == m.Callback
	case KindMySQL:
		return s.Verb == m.Verb && slices.Equal(s.Read, m.Read) && slices.Equal(s.Write, m.Write)
	case KindSMTP:
		return (s.From == "" || s.From == m.From) && (len(s.To) == 0 || subset(m.To, s.To))
	default:
		return false
	}
}

// matchPath compares without allocating. A path with an escape never matches a placeholder: what the server decodes
// out of it is unknown here.
func matchPath(segments []segment, path string) bool {
	if path == "" || path[0] != '/' {
		return false
	}
	rest := path[1:]
	for i := range segments {
		part := rest
		slash := strings.IndexByte(rest, '/')
		last := i == len(segments)-1
		if last != (slash < 0) {
			return false
		}
		if !last {
			part, rest = rest[:slash], rest[slash+1:]
		}
		if !segments[i].matches(part) {
			return false
		}
	}
	return len(segments) > 0
}

func (s *segment) matches(part string) bool {
	if !s.any {
		return part == s.literal
	}
	return part != "" && part != "." && part != ".." && strings.IndexByte(part, '%') < 0
}

func subset(elements, of []string) bool {
	for _, element := range elements {
		if !slices.Contains(of, element) {
			return false
		}
	}
	return true
}
