package endpoint

import (
	"bytes"
	"io"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// shownBytesMax bounds what was shown to the guard and not yet read by the program.
const shownBytesMax = 64 << 10

// shown is the reading side of a connection to a peer. As long as the guard has to know what the server says, the bytes are
// taken out of the inner endpoint into our own memory, shown once, and read by the program from there: looking at them
// twice does not count twice, and the program cannot act on what the guard has not seen. Afterwards reads go to the inner
// endpoint.
type shown struct {
	direct atomic.Bool // nothing is shown any more, and nothing waits here

	mu      sync.Mutex
	waiting bytes.Buffer
}

func (r *shown) size() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waiting.Len()
}

// readAnswer gives the program what the server sent, and tells the guard how much that was.
func (s *Stream) readAnswer(w io.Writer, o tcpip.ReadOptions) (tcpip.ReadResult, tcpip.Error) {
	result, err := s.readShown(w, o)
	switch err.(type) {
	case nil:
		s.out.Answered(result.Count)
	case *tcpip.ErrWouldBlock, *tcpip.ErrBadBuffer:
	default:
		if !answerable(s.inner.State()) {
			s.out.Ended()
		}
	}
	return result, err
}

// answerable tells that the peer may still send. A program that only shuts its reading side down reads the end, too, and its
// requests are worked on nevertheless.
func answerable(state uint32) bool {
	switch tcp.EndpointState(state) {
	case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2:
		return true
	}
	return false
}

// unread is told to the guard at the end: an answer that the program did not read is one.
func (s *Stream) unread() {
	if n, err := s.GetSockOptInt(tcpip.ReceiveQueueSizeOption); err == nil {
		s.out.Answered(n)
	}
}

func (s *Stream) readShown(w io.Writer, o tcpip.ReadOptions) (tcpip.ReadResult, tcpip.Error) {
	r := &s.shown
	if r.direct.Load() {
		return s.inner.Read(w, o)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waiting.Len() == 0 {
		if !s.out.Watches() {
			r.direct.Store(true)
			return s.inner.Read(w, o)
		}
		_, err := s.inner.Read(&tcpip.LimitedWriter{W: &r.waiting, N: shownBytesMax}, tcpip.ReadOptions{})
		if err != nil {
			return tcpip.ReadResult{}, err
		}
		s.out.Inbound(r.waiting.Bytes())
	}
	if r.waiting.Len() == 0 {
		return tcpip.ReadResult{}, nil
	}
	n, err := w.Write(r.waiting.Bytes())
	if n == 0 && err != nil {
		return tcpip.ReadResult{}, &tcpip.ErrBadBuffer{}
	}
	if !o.Peek {
		if r.waiting.Next(n); r.waiting.Len() == 0 {
			r.waiting = bytes.Buffer{}
		}
	}
	return tcpip.ReadResult{Count: n, Total: n}, nil
}

// readiness must agree with readAnswer.
func (r *shown) readiness(mask, ready waiter.EventMask) waiter.EventMask {
	if !r.direct.Load() && r.size() > 0 {
		ready |= mask & waiter.ReadableEvents
	}
	return ready
}
