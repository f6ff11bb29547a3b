package guard

import (
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
)

// holdBytesMax bounds what is held on one stream. A unit beyond it is refused; the parsers' own bounds are below it.
const holdBytesMax = 64 << 10

// speaker follows one protocol on a stream of plain bytes.
type speaker interface {
	// unit judges the unit at the front of data, which is not empty.
	unit(data []byte, w *output) ruling
	// whole tells the length of the unit that data begins and does not finish, and 0 when it is not known yet.
	whole(data []byte) int
	// holdMax is how many bytes of an unfinished unit are held.
	holdMax() int
}

// ruling is what became of the unit at the front of a stream. The zero ruling denies.
type ruling struct {
	n       int // bytes of the unit, or those of a body that may go on
	outcome Outcome
	short   bool // it is not whole
}

// short asks for more bytes.
var short = ruling{short: true}

// output is what leaves of one write. While everything passes as it is, that is a part of the input and nothing is copied.
type output struct {
	data     []byte // what is judged
	from, at int    // data[from:at] passes as it is, behind buf
	buffer          // memory of our own
	changed  bool   // the unit at the front is replaced by what was appended to the buffer
}

// instead begins to replace the unit at the front: what is appended to the buffer takes its place.
func (w *output) instead() {
	w.flush()
	w.changed = true
}

func (w *output) flush() {
	w.begin()
	w.b = append(w.b, w.data[w.from:w.at]...)
	w.from = w.at
}

// channel is one stream of plain bytes: a speaker, and what is held until the unit that it begins is whole.
type channel struct {
	o       *Outgoing
	speaker speaker
	opaque  bool // enforce would have ended the connection: bytes flow unseen
	dead    bool

	held  buffer
	since time.Time // the first held byte came
	out   output
}

// take judges bytes of the stream and returns those that may leave: b itself, cut, or memory that is valid until the next
// call. Denied: send holds what was judged before the denied unit.
func (c *channel) take(b []byte) (send []byte, outcome Outcome) {
	switch {
	case c.dead:
		return nil, c.o.deny()
	case c.opaque:
		// Audit may have become enforce since the connection was marked.
		if s := c.o.g.stand(); s.spares() {
			c.o.t.passed(s.off(), len(b))
			return b, Allowed
		}
		c.opaque, c.dead = false, true
		return nil, c.o.deny()
	}
	w := &c.out
	w.b = w.b[:0]
	if len(c.held.b) > 0 {
		if b, outcome = c.takeHeld(b); outcome == Denied || len(b) == 0 {
			return w.b, outcome
		}
		if c.opaque {
			w.b = append(w.b, b...)
			return w.b, Allowed
		}
	}
	outcome = c.run(b)
	if outcome == Denied {
		c.dead = true
	} else if w.at < len(b) {
		c.held.begin()
		c.held.b, c.since = append(c.held.b, b[w.at:]...), c.o.g.now()
	}
	if w.from == 0 && len(w.b) == 0 {
		return b[:w.at], outcome
	}
	w.flush()
	return w.b, outcome
}

// takeHeld judges what is held together with as much of b as completes it. It returns the rest of b.
func (c *channel) takeHeld(b []byte) (rest []byte, outcome Outcome) {
	w := &c.out
	for len(c.held.b) > 0 && len(b) > 0 {
		n := len(b)
		if whole := c.speaker.whole(c.held.b); whole > len(c.held.b) {
			n = min(n, whole-len(c.held.b))
		}
		c.held.b = append(c.held.b, b[:n]...)
		b = b[n:]
		outcome = c.run(c.held.b)
		w.flush() // the memory of what was held is used again
		if w.at > 0 {
			c.held.b = c.held.b[:copy(c.held.b, c.held.b[w.at:])]
			c.since = c.o.g.now()
		}
		if outcome == Denied {
			c.held.end()
			c.dead = true
			return nil, Denied
		}
	}
	if len(c.held.b) == 0 {
		c.held.end()
	}
	return b, Allowed
}

// run judges the units at the front of data until one is not whole. What enforce would have ended goes on unseen, so that
// the sequence up to there is the same in both modes.
func (c *channel) run(data []byte) Outcome {
	w := &c.out
	w.data, w.from, w.at = data, 0, 0
	for w.at < len(data) {
		c.o.t.next()
		r := c.speaker.unit(data[w.at:], w)
		if r.short {
			if len(data)-w.at <= c.speaker.holdMax() {
				break
			}
			r.outcome = c.o.refuse("a unit beyond its bound", policy.ReasonTooLarge)
		}
		c.o.t.sized(r.n)
		if r.outcome != Denied {
			w.at += r.n
		}
		if w.changed {
			w.from, w.changed = w.at, false
		}
		switch r.outcome {
		case Denied:
			return Denied
		case Marked:
			c.opaque, w.at = true, len(data)
		}
	}
	return Allowed
}

// giveUp settles what is held and can not become whole any more. It returns what leaves nevertheless.
func (c *channel) giveUp(reason policy.Reason) (send []byte, outcome Outcome) {
	outcome = c.o.refuse("an unfinished unit", reason)
	if outcome == Denied {
		c.held.end()
		c.dead = true
		return nil, Denied
	}
	c.opaque = true
	c.out.end()
	c.out.buffer, c.held = c.held, buffer{}
	return c.out.b, outcome
}

// rest gives back the memory of what has left.
func (c *channel) rest() { c.out.end() }
