package guard

import (
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
)

// connectionsMax bounds the connections with the outside that a sandbox has at a time, in both directions, with those
// that are closed and still send what was taken: each holds memory.
const connectionsMax = 4096

// enter counts one more connection, unless there are too many. No mode but off lets more in: there is no memory for them.
func (g *Guard) enter(s *standing) bool {
	if g.connections.Add(1) <= connectionsMax || s.off() {
		return true
	}
	g.connections.Add(-1)
	return false
}

func (g *Guard) crowded(s standing, what subject, began time.Time) Outcome {
	what.never = true
	return g.refuse(s, what, policy.ReasonRateBound, began)
}

// Leave is told once of each connection that Connect or Accept did not deny, when it is gone.
func (g *Guard) Leave() { g.connections.Add(-1) }

// Connections counts those with the outside.
func (g *Guard) Connections() int { return int(g.connections.Load()) }
