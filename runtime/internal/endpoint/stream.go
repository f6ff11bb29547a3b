package endpoint

import (
	"io"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/guard"
)

// Stream is a guarded TCP endpoint.
type Stream struct {
	base
	v6 bool
	tx transmit

	// How the connection is treated. It is set before bytes can pass: by Connect, with the write lock held, or at Accept.
	kind  atomic.Uint32
	out   *guard.Outgoing // kindOutgoing
	in    *guard.Incoming // kindIncoming
	rx    inbound         // kindIncoming
	shown shown           // kindOutgoing
	// kindOutgoing whose TLS ends in the guard: set by the write that completes the hello, and kept.
	ending atomic.Pointer[guard.Termination]
	ended  atomic.Bool // by the guard: the connection was reset

	counted atomic.Bool // among the connections that the guard bounds

	write sync.Mutex // one Write at a time, also while the judge waits for an answer
	after tcpip.Error
	hold  *time.Timer // runs while bytes of an unfinished unit are held
}

// Kinds of connection. The zero kind has none, so nothing can be sent on it.
const (
	kindNone uint32 = iota
	kindLocal
	kindOutgoing
	kindIncoming
)

// NewStream wraps inner, a TCP endpoint that is not connected, whose waiter queue is queue. own says which addresses
// belong to the sandbox. A nil guard denies everything outside of it.
func NewStream(g *guard.Guard, inner tcpip.Endpoint, queue *waiter.Queue, net tcpip.NetworkProtocolNumber, own Own) *Stream {
	return newStream(g, inner, queue, net == header.IPv6ProtocolNumber, own)
}

func newStream(g *guard.Guard, inner tcpip.Endpoint, queue *waiter.Queue, v6 bool, own Own) *Stream {
	s := &Stream{base: base{inner: inner, queue: queue, guard: g, own: own}, v6: v6}
	s.tx.inner, s.tx.queue, s.tx.gone = inner, queue, s.leave
	return s
}

// Connect implements tcpip.Endpoint.
func (s *Stream) Connect(to tcpip.FullAddress) tcpip.Error {
	if begun(s.inner.State()) {
		return s.inner.Connect(to)
	}
	// Write holds the same lock while it looks at the kind of the connection and sends. Otherwise a write that saw a
	// loopback connection, which then failed, could send on the next one.
	s.write.Lock()
	defer s.write.Unlock()
	if begun(s.inner.State()) {
		return s.inner.Connect(to)
	}
	to = definite(to, s.v6)
	kind, out := kindLocal, (*guard.Outgoing)(nil)
	if !s.isOwn(to) {
		var outcome guard.Outcome
		if out, outcome = s.guard.Connect(addressPortOf(to)); outcome == guard.Denied {
			return &tcpip.ErrNotPermitted{}
		}
		kind = kindOutgoing
		s.leave() // an attempt before this one
		s.counted.Store(true)
		s.float()
	}
	if out != nil { // a read that saw the attempt before this one may still look at its own
		s.out = out
	}
	s.kind.Store(kind)
	err := s.inner.Connect(to)
	switch err.(type) {
	case nil, *tcpip.ErrConnectStarted:
	default:
		s.kind.Store(kindNone)
	}
	return err
}

// begun tells that a connection was begun, so that connect(2) only asks what became of it: gVisor begins no second one.
// Only Connect and Listen leave the first two states, and neither leads back.
func begun(state uint32) bool {
	s := tcp.EndpointState(state)
	return s != tcp.StateInitial && s != tcp.StateBound
}

// Accept implements tcpip.Endpoint: what comes out is guarded as well. Connections from outside that no invocation can
// come from are reset here, before a byte passes either way.
func (s *Stream) Accept(peer *tcpip.FullAddress) (tcpip.Endpoint, *waiter.Queue, tcpip.Error) {
	for {
		var from tcpip.FullAddress
		inner, queue, err := s.inner.Accept(&from)
		if err != nil {
			return nil, nil, err
		}
		child := newStream(s.guard, inner, queue, s.v6, s.own)
		if !child.admit(from) {
			inner.Abort()
			inner.Close()
			continue
		}
		if peer != nil {
			*peer = from
		}
		return child, queue, nil
	}
}

