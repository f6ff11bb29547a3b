package guard

import (
	"sync/atomic"
	"time"
)

// rest is how an instance comes to rest after an invocation that ended otherwise than by its answer: the program may
// still work on it, and what it sends must not be taken for messages of the next request. It takes no request until the
// program is done with the connection and sent nothing for quiet_ms. An instance that does not come to rest in retire_ms
// is retired: it answers 503 to everything, so that whoever runs it replaces it.
type rest struct {
	born     time.Time
	troubled atomic.Int32 // invocations that the instance is not at rest after
	stirred  atomic.Int64 // when the program last wanted to send, since born; kept only while it matters
	retired  atomic.Bool
	spent    atomic.Bool // reuse: never, and the one request was taken
}

// stir is told of everything that the program tries to send.
func (g *Guard) stir() {
	if g != nil && g.rest.troubled.Load() > 0 {
		g.rest.stirred.Store(int64(time.Since(g.rest.born)))
	}
}

// unsettle begins the wait for rest after inv. The walk's lock is held.
func (g *Guard) unsettle(inv *invocation) {
	g.slot.pause()
	g.rest.troubled.Add(1)
	g.stir()
	inv.retire = time.AfterFunc(time.Duration(inv.function.RetireMS)*time.Millisecond, g.retire)
	g.spend(inv)
}

// left is told that the program is done with the request of an invocation that is over: it closed the connection, or its
// answer is whole after all.
func (g *Guard) left(inv *invocation) {
	g.walk.mu.Lock()
	released, unsettled := inv.released, inv.retire != nil
	g.walk.mu.Unlock()
	if released {
		g.spend(inv)
	}
	if unsettled {
		g.stir() // to close is to act
		g.untilQuiet(inv)
		return
	}
	g.slot.release()
}

func (g *Guard) untilQuiet(inv *invocation) {
	quiet := time.Duration(inv.function.QuietMS) * time.Millisecond
	silent := time.Since(g.rest.born) - time.Duration(g.rest.stirred.Load())
	if silent < quiet {
		time.AfterFunc(quiet-silent, func() { g.untilQuiet(inv) })
		return
	}
	inv.retire.Stop()
	g.rest.troubled.Add(-1)
	g.slot.resume()
	g.slot.release()
}

func (g *Guard) retire() {
	g.rest.retired.Store(true)
	g.slot.retire()
}

// spend retires an instance that takes one request only.
func (g *Guard) spend(inv *invocation) {
	if inv.function.ReuseNever {
		g.rest.spent.Store(true)
		g.slot.retire()
	}
}

// unfit tells whoever runs the instance, by its probes, that it has to be replaced. One that is spent lives until the
// tail of its invocation is over.
func (g *Guard) unfit() bool {
	if g.rest.retired.Load() {
		return true
	}
	if !g.rest.spent.Load() {
		return false
	}
	g.walk.mu.Lock()
	defer g.walk.mu.Unlock()
	return len(g.walk.parts) == 0
}
