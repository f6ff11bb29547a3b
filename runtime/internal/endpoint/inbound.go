package endpoint

import (
	"bytes"
	"io"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/guard"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

const (
	pullBytes   = 64 << 10 // that are taken from the inner endpoint at once, and held at most
	drainBytes  = 1 << 20  // of a refused request that are read and thrown away, so that the peer can read the refusal
	drainPeriod = 2 * time.Second
)

// inbound holds what arrived on an accepted connection and may not be read yet, or may and was not.
//
// One goroutine for each connection, the keeper, brings requests in: only it asks the controller, which must not happen
// with locks of the stack held. While the body of a released request passes, the program's own reads move it.
type inbound struct {
	mu     sync.Mutex
	open   []byte      // the program may read these
	held   []byte      // and not these
	body   *http1.Body // of the released request, as long as bytes of it may come
	free   bool        // audit: everything passes
	err    tcpip.Error // what reads return behind the open bytes
	closed bool        // by the program
	keeper bool        // the keeper sends the guard's own answer, and closes the inner endpoint then

	wake chan struct{} // to the keeper; has room for one
	gone chan struct{} // closed when the connection failed or the program closed it
	once sync.Once
}

func (r *inbound) end() { r.once.Do(func() { close(r.gone) }) }

// close is told that the program closed the connection. It says whether the keeper will close the inner endpoint.
func (r *inbound) close() bool {
	r.mu.Lock()
	r.closed = true
	keeper := r.keeper
	r.mu.Unlock()
	r.end()
	return keeper
}

func (r *inbound) size(inner int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.body == nil && !r.free {
		inner = 0
	} else {
		inner += len(r.held)
	}
	return len(r.open) + inner
}

// readiness must agree with readRequest: ready exactly when a read would return something.
func (r *inbound) readiness(mask, ready waiter.EventMask) waiter.EventMask {
	r.mu.Lock()
	defer r.mu.Unlock()
	passing := r.body != nil || r.free
	switch {
	case len(r.open) > 0, r.err != nil && !passing, passing && len(r.held) > 0:
		return ready | mask&waiter.ReadableEvents
	case passing:
		return ready
	}
	return ready &^ waiter.ReadableEvents
}

// readRequest gives the program bytes of released requests, and the end of the connection behind them.
func (s *Stream) readRequest(w io.Writer, o tcpip.ReadOptions) (tcpip.ReadResult, tcpip.Error) {
	r := &s.rx
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.open) == 0 && (r.body != nil || r.free) {
		if err := s.passBody(); err != nil {
			return tcpip.ReadResult{}, err
		}
	}
	if len(r.open) == 0 {
		if r.err != nil {
			return tcpip.ReadResult{}, r.err
		}
		return tcpip.ReadResult{}, &tcpip.ErrWouldBlock{}
	}
	n, err := w.Write(r.open)
	if n == 0 && err != nil {
		return tcpip.ReadResult{}, &tcpip.ErrBadBuffer{}
	}
	if !o.Peek {
		full := len(r.open) >= pullBytes
		if r.open = r.open[n:]; len(r.open) == 0 {
			r.open = nil
		}
		if full && len(r.open) < pullBytes {
			r.nudge()
		}
	}
	return tcpip.ReadResult{Count: n, Total: n}, nil
}

// passBody opens what is there of the released request's body. The lock of the inbound side is held.
func (s *Stream) passBody() tcpip.Error {
	r := &s.rx
	if len(r.held) == 0 {
		if err := s.pull(); err != nil {
			return err
		}
	}
	if r.free {
		r.open, r.held = r.held, nil
		return nil
	}
	n, done, err := r.body.Feed(r.held)
	r.open, r.held = r.held[:n:n], r.held[n:]
	if err != nil {
		// Where the next request begins is not known.
		if s.in.Broken(err) == guard.Marked {
			r.free, r.body = true, nil
			return nil
		}
		// The program gets what belonged to the body, and then the end.
		r.body, r.held, r.err = nil, nil, &tcpip.ErrConnectionReset{}
		return nil
	}
	if done {
		r.body = nil
		r.nudge()
	}
	return nil
}

func (r *inbound) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// pull takes what the inner endpoint has. The lock of the inbound side is held.
func (s *Stream) pull() tcpip.Error {
	r := &s.rx
	if len(r.held) >= pullBytes {
		return nil
	}
	buffer := bytes.NewBuffer(r.held)
	_, err := s.inner.Read(&tcpip.LimitedWriter{W: buffer, N: int64(pullBytes - len(r.held))}, tcpip.ReadOptions{})
	r.held = buffer.Bytes()
	return err
}