func (s *Stream) admit(from tcpip.FullAddress) bool {
	if s.isOwn(tcpip.FullAddress{Addr: from.Addr}) {
		s.kind.Store(kindLocal)
		return true
	}
	to, err := s.inner.GetLocalAddress()
	if err != nil {
		return false
	}
	in, outcome := s.guard.Accept(to.Port, addressPortOf(from))
	if outcome == guard.Denied {
		return false
	}
	s.in = in
	s.counted.Store(true)
	s.float()
	s.kind.Store(kindIncoming)
	s.keep()
	return true
}

// Write implements tcpip.Endpoint.
//
// A short count makes gVisor's socket wait until there is room. So a count is only short when the transmit queue is
// full, or when the next call has something to say, which is then announced.
func (s *Stream) Write(p tcpip.Payloader, o tcpip.WriteOptions) (int64, tcpip.Error) {
	s.write.Lock()
	defer s.write.Unlock()
	kind := s.kind.Load()
	if kind == kindLocal {
		return s.inner.Write(p, o)
	}
	if err := s.after; err != nil {
		s.after = nil
		return 0, err
	}
	o.To = nil // Linux ignores it on a connected stream, and so does gVisor
	var total int64
	for {
		n, err := s.writePart(kind, p, o)
		total += n
		if err == nil && p.Len() > 0 {
			continue
		}
		if total == 0 || err == nil {
			return total, err
		}
		switch err.(type) {
		case *tcpip.ErrWouldBlock, *tcpip.ErrBadBuffer: // the rest says so itself when it is written
		default:
			// EPERM behind a partial result is nothing that gVisor's system calls know how to report.
			if _, denied := err.(*tcpip.ErrNotPermitted); denied {
				err = &tcpip.ErrConnectionReset{}
			}
			s.after = err
			s.queue.Notify(waiter.WritableEvents)
		}
		return total, nil
	}
}

type nothing struct{}

func (nothing) Read([]byte) (int, error) { return 0, io.EOF }
func (nothing) Len() int                 { return 0 }

// writePart takes, judges and sends at most messageMax bytes. What is read from p is gone, so nothing may fail for lack
// of room after that. The write lock is held.
func (s *Stream) writePart(kind uint32, p tcpip.Payloader, o tcpip.WriteOptions) (int64, tcpip.Error) {
	if s.ended.Load() {
		return 0, &tcpip.ErrConnectionReset{}
	}
	if !connected(s.inner.State()) || kind == kindNone {
		// An empty write gives the error that belongs to the state.
		if _, err := s.inner.Write(nothing{}, o); err != nil {
			if e := s.ending.Load(); s.ended.Load() || e != nil && e.Failed() {
				err = &tcpip.ErrConnectionReset{} // a termination ends it from its own goroutine, also since it was asked above
			}
			return 0, err
		}
		if kind == kindNone {
			return 0, &tcpip.ErrClosedForSend{}
		}
	}
	n := min(p.Len(), messageMax)
	if e := s.ending.Load(); e != nil {
		var err tcpip.Error
		if n, err = admitTerminated(e, n); err != nil {
			return 0, err
		}
	} else if err := s.tx.admit(); err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, nil
	}
	m := newMessage(n)
	defer m.free()
	if _, err := io.ReadFull(p, m.b); err != nil { // the only read of the program's memory
		return 0, &tcpip.ErrBadBuffer{} // what cannot be read whole is no message, as in gVisor's own endpoint
	}
	var err tcpip.Error
	if kind == kindOutgoing {
		err = s.sendOutgoing(&m, o)
	} else {
		err = s.sendAnswer(&m, o)
	}
	if err != nil {
		return 0, err
	}
	return int64(n), nil
}

