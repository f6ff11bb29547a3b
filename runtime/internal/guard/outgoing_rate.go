package guard

import (
	"sync"
	"time"
)

// Bounds of support traffic: what carries messages and is none could carry a little of something else. Programs stay far
// below: a download over HTTP/2 tells the server to go on some thirty times a MiB.
const (
	supportBurst     = 2048 // of one connection
	supportPerSecond = 512
	sandboxBurst     = 8192 // of all connections of the sandbox, and of their beginnings
	sandboxPerSecond = 2048
)

// bucket holds tokens that come at a steady rate. The zero bucket is full.
type bucket struct {
	mu     sync.Mutex
	used   int // tokens that have not come back
	filled time.Time
}

// take takes one token of a bucket that holds burst and gets perSecond of them.
func (b *bucket) take(now time.Time, burst, perSecond int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used == 0 {
		b.filled = now
	}
	if came := int(now.Sub(b.filled) * time.Duration(perSecond) / time.Second); came > 0 {
		b.used = max(0, b.used-came)
		b.filled = b.filled.Add(time.Duration(came) * time.Second / time.Duration(perSecond))
	}
	if b.used == burst {
		return false
	}
	b.used++
	return true
}
