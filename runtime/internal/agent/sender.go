package agent

import (
	"crypto/tls"
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
// connection idle writes, and takes along what others add meanwhile: a lone frame leaves at once and without another
// goroutine, and many leave with one write.
//
// With inline set, send may block for the time of a few writes. Without, send only takes the bytes and the writing is a
// goroutine's that lives while bytes wait: one guard that does not read must not hold up the others.
type sender struct {
	conn    net.Conn
	inline  bool
	max     int
	timeout time.Duration
	attempt func([]byte) int // writes without blocking what fits now; nil when the connection has no such way

	mu      sync.Mutex
	pending []byte        // guarded by mu
	writing bool          // guarded by mu
	idle    chan struct{} // guarded by mu; closed when nothing is written any more; nil while nobody wants to know
	err     error         // guarded by mu; final
}

// send takes one or more whole frames. An error means that the connection is of no further use; it is closed already.
func (s *sender) send(data []byte) error {
	mine, err := s.add(data)
	switch {
	case !mine:
	case s.inline:
		err = s.drain(inlineWritesMax)
	default:
		go s.drain(0)
	}
	return err
}

// sendAside is send for a caller that must not wait for a write.
func (s *sender) sendAside(data []byte) error {
	mine, err := s.add(data)
	if mine {
		go s.drain(0)
	}
	return err
}

// add takes the bytes. With mine the caller has to write them.
func (s *sender) add(data []byte) (mine bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return false, s.err
	}
	if !s.writing && s.attempt != nil {
		data = data[s.attempt(data):]
	}
	if len(data) == 0 {
		return false, nil
	}
	if len(s.pending)+len(data) > s.max {
		s.fail(errSlowPeer)
		return false, s.err
	}
	s.pending = append(s.pending, data...)
	mine = !s.writing
	s.writing = true
	return mine, nil
}

// drain writes until nothing is pending. After max writes, unless that is 0, it leaves the rest to another goroutine: the
// caller has frames of its own to read. The caller has set writing.
func (s *sender) drain(max int) error {
	var spare []byte
	for writes := 0; ; writes++ {
		s.mu.Lock()
		if s.err == nil && len(s.pending) == 0 && s.attempt != nil {
			// A deadline that has passed would also refuse what attempt does.
			if err := s.conn.SetWriteDeadline(time.Time{}); err != nil {
				s.fail(err)
			}
		}
		if s.err != nil || len(s.pending) == 0 {
			s.writing = false
			s.wake()
			defer s.mu.Unlock()
			return s.err
		}
		if max > 0 && writes == max {
			s.mu.Unlock()
			go s.drain(0)
			return nil
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
			s.giveUp(err)
		}
	}
}

// fail needs mu. Closing wakes the connection's reader, which cleans up.
func (s *sender) fail(err error) {
	if s.err != nil {
		return
	}
	s.err = err
	s.pending = nil
	s.wake()
	// A TLS connection says goodbye when it is closed, and would wait for a peer that does not read.
	if secured, is := s.conn.(*tls.Conn); is && err != errClosed {
		_ = secured.NetConn().Close()
	}
	_ = s.conn.Close() // the connection is given up; nothing of it is needed
}

// wake needs mu.
func (s *sender) wake() {
	if s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// giveUp ends the connection because of err.
func (s *sender) giveUp(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail(err)
}

// close ends the connection; what is pending is dropped.
func (s *sender) close() { s.giveUp(errClosed) }

// finish ends the connection behind what is pending, or when limit is over.
func (s *sender) finish(limit time.Duration) {
	s.mu.Lock()
	var idle chan struct{}
	if s.err == nil && s.writing {
		if s.idle == nil {
			s.idle = make(chan struct{})
		}
		idle = s.idle
	}
	s.mu.Unlock()
	if idle != nil {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		select {
		case <-idle:
		case <-timer.C:
		}
	}
	s.close()
}

// reason is why the connection has ended; nil while it has not.
func (s *sender) reason() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
