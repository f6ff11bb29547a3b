package guard

import (
	"slices"
	"sync"
	"time"
)

// slot lets a bounded number of requests into the instance at a time, in the order of arrival.
type slot struct {
	mu      sync.Mutex
	busy    int
	paused  int  // invocations after which the instance has to be silent first
	retired bool // no request is let in any more
	waiting []chan bool
	limit   int // of the policy of the newest request
}

// turn is what became of a wait for the slot. The zero value is no turn.
type turn uint8

const (
	turnLate turn = iota // too long, or too many wait
	turnGone
	turnRetired
	turnTaken
)

// acquire waits for the slot until the deadline or until gone is closed. At most limit requests hold it.
func (s *slot) acquire(limit int, wait time.Duration, gone <-chan struct{}) turn {
	s.mu.Lock()
	s.limit = max(limit, 1)
	if s.retired {
		s.mu.Unlock()
		return turnRetired
	}
	if len(s.waiting) == 0 && s.open() {
		s.busy++
		s.mu.Unlock()
		return turnTaken
	}
	if len(s.waiting) >= waitingMax {
		s.mu.Unlock()
		return turnLate
	}
	next := make(chan bool, 1)
	s.waiting = append(s.waiting, next)
	s.next() // the limit may have grown
	s.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	result := turnLate
	select {
	case taken := <-next:
		return turnOf(taken)
	case <-gone:
		result = turnGone
	case <-timer.C:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.waiting, next); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
		return result
	}
	// The turn came at the same moment: pass it on.
	if <-next {
		s.busy--
		s.next()
	}
	return result
}

func turnOf(taken bool) turn {
	if taken {
		return turnTaken
	}
	return turnRetired
}

func (s *slot) open() bool { return s.busy < s.limit && s.paused == 0 }

func (s *slot) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
	s.next()
}

// pause lets nobody in until resume was called as often.
func (s *slot) pause() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused++
}

func (s *slot) resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused--
	s.next()
}

// retire turns everybody away for good.
func (s *slot) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retired = true
	for _, next := range s.waiting {
		next <- false
	}
	s.waiting = nil
}

// next lets in those at the front of the queue that there is room for. The lock is held.
func (s *slot) next() {
	for len(s.waiting) > 0 && s.open() {
		s.busy++
		s.waiting[0] <- true
		s.waiting = s.waiting[1:]
	}
}
