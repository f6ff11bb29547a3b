package endpoint

import (
	"io"
	gonet "net"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/guard"
)

// terminatedPart is how much of a write is taken at once where TLS ends in the guard, which holds it until it is read.
const terminatedPart = 64 << 10

// terminate has the guard serve the connection from here on, if its TLS ends there. The write lock is held.
func (s *Stream) terminate() {
	if s.ending.Load() != nil {
		return
	}
	e := s.out.Termination()
	if e == nil {
		return
	}
	l := &line{s: s, aborted: make(chan struct{})}
	e.Prepare(l,
		func() { s.queue.Notify(waiter.ReadableEvents | waiter.EventRdHUp) },
		func() { s.queue.Notify(waiter.WritableEvents) })
	s.ending.Store(e)
	go e.Run()
}

// line is the connection to the server under a termination. It waits as gVisor's sockets do.
type line struct {
	s       *Stream
	aborted chan struct{}
	once    sync.Once
}

// wait calls try until it does not say that it would block.
func (l *line) wait(mask waiter.EventMask, try func() tcpip.Error) error {
	entry, ready := waiter.NewChannelEntry(mask | waiter.EventHUp | waiter.EventErr)
	l.s.queue.EventRegister(&entry)
	defer l.s.queue.EventUnregister(&entry)
	for {
		select {
		case <-l.aborted:
			return guard.ErrReset
		default:
		}
		switch err := try(); err.(type) {
		case nil:
			return nil
		case *tcpip.ErrWouldBlock:
		case *tcpip.ErrClosedForReceive:
			return io.EOF
		default:
			return guard.ErrReset
		}
		select {
		case <-ready:
		case <-l.aborted:
		}
	}
}

// Read implements net.Conn.
func (l *line) Read(b []byte) (n int, err error) {
	into := tcpip.SliceWriter(b)
	err = l.wait(waiter.ReadableEvents|waiter.EventRdHUp, func() tcpip.Error {
		result, err := l.s.inner.Read(&into, tcpip.ReadOptions{})
		n = result.Count
		return err
	})
	return n, err
}

// Write implements net.Conn. It leaves by the same queue as everything that was judged.
func (l *line) Write(b []byte) (int, error) {
	err := l.wait(waiter.WritableEvents, func() tcpip.Error {
		if err := l.s.tx.admit(); err != nil {
			return err
		}
		return l.s.tx.send(&message{b: b}, tcpip.WriteOptions{})
	})
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

// CloseWrite implements guard.Line.
func (l *line) CloseWrite() {
	if !l.s.tx.later(tcpip.ShutdownWrite, false) {
		l.s.inner.Shutdown(tcpip.ShutdownWrite)
	}
}

// Close implements net.Conn.
func (l *line) Close() error {
	l.end()
	l.s.closeInner()
	return nil
}

func (l *line) end() { l.once.Do(func() { close(l.aborted) }) }

// Abort implements guard.Line.
func (l *line) Abort(denied bool) {
	l.end()
	if denied {
		l.s.reset()
		return
	}
	l.s.tx.drop()
	l.s.inner.Abort()
	l.s.queue.Notify(waiter.ReadableEvents | waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
}

// LocalAddr and the others implement net.Conn; nobody asks for addresses, and Abort is the only deadline.
func (*line) LocalAddr() gonet.Addr            { return nil }
func (*line) RemoteAddr() gonet.Addr           { return nil }
func (*line) SetDeadline(time.Time) error      { return nil }
func (*line) SetReadDeadline(time.Time) error  { return nil }
func (*line) SetWriteDeadline(time.Time) error { return nil }

// admitTerminated tells whether a write is taken, and how much of it.
func admitTerminated(e *guard.Termination, n int) (int, tcpip.Error) {
	switch {
	case e.Failed():
		return 0, &tcpip.ErrConnectionReset{}
	case e.WriteClosed():
		return 0, &tcpip.ErrClosedForSend{}
	case !e.HasRoom():
		return 0, &tcpip.ErrWouldBlock{}
	}
	return min(n, terminatedPart), nil
}

// readTerminated gives the program what the guard has for it.
func readTerminated(e *guard.Termination, w io.Writer, o tcpip.ReadOptions) (tcpip.ReadResult, tcpip.Error) {
	n, failed, end := e.Read(w, o.Peek)
	switch {
	case n > 0:
		return tcpip.ReadResult{Count: n, Total: n}, nil
	case failed != nil:
		return tcpip.ReadResult{}, &tcpip.ErrBadBuffer{}
	case end == io.EOF:
		return tcpip.ReadResult{}, &tcpip.ErrClosedForReceive{}
	case end != nil:
		return tcpip.ReadResult{}, &tcpip.ErrConnectionReset{}
	}
	return tcpip.ReadResult{}, &tcpip.ErrWouldBlock{}
}

// readyTerminated must agree with readTerminated and admitTerminated. What happens to the connection to the server is no
// news before the guard has dealt with it.
func readyTerminated(e *guard.Termination, mask, ready waiter.EventMask) waiter.EventMask {
	failed := e.Failed()
	if !failed {
		ready &^= waiter.EventHUp | waiter.EventErr
	}
	ready &^= waiter.ReadableEvents | waiter.WritableEvents | waiter.EventRdHUp
	n, end := e.Unread()
	if n > 0 || end || failed {
		ready |= mask & waiter.ReadableEvents
	}
	if end || failed {
		ready |= mask & waiter.EventRdHUp
	}
	if failed || e.HasRoom() {
		ready |= mask & waiter.WritableEvents
	}
	return ready
}

// shutTerminated ends a side of the connection, or both.
func shutTerminated(e *guard.Termination, f tcpip.ShutdownFlags) {
	if f&tcpip.ShutdownWrite != 0 {
		e.CloseWrite()
	}
	if f&tcpip.ShutdownRead != 0 {
		e.CloseRead()
	}
}