// keep starts the keeper.
func (s *Stream) keep() {
	s.rx.wake = make(chan struct{}, 1)
	s.rx.gone = make(chan struct{})
	if s.in.Free() {
		s.rx.free = true
		return
	}
	// The callback may run with the inner endpoint's lock held, so it looks at the state only, which takes none.
	entry := waiter.NewFunctionEntry(waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr|waiter.EventRdHUp, func(waiter.EventMask) {
		if gone(s.inner.State()) {
			s.rx.end()
		}
		s.rx.nudge()
	})
	s.queue.EventRegister(&entry)
	go func() {
		defer s.queue.EventUnregister(&entry)
		s.bring()
	}()
}

// bring brings in one request after the other until the connection ends.
func (s *Stream) bring() {
	r := &s.rx
	var since time.Time // when the first byte of the head that is held came
	for {
		r.mu.Lock()
		if r.closed {
			r.mu.Unlock()
			return
		}
		var failed tcpip.Error
		head := r.body == nil && len(r.open) < pullBytes // the program has to read before more comes in
		if head {
			for failed == nil && len(r.held) < pullBytes {
				failed = s.pull()
			}
		}
		held := r.held
		r.mu.Unlock()

		timer := (*time.Timer)(nil)
		if head && len(held) > 0 {
			if since.IsZero() {
				since = time.Now()
			}
			admission := s.in.Admit(held, r.gone)
			if admission.Short && time.Since(since) >= guard.HoldMax {
				admission = s.in.Overdue()
			}
			switch {
			case admission.Short:
				timer = time.AfterFunc(guard.HoldMax-time.Since(since), r.nudge)
			case admission.Free:
				s.open(func() { r.free = true })
				return
			case admission.Refusal != nil:
				s.answerInstead(admission.Refusal)
				return
			case admission.Release != nil:
				since = time.Time{}
				s.open(func() {
					r.open, r.held, r.body = append(r.open, admission.Release...), r.held[admission.Taken:], admission.Body
					if _, done, err := r.body.Feed(nil); done && err == nil {
						r.body = nil
					}
				})
				continue
			}
		}
		if _, empty := failed.(*tcpip.ErrWouldBlock); failed != nil && !empty {
			s.open(func() { r.err, r.held = failed, nil })
			if connected(s.inner.State()) {
				// The peer has only ended its side. It may still be waiting for an answer.
				if _, eof := failed.(*tcpip.ErrClosedForReceive); eof {
					<-r.gone
				}
			}
			s.in.Lost()
			return
		}
		select {
		case <-r.wake:
		case <-r.gone:
			failed = &tcpip.ErrConnectionReset{}
		}
		if timer != nil {
			timer.Stop()
		}
		if _, reset := failed.(*tcpip.ErrConnectionReset); reset {
			s.lost()
			return
		}
	}
}

// open changes what the program may read and tells it so.
func (s *Stream) open(change func()) {
	s.rx.mu.Lock()
	change()
	s.rx.mu.Unlock()
	s.queue.Notify(waiter.ReadableEvents)
}

// lost is the end of a connection that the peer reset. After the program's own close nobody reads any more.
func (s *Stream) lost() {
	s.open(func() {
		if s.rx.err == nil {
			s.rx.err = &tcpip.ErrConnectionReset{}
		}
		s.rx.body, s.rx.held = nil, nil
	})
	s.in.Lost()
}

// answerInstead sends the guard's own answer. The program sees a connection that ended before a request came. The inner
// endpoint stays open until the peer had time to read: closing it with unread bytes would send a RST, and that makes
// the peer forget the answer.
func (s *Stream) answerInstead(answer []byte) {
	r := &s.rx
	r.mu.Lock()
	r.keeper = !r.closed
	keeper := r.keeper
	r.mu.Unlock()
	if !keeper {
		return
	}
	s.write.Lock()
	s.tx.send(&message{b: answer}, tcpip.WriteOptions{}) // if that fails there is nobody left to answer
	if !s.tx.later(tcpip.ShutdownWrite, false) {
		s.inner.Shutdown(tcpip.ShutdownWrite)
	}
	s.write.Unlock()
	s.open(func() { r.err, r.held = &tcpip.ErrClosedForReceive{}, nil })

	deadline := time.NewTimer(drainPeriod)
	defer deadline.Stop()
	drained := 0
	for open := true; open && drained < drainBytes; {
		result, err := s.inner.Read(io.Discard, tcpip.ReadOptions{})
		drained += result.Count
		if err == nil {
			continue
		}
		if _, empty := err.(*tcpip.ErrWouldBlock); !empty {
			break
		}
		select {
		case <-r.wake:
		case <-deadline.C:
			open = false
		}
	}
	r.mu.Lock()
	r.keeper = false
	closed := r.closed
	r.mu.Unlock()
	if closed {
		s.inner.Close()
		s.leave()
	}
}