func (s *Stream) sendOutgoing(m *message, o tcpip.WriteOptions) tcpip.Error {
	send, outcome := s.out.Write(m.b)
	var err tcpip.Error
	switch {
	case len(send) == 0:
	case len(send) <= len(m.b) && &send[0] == &m.b[0]: // passes as it is, in the buffer that it was read into
		m.b = send
		err = s.tx.send(m, o)
	default:
		err = s.tx.send(&message{b: send}, o)
	}
	s.out.Sent()
	if outcome == guard.Denied {
		// What was judged before the denied unit is on its way as far as TCP takes it at once.
		s.reset()
		return &tcpip.ErrNotPermitted{}
	}
	s.terminate()
	s.watchHeld()
	return err
}

// watchHeld gives the bytes that are held a deadline. The write lock is held.
func (s *Stream) watchHeld() {
	n, since := s.out.Held()
	if n == 0 || s.ending.Load() != nil { // a termination watches by itself
		if s.hold != nil {
			s.hold.Stop()
			s.hold = nil
		}
		return
	}
	wait := time.Until(since.Add(guard.HoldMax))
	if s.hold == nil {
		s.hold = time.AfterFunc(wait, s.expire)
	} else {
		s.hold.Reset(wait)
	}
}

// expire judges bytes whose unit did not become whole in time.
func (s *Stream) expire() {
	s.write.Lock()
	defer s.write.Unlock()
	if n, since := s.out.Held(); n == 0 || time.Since(since) < guard.HoldMax || s.ending.Load() != nil {
		return
	}
	s.giveUp(false)
}

// giveUp ends what is held: in enforce it is denied and the connection reset. The write lock is held.
func (s *Stream) giveUp(cut bool) {
	send, outcome := s.out.Expire(cut)
	if outcome == guard.Denied {
		s.reset()
	} else if len(send) > 0 {
		s.tx.send(&message{b: send}, tcpip.WriteOptions{})
		s.out.Sent()
	}
}

func (s *Stream) sendAnswer(m *message, o tcpip.WriteOptions) tcpip.Error {
	n, outcome := s.in.Answer(m.b)
	var err tcpip.Error
	if n > 0 {
		m.b = m.b[:n]
		err = s.tx.send(m, o)
	}
	if outcome != guard.Denied {
		return err
	}
	if n == 0 {
		s.reset()
	} else if !s.tx.later(tcpip.ShutdownWrite, false) {
		// The answer itself is whole: the peer gets it, and then the end. Nothing more is taken.
		s.inner.Shutdown(tcpip.ShutdownWrite)
	}
	return &tcpip.ErrNotPermitted{}
}

