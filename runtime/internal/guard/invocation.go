package guard

import (
	"crypto/rand"
	"encoding/hex"
	"reflect"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// How an invocation ends, as End spells it.
const (
	outcomeAnswered = "answered"
	outcomeClosed   = "closed"
	outcomeTimeout  = "timeout"
)

// tailsMax bounds the invocations whose work goes on after their answer. Beyond it the oldest one's is over.
const tailsMax = 64

// invocation is one released request and its place in the function CFG. What a program sends before its first request
// has one, too, with a CFG of its own.
type invocation struct {
	rule
	call, id string // "" when the controller granted none, which only audit goes on with
	label    string // the client's X-Call-Id, when the program sees the call in its place

	done atomic.Bool // nothing more may leave for it

	// Guarded by walk.mu.
	cursor, spare policy.Cursor
	released      bool // the program saw the request
	tailing       bool // it was answered, and goes on with its tail
	ended         bool
	held          bool // a join waits for its answer, whose last byte leaves when the controller knows of it
	adrift        bool // nobody answered for it, so the controller does not know where it stands: the fail mode decides its app edges
	unknown       bool // nor may the fail mode: it takes no further app edge
	edges         int  // that it has taken
	timer         *time.Timer
	retire        *time.Timer // not nil after a released request that was not answered; runs until the instance is at rest
	lost          []lostMessage

	// among holds, in the place of all of the above, the invocations one of which a message belongs to.
	among []*invocation
}

// begin makes an invocation live. The caller holds the slot.
func (g *Guard) begin(inv *invocation) {
	inv.cursor = inv.function.Start()
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	g.walk.add(inv)
	inv.timer = time.AfterFunc(time.Duration(inv.function.InvocationTimeoutMS)*time.Millisecond, func() { g.finish(inv, outcomeTimeout) })
	g.choose()
}

// released marks that the program is about to see the request. From here on the startup is over. released says no when
// the invocation has ended before that.
func (g *Guard) released(inv *invocation) bool {
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	if startup := g.walk.startup; startup != nil {
		g.walk.startup = nil
		g.walk.remove(startup)
		g.choose()
	}
	g.walk.started = true
	inv.released = !inv.ended
	return inv.released
}

// begun is told in off mode that requests may come, which are not looked at: what a later version says of the time before
// the first one is over.
func (g *Guard) begun() {
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	g.walk.started = true
}

// finish ends the invocation and tells the controller.
func (g *Guard) finish(inv *invocation, outcome string) {
	if g.end(inv, outcome) && inv.id != "" {
		g.controller.End(&frame.End{Call: inv.call, Invocation: inv.id, Outcome: outcome})
	}
}

// end ends the invocation: by its answer its tail begins, if the CFG has one there. Only the first end counts, and is one.
// The slot is released by whoever knows that the program is done with the request: until then a message could still be a
// late one of this invocation.
func (g *Guard) end(inv *invocation, outcome string) bool {
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	if inv.ended {
		return false
	}
	inv.ended = true
	inv.timer.Stop()
	if outcome == outcomeAnswered && g.walk.tailAt(inv) {
		inv.tailing = true
		inv.timer = time.AfterFunc(time.Duration(inv.function.TailMS)*time.Millisecond, func() {
			g.walk.mu.Lock()
			defer g.walk.mu.Unlock()
			g.drop(inv)
		})
		if oldest := g.walk.beyond(tailsMax); oldest != nil {
			g.drop(oldest)
		}
	} else {
		g.walk.remove(inv)
	}
	g.choose()
	if outcome != outcomeAnswered && inv.released {
		g.unsettle(inv)
	}
	return true
}

// drop ends a tail. The walk's lock is held.
func (g *Guard) drop(inv *invocation) {
	inv.timer.Stop()
	g.walk.remove(inv)
	g.choose()
}

// choose finds by whose rule a message is judged that no invocation allows: by the strictest one's, and among equals by
// the youngest one's that is not answered. The walk's lock is held.
func (g *Guard) choose() {
	var chosen *invocation
	for _, inv := range g.walk.parts {
		if chosen == nil || lenient(chosen.mode) && !lenient(inv.mode) ||
			lenient(chosen.mode) == lenient(inv.mode) && (chosen.tailing || !inv.tailing) {
			chosen = inv
		}
	}
	g.mu.Lock()
	g.live = chosen
	g.mu.Unlock()
	g.tellMode()
}

// tellMode says which mode is in force and by which version, when that has changed. The walk's lock is held.
func (g *Guard) tellMode() {
	inForce := frame.Mode{}
	inForce.Mode, inForce.Version = g.inForce()
	if inForce != g.told {
		g.told = inForce
		g.controller.Mode(&inForce)
	}
}

// inForce is the mode that the sandbox is really in: the newest policy's, or that of an invocation that is not over and
// began with a more lenient one. A function that the policy lacks has everything refused.
func (g *Guard) inForce() (mode string, version int) {
	g.mu.RLock()
	r := g.force
	g.mu.RUnlock()
	if r.mode == policy.ModeOff {
		return r.mode.String(), r.policy.Version
	}
	if r.function == nil {
		r.mode = policy.ModeEnforce
	}
	for _, inv := range g.walk.parts {
		if inv.mode < r.mode {
			r = inv.rule
		}
	}
	return r.mode.String(), r.policy.Version
}

// beginStartup opens the CFG of what the program sends before its first request.
func (g *Guard) beginStartup(r rule) {
	if r.function == nil || r.function.Startup == nil || r.mode == policy.ModeOff {
		return
	}
	startup := &invocation{rule: r, cursor: r.function.Startup.Start()}
	startup.function = r.function.Startup
	g.walk.startup = startup
	g.walk.add(startup)
	g.choose()
}

// renewStartup puts a newer version in force for what comes before the first request, which belongs to no call. Where
// the CFG is another one, it begins anew if nothing was sent, and is over otherwise. The walk's lock is held.
func (g *Guard) renewStartup() {
	s := g.standNew()
	r := s.rule
	before := g.walk.startup
	if before == nil {
		if !g.walk.started {
			g.beginStartup(r)
		}
		return
	}
	if r.mode != policy.ModeOff && r.function != nil && reflect.DeepEqual(before.function, r.function.Startup) {
		g.mu.Lock()
		before.rule = r
		before.function = r.function.Startup
		g.mu.Unlock()
		return
	}
	untouched := reflect.DeepEqual(before.cursor, before.function.Start())
	g.walk.startup = nil
	g.walk.remove(before)
	if g.walk.started = !untouched; untouched {
		g.beginStartup(r)
	}
	g.choose()
}

// over tells that nothing more may leave for the invocation: it has ended, and so has its tail. No invocation is one
// that is over.
func (inv *invocation) over() bool {
	if inv == nil {
		return true
	}
	for _, other := range inv.among {
		if !other.done.Load() {
			return false
		}
	}
	return inv.among != nil || inv.done.Load()
}

// newStep names one question. The same step asked again would get the stored answer.
func newStep() string {
	var raw [frame.StepBytes / 2]byte
	rand.Read(raw[:]) // never fails, see its documentation
	return hex.EncodeToString(raw[:])
}

// newID is what the controller would have minted.
func newID() string {
	var raw [idDigits / 2]byte
	rand.Read(raw[:]) // as above
	return hex.EncodeToString(raw[:])
}
