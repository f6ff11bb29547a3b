package agent

import (
	"maps"
	"sync"

	"kalium.dev/kalium/runtime/internal/frame"
)

// counts adds verdicts up since the agent's start, by app and reason or fail mode with a space between. Reasons and fail modes
// are closed sets; apps beyond the bound are counted together, as the app "*", which no app can be called.
type counts struct {
	mu        sync.Mutex
	denied    map[string]int // guarded by mu
	wouldDeny map[string]int // guarded by mu
	failModes map[string]int // guarded by mu
}

func newCounts() *counts {
	return &counts{denied: map[string]int{}, wouldDeny: map[string]int{}, failModes: map[string]int{}}
}

// add counts one verdict and tells whether it changed something.
func (c *counts) add(id *frame.Identity, r *frame.VerdictRecord) bool {
	if r.Allowed && !r.WouldDeny && r.FailMode == "" {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !r.Allowed {
		increment(c.denied, id.App, r.Reason)
	}
	if r.WouldDeny {
		increment(c.wouldDeny, id.App, r.Reason)
	}
	if r.FailMode != "" {
		increment(c.failModes, id.App, r.FailMode)
	}
	return true
}

func increment(table map[string]int, app, what string) {
	key := app + " " + what
	if _, known := table[key]; !known && len(table) >= countersMax {
		key = "* " + what
	}
	table[key]++
}

// snapshot copies the counters.
func (c *counts) snapshot() (denied, wouldDeny, failModes map[string]int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.denied), maps.Clone(c.wouldDeny), maps.Clone(c.failModes)
}
