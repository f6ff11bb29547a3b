package agent

import (
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// denials bounds how many lines an instance may cause in the logs, so that a hijacked one cannot fill the disk. What is beyond
// is counted by reason; the denial itself stands all the same.
type denials struct {
	mu    sync.Mutex
	known map[frame.Identity]*allowance // guarded by mu
}

// allowance is what one instance has left.
type allowance struct {
	lines  float64
	since  time.Time
	beyond map[string]int // by reason
}

// tooMany is the allowance of all instances that found no room in the table.
var tooMany = frame.Identity{}

func newDenials() *denials { return &denials{known: map[frame.Identity]*allowance{}} }

// admit tells whether one more line may be written for the instance.
func (d *denials) admit(id frame.Identity, reason string, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	a := d.known[id]
	if a == nil && len(d.known) >= denialSourcesMax {
		id = tooMany
		a = d.known[id]
	}
	if a == nil {
		a = &allowance{lines: denialBurst, since: now}
		d.known[id] = a
	}
	a.lines = min(denialBurst, a.lines+max(0, now.Sub(a.since).Seconds())*denialsPerSecond)
	a.since = now
	if a.lines >= 1 {
		a.lines--
		return true
	}
	if a.beyond == nil {
		a.beyond = map[string]int{}
	}
	a.beyond[reason]++
	return false
}

// take returns what was beyond the bound since the last call, and forgets instances that have been quiet.
func (d *denials) take(now time.Time) map[frame.Identity]map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[frame.Identity]map[string]int{}
	for id, a := range d.known {
		if len(a.beyond) > 0 {
			all[id] = a.beyond
			a.beyond = nil
		} else if a.lines+now.Sub(a.since).Seconds()*denialsPerSecond >= denialBurst {
			delete(d.known, id)
		}
	}
	return all
}
