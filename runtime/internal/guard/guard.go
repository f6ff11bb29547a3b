// Package guard judges what one sandbox sends and receives. It knows policies, protocols and invocations, and nothing of
// gVisor: bytes and addresses come in, and what may pass comes out, so every rule is tested without a sandbox.
//
// A nil *Guard is a guard that could not be set up. Every method of it denies.
package guard

import (
	"crypto/ed25519"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/tlsopen"
)

// Bounds of what the guard holds and waits for.
const (
	HoldMax    = 10 * time.Second // bytes that complete no unit, and requests that wait for their turn
	waitingMax = 64               // requests that wait for the instance
	peersMax   = 4096             // addresses that are remembered for listed hosts
	// pinnedFor is how long an address stays valid after its host's list was replaced: a program may have asked just
	// before, and may keep the answer for its time to live and some more.
	pinnedFor = ttlSeconds*time.Second + 5*time.Minute
	labelMax  = 128 // bytes of X-Call-Id that are logged
)

// Controller is whom the guard asks and tells. Link is the real one.
type Controller interface {
	// Start and Invoke return errLinkDown or errNoAnswer when there was nobody to answer until the deadline, and another error
	// when the question itself was one too many.
	Start(deadline time.Time, question *frame.Start) (*frame.Answer, error)
	Invoke(deadline time.Time, question *frame.Invoke) (*frame.Answer, error)
	// Finish is an End that is answered, as a question is.
	Finish(deadline time.Time, over *frame.Finish) (*frame.Answer, error)
	// End tells that an invocation is over. It does not wait.
	End(over *frame.End)
	// Mode tells which mode is in force. It does not wait.
	Mode(inForce *frame.Mode)
	// Log takes a verdict for the log, and keeps nothing of the record. An error means that it will not be logged, so it
	// must not be acted upon.
	Log(deadline time.Time, record *frame.VerdictRecord) error
}

// Identity says which instance the guard belongs to. It comes from the host's side, never from the sandbox.
type Identity struct {
	Container, App, Function string
	// Trusting: the bundle says that programs trust the sandbox's authority (see Trust).
	Trusting bool
}

// Guard is the judge of one sandbox.
type Guard struct {
	identity   Identity
	key        ed25519.PublicKey
	controller Controller
	now        func() time.Time
	port       uint16 // where invocations arrive
	sources    []netip.Prefix
	healthPath string

	keys   *tlsopen.Keys
	rate   bucket // of support traffic
	noise  noise  // of denials
	slot   slot
	rest   rest
	walk   walk
	timers *timers // nil when nothing is measured

	authority *authority // of TLS that ends in the guard

	told frame.Mode // that was told last; guarded by walk.mu

	connections  atomic.Int64
	terminations atomic.Int64

	mu        sync.RWMutex
	force     rule
	leaseEnds time.Time
	hosts     map[string][]pin
	live      *invocation // by whose rule a message is judged that none of them allows; nil between invocations
}

// rule is what a version of the policy says of this sandbox's function.
type rule struct {
	policy   *policy.Policy
	function *policy.Function // nil when the policy does not have it
	mode     policy.Mode
}

func (g *Guard) ruleOf(p *policy.Policy) rule {
	return rule{policy: p, function: p.Functions[g.identity.Function], mode: p.ModeOf(g.identity.Function)}
}

// pin is an address of a listed host. An address whose host's list was replaced ends after pinnedFor.
type pin struct {
	address netip.Addr
	current bool
	ends    time.Time
}

// New makes the guard from what the agent said. The policy inside is verified with the operator's key, because the agent
// only carries it.
func New(identity Identity, key ed25519.PublicKey, welcome *frame.Welcome, controller Controller) (*Guard, error) {
	if !welcome.OK {
		return nil, fmt.Errorf("the agent refused this sandbox: %s", policy.Printable(welcome.Reason, 64))
	}
	verified, err := policy.Verify(welcome.Policy, key)
	if err != nil {
		return nil, err
	}
	if verified.App != identity.App {
		return nil, fmt.Errorf("the policy is for app %q and the sandbox belongs to %q", verified.App, identity.App)
	}
	if !slices.Contains(frame.Protos(), welcome.Proto) {
		return nil, fmt.Errorf("the agent answered in version %d of the protocol, and this guard speaks %v", welcome.Proto, frame.Protos())
	}
	if welcome.Port < 1 || welcome.Port > 65535 {
		return nil, fmt.Errorf("port %d for invocations", welcome.Port)
	}
	g := &Guard{
		identity: identity, key: key, controller: controller, now: time.Now,
		port: uint16(welcome.Port), healthPath: welcome.HealthPath,
		keys: tlsopen.NewKeys(), hosts: map[string][]pin{},
	}
	if g.authority, err = newAuthority(identity.Container, welcome.Roots); err != nil {
		return nil, err
	}
	g.force = g.ruleOf(verified)
	g.rest.born = time.Now()
	g.beginStartup(g.force)
	for _, source := range welcome.Sources {
		prefix, err := netip.ParsePrefix(source)
		if err != nil {
			return nil, fmt.Errorf("source %q: %w", source, err)
		}
		g.sources = append(g.sources, prefix)
	}
	if err := g.SetNames(welcome.Names); err != nil {
		return nil, err
	}
	g.Renew(welcome.LeaseMS)
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	g.tellMode()
	return g, nil
}