// reset ends the connection with a RST. Nothing that waits is sent. It takes no lock that is held while something is judged.
func (s *Stream) reset() {
	s.ended.Store(true)
	s.tx.drop()
	s.inner.Abort()
	s.queue.Notify(waiter.ReadableEvents | waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
}

// Read implements tcpip.Endpoint.
func (s *Stream) Read(w io.Writer, o tcpip.ReadOptions) (tcpip.ReadResult, tcpip.Error) {
	if s.ended.Load() {
		return tcpip.ReadResult{}, &tcpip.ErrConnectionReset{}
	}
	switch s.kind.Load() {
	case kindIncoming:
		return s.readRequest(w, o)
	case kindOutgoing:
		if e := s.ending.Load(); e != nil {
			return readTerminated(e, w, o)
		}
		return s.readAnswer(w, o)
	}
	return s.inner.Read(w, o)
}

// Readiness implements tcpip.Endpoint.
func (s *Stream) Readiness(mask waiter.EventMask) waiter.EventMask {
	ready := s.inner.Readiness(mask)
	switch s.kind.Load() {
	case kindOutgoing:
		if e := s.ending.Load(); e != nil {
			return readyTerminated(e, mask, ready)
		}
		ready = s.shown.readiness(mask, s.tx.readiness(mask, ready))
	case kindIncoming:
		ready = s.rx.readiness(mask, s.tx.readiness(mask, ready))
	}
	return ready
}

// Shutdown implements tcpip.Endpoint. What was taken before is sent first.
func (s *Stream) Shutdown(f tcpip.ShutdownFlags) tcpip.Error {
	if e := s.ending.Load(); e != nil {
		if !connected(s.inner.State()) {
			return &tcpip.ErrNotConnected{}
		}
		shutTerminated(e, f)
		return nil
	}
	if f&tcpip.ShutdownWrite != 0 {
		s.finishWriting(false)
		if s.tx.later(tcpip.ShutdownWrite, false) {
			if f &^= tcpip.ShutdownWrite; f == 0 {
				return nil
			}
		}
	}
	return s.inner.Shutdown(f)
}

// finishWriting settles what the program will not add to any more. cut: it resets the connection.
func (s *Stream) finishWriting(cut bool) {
	switch s.kind.Load() {
	case kindOutgoing:
		s.write.Lock()
		defer s.write.Unlock()
		s.giveUp(true)
		s.watchHeld()
	case kindIncoming:
		if s.in.Close(cut) == guard.Denied {
			s.reset()
		}
	}
}

// Close implements tcpip.Endpoint. What was taken before is sent first, unless SO_LINGER asks for a reset.
func (s *Stream) Close() {
	kind := s.kind.Load()
	linger := s.inner.SocketOptions().GetLinger()
	if e := s.ending.Load(); e != nil {
		if linger.Enabled && linger.Timeout == 0 {
			s.tx.drop()
			e.Abort()
			s.inner.Abort()
		}
		e.Close() // which closes the inner endpoint at last
		return
	}
	cut := linger.Enabled && linger.Timeout == 0
	if cut {
		s.tx.drop()
	}
	s.finishWriting(cut)
	switch kind {
	case kindOutgoing:
		s.unread()
		s.out.Close()
	case kindIncoming:
		if s.rx.close() {
			return // the guard's own answer is on its way, and its sender closes
		}
	}
	s.closeInner()
}

// closeInner closes the inner endpoint behind what waits.
func (s *Stream) closeInner() {
	if !s.tx.later(0, true) {
		s.inner.Close()
		s.leave()
	}
}

// leave tells the guard that the connection is gone.
func (s *Stream) leave() {
	if s.counted.Swap(false) {
		s.guard.Leave()
	}
}

// Abort implements tcpip.Endpoint.
func (s *Stream) Abort() {
	s.tx.drop()
	switch s.kind.Load() {
	case kindOutgoing:
		if e := s.ending.Load(); e != nil {
			e.Abort()
			break // it closes s.out
		}
		s.unread()
		s.out.Close()
	case kindIncoming:
		s.in.Close(true)
		s.rx.close()
	}
	s.inner.Abort()
	s.leave()
}

// GetSockOptInt implements tcpip.Endpoint. Bytes that wait here count.
func (s *Stream) GetSockOptInt(o tcpip.SockOptInt) (int, tcpip.Error) {
	v, err := s.inner.GetSockOptInt(o)
	if err != nil {
		return v, err
	}
	if e := s.ending.Load(); e != nil {
		switch o {
		case tcpip.SendQueueSizeOption:
			v += s.tx.size() + e.Unsent()
		case tcpip.ReceiveQueueSizeOption:
			v, _ = e.Unread()
		}
		return v, nil
	}
	switch o {
	case tcpip.SendQueueSizeOption:
		v += s.tx.size()
	case tcpip.ReceiveQueueSizeOption:
		switch s.kind.Load() {
		case kindIncoming:
			v = s.rx.size(v)
		case kindOutgoing:
			v += s.shown.size()
		}
	}
	return v, nil
}

// LastError implements tcpip.Endpoint.
func (s *Stream) LastError() tcpip.Error {
	err := s.inner.LastError()
	if s.ended.Load() {
		return &tcpip.ErrConnectionReset{}
	}
	return err
}

// Disconnect implements tcpip.Endpoint. TCP endpoints of gVisor do not support it.
func (s *Stream) Disconnect() tcpip.Error { return s.inner.Disconnect() }

// Listen implements tcpip.Endpoint.
func (s *Stream) Listen(backlog int) tcpip.Error { return s.inner.Listen(backlog) }

// GetRemoteAddress implements tcpip.Endpoint.
func (s *Stream) GetRemoteAddress() (tcpip.FullAddress, tcpip.Error) {
	return s.inner.GetRemoteAddress()
}
