package agent

import (
	"errors"
	"net"
	"sync"
	"time"
)

var (
	errSlowPeer = errors.New("the peer does not read what is written to it")
	errClosed   = errors.New("the connection is closed")
)

// sender writes whole frames to one connection for many goroutines, in the order of the calls. Whoever finds the
// connection idle writes, and takes along what others add meanwhile: no goroutine has to wake up for a single frame.
//
// With inline set, send may block for the time of a write. Without, send only takes the bytes and the writing is a
// goroutine's that lives while bytes wait: one guard that does not read must not hold up the others.
type sender struct {
	conn    net.Conn
	inline  bool
	max     int
	timeout time.Duration
	attempt func([]byte) int // writes without blocking what fits now; nil when the connection has no such way

	mu      sync.Mutex
	pending []byte // guarded by mu
	writing bool   // guarded by mu
	err     error  // guarded by mu; final
}

// send takes one or more whole frames. An error means that the connection is of no further use; it is closed already.
func (s *sender) send(data []byte) error {
	s.mu.Lock()
	if s.err != nil {
		defer s.mu.Unlock()
		return s.err
	}
	if !s.writing && s.attempt != nil {
		data = data[s.attempt(data):]
		if len(data) == 0 {
			s.mu.Unlock()
			return nil
		}
	}
	if len(s.pending)+len(data) > s.max {
		s.fail(errSlowPeer)
		defer s.mu.Unlock()
		return s.err
	}
	s.pending = append(s.pending, data...)
	if s.writing {
		s.mu.Unlock()
		return nil
	}
	s.writing = true
	if !s.inline {
		s.mu.Unlock()
		go s.drain()
		return nil
	}
	s.mu.Unlock()
	return s.drain()
}

// drain writes until nothing is pending. The caller has set writing.
func (s *sender) drain() error {
	var spare []byte
	for {
		s.mu.Lock()
		if s.err == nil && len(s.pending) == 0 {
			// A deadline that has passed would also refuse what attempt does.
			if err := s.conn.SetWriteDeadline(time.Time{}); err != nil {
				s.fail(err)
			}
		}
		if s.err != nil || len(s.pending) == 0 {
			s.writing = false
			defer s.mu.Unlock()
			return s.err
		}
		batch := s.pending
		s.pending = spare[:0]
		s.mu.Unlock()
		err := s.conn.SetWriteDeadline(time.Now().Add(s.timeout))
		if err == nil {
			_, err = s.conn.Write(batch)
		}
		spare = batch
		if err != nil {
			s.mu.Lock()
			s.fail(err)
			s.mu.Unlock()
		}
	}
}

// fail needs mu. Closing wakes the connection's reader, which cleans up.
func (s *sender) fail(err error) {
	if s.err == nil {
		s.err = err
		s.pending = nil
		_ = s.conn.Close() // the connection is given up; nothing of it is needed
	}
}

// close ends the connection; what is pending is dropped.
func (s *sender) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail(errClosed)
}