// Keys is where the TLS keys go that programs log. Without a guard nobody reads them.
func (g *Guard) Keys() *tlsopen.Keys {
	if g == nil {
		return tlsopen.NewKeys()
	}
	return g.keys
}

// Renew begins a lease of ms milliseconds. Nothing is decided after its end.
func (g *Guard) Renew(ms int) {
	if ms < 0 || ms > int(time.Hour/time.Millisecond) {
		ms = 0
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.leaseEnds = g.now().Add(time.Duration(ms) * time.Millisecond)
}

// SetPolicy puts a newer version in force. A policy that does not verify, belongs to another app or is not newer is
// refused, and the one in force stays.
func (g *Guard) SetPolicy(app string, envelope []byte) error {
	verified, err := policy.Verify(envelope, g.key)
	if err != nil {
		return err
	}
	if app != g.identity.App || verified.App != app {
		return fmt.Errorf("a policy for app %q reached a sandbox of %q", verified.App, g.identity.App)
	}
	g.mu.Lock()
	before := g.force.policy
	if verified.Version == before.Version && verified.SourceSHA256 == before.SourceSHA256 {
		g.mu.Unlock()
		return nil // said again
	}
	if verified.Version <= before.Version {
		g.mu.Unlock()
		return fmt.Errorf("policy version %d arrived, %d is in force", verified.Version, before.Version)
	}
	g.force = g.ruleOf(verified)
	g.mu.Unlock()
	// Whoever brings policies also brings the controller's answers, and one of them may be waited for with the walk's lock
	// held.
	if g.walk.mu.TryLock() {
		defer g.walk.mu.Unlock()
		g.renewStartup()
		g.tellMode()
	} else {
		go func() {
			g.walk.mu.Lock()
			defer g.walk.mu.Unlock()
			g.renewStartup()
			g.tellMode()
		}()
	}
	return nil
}

// SetNames replaces the addresses of the listed hosts. Addresses that are gone stay valid for a while: a program may
// have asked for the name just before.
func (g *Guard) SetNames(names map[string][]string) error {
	hosts := map[string][]pin{}
	count := 0
	for host, texts := range names {
		for _, text := range texts {
			address, err := netip.ParseAddr(text)
			if err != nil {
				return fmt.Errorf("address %q of host %q: %w", text, host, err)
			}
			if count++; count > peersMax {
				return fmt.Errorf("more than %d addresses of hosts", peersMax)
			}
			host := strings.ToLower(host)
			hosts[host] = append(hosts[host], pin{address: address.Unmap(), current: true})
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	for host, pins := range g.hosts {
		for _, old := range pins {
			if old.current {
				old.current, old.ends = false, now.Add(pinnedFor)
			}
			if now.Before(old.ends) && !holds(hosts[host], old.address) && count < peersMax {
				hosts[host] = append(hosts[host], old)
				count++
			}
		}
	}
	g.hosts = hosts
	return nil
}

func holds(pins []pin, address netip.Addr) bool {
	for _, p := range pins {
		if p.address == address {
			return true
		}
	}
	return false
}

// addresses lists what host is reached by. all includes addresses that are only valid for what asked earlier.
func (g *Guard) addresses(host string, all bool) []netip.Addr {
	g.mu.RLock()
	defer g.mu.RUnlock()
	var list []netip.Addr
	for _, p := range g.hosts[host] {
		if p.current || all && g.now().Before(p.ends) {
			list = append(list, p.address)
		}
	}
	return list
}

// standing is what a judgement begins with: the rule that applies, the invocation that it comes from, and the reason why
// nothing may be decided at all, if there is one.
type standing struct {
	rule
	invocation *invocation
	force      policy.Mode // of the newest policy, which may be newer than the rule
	refusal    policy.Reason
}

// stand begins a judgement of what the program sends or of what comes to it.
func (g *Guard) stand() standing { return g.standing(true) }

// standNew begins the judgement of a request that would begin an invocation. Those that are not over may have begun with
// another version.
func (g *Guard) standNew() standing { return g.standing(false) }

func (g *Guard) standing(live bool) standing {
	if g == nil {
		return standing{refusal: policy.ReasonNoGuard}
	}
	g.mu.RLock()
	s := standing{rule: g.force, force: g.force.mode}
	// A call keeps the version that it began with, and so its mode; only off comes at once.
	if live && g.live != nil && g.force.mode != policy.ModeOff {
		s.rule, s.invocation = g.live.rule, g.live
	}
	ends := g.leaseEnds
	g.mu.RUnlock()
	switch {
	case s.off(): // needs no right to decide
	case s.policy == nil:
		s.refusal = policy.ReasonNoGuard
	case !g.now().Before(ends):
		s.refusal = policy.ReasonLeaseExpired
	case s.function == nil:
		s.refusal = policy.ReasonUnknownFunction
	case s.mode != policy.ModeLearn && s.mode != policy.ModeAudit && s.mode != policy.ModeEnforce:
		s.refusal = policy.ReasonNoGuard
	}
	return s
}

// off tells that nothing is looked at: all bytes pass, unjudged and unlogged. The lease does not matter then, because
// nothing is decided.
func (s *standing) off() bool { return s.policy != nil && s.mode == policy.ModeOff }

// lenient tells whether what enforce would refuse passes. A missing guard, a lease that ended and an unknown function are
// refused in every mode but off: there is no policy then that could ask for less.
func (s *standing) lenient() bool { return s.refusal == "" && lenient(s.mode) }

// spares tells whether a connection goes on that enforce would have ended. Here the mode in force counts, too: no
// connection outlives the switch to enforce because an older invocation still runs.
func (s *standing) spares() bool { return s.lenient() && lenient(s.force) }

func lenient(m policy.Mode) bool {
	return m == policy.ModeOff || m == policy.ModeLearn || m == policy.ModeAudit
}

// Off tells that the guard looks at nothing now.
func (g *Guard) Off() bool {
	s := g.stand()
	return s.off()
}

func (s *standing) deadline() time.Duration {
	if s.policy == nil {
		return 0
	}
	return time.Duration(s.policy.DeadlineMS) * time.Millisecond
}

// Outcome says what becomes of a unit. The zero value denies.
type Outcome uint8

// The outcomes.
const (
	Denied  Outcome = iota
	Allowed         // as the policy says
	Marked          // passes although enforce would have refused it
)

// subject is how a unit appears in its verdict.
type subject struct {
	kind, text, peer, judging string
	failMode                  string // by which an app edge was decided without the controller
	never                     bool   // no mode lets it pass, because there is nothing to pass on
}

// records are verdicts on their way to the log.
var records = sync.Pool{New: func() any { return new(frame.VerdictRecord) }}

// settle logs a verdict and says what becomes of its subject. Nothing is acted upon that could not be logged.
func (g *Guard) settle(s standing, what subject, v policy.Verdict, began time.Time) Outcome {
	if g == nil {
		return Denied
	}
	outcome := Denied
	if v.Allowed && v.Reason == policy.ReasonAllowed {
		outcome = Allowed
	} else {
		v.Allowed = false
		if s.lenient() && !what.never {
			outcome = Marked
		}
	}
	if s.off() {
		return outcome
	}
	if outcome != Allowed {
		g.noise.hear(g.now())
	}
	if v.Reason == "" {
		v.Reason = policy.ReasonMalformed
	}
	record := records.Get().(*frame.VerdictRecord)
	defer records.Put(record)
	*record = frame.VerdictRecord{
		Event: frame.EventVerdict, Mode: policy.ModeInvalid.String(),
		Kind: what.kind, Message: policy.Printable(what.text, policy.MessageTextMax), Peer: what.peer, Judging: what.judging,
		Allowed: outcome != Denied, WouldDeny: outcome == Marked, Reason: string(v.Reason),
		Expected: v.Expected, Line: v.Line, States: v.States,
		LatencyUS: int(g.now().Sub(began).Microseconds()), FailMode: what.failMode,
	}
	if s.policy != nil {
		record.Mode, record.PolicyVersion = s.mode.String(), s.policy.Version
		if s.function == nil {
			record.Mode = s.policy.Mode.String()
		}
	}
	if s.invocation != nil {
		record.Call, record.Invocation = s.invocation.call, s.invocation.id
	}
	if err := g.controller.Log(g.now().Add(s.deadline()), record); err != nil {
		return Denied
	}
	return outcome
}

// refuse settles a denial.
func (g *Guard) refuse(s standing, what subject, reason policy.Reason, began time.Time) Outcome {
	return g.settle(s, what, policy.Verdict{Reason: reason}, began)
}

// clock is the guard's clock, also without a guard.
func (g *Guard) clock() time.Time {
	if g == nil {
		return time.Time{}
	}
	return g.now()
}
