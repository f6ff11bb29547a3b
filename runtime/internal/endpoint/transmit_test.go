package endpoint

import (
	"bytes"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"
)

// stalled is an inner endpoint whose receiver takes nothing until it is opened.
type stalled struct {
	tcpip.Endpoint
	open bool // guarded by the lock of the queue in front of it
	got  bytes.Buffer
}

func (s *stalled) Write(p tcpip.Payloader, _ tcpip.WriteOptions) (int64, tcpip.Error) {
	if !s.open {
		return 0, &tcpip.ErrWouldBlock{}
	}
	n, err := s.got.ReadFrom(p)
	if err != nil {
		panic(err)
	}
	return n, nil
}

// What waits must not cost more than it is long by much: a program may write single bytes to a receiver that takes none.
func TestTinyWritesThatWaitStayWithinTheirMemory(t *testing.T) {
	for _, size := range []int{1, 1000, smallMessage, smallMessage + 1, 100 << 10} {
		inner, queue := &stalled{}, &waiter.Queue{}
		q := &transmit{inner: inner, queue: queue}
		var want strings.Builder
		for q.admit() == nil {
			m := newMessage(size)
			for i := range m.b {
				m.b[i] = byte(want.Len() + i)
			}
			want.Write(m.b)
			must(t, q.send(&m, tcpip.WriteOptions{}))
			m.free()
		}

		kept := 0
		q.mu.Lock()
		for i := range q.parts {
			p := &q.parts[i]
			kept += cap(p.b) + 64
			if p.small != nil {
				kept += smallMessage - cap(p.b)
			}
			if p.large != nil {
				kept += messageMax - cap(p.b)
			}
		}
		inner.open = true
		q.mu.Unlock()
		if most := 4 * (highWater + messageMax); kept > most {
			t.Errorf("writes of %d bytes: %d wait in %d bytes of memory, at most %d", size, want.Len(), kept, most)
		}
		for q.size() > 0 {
			queue.Notify(waiter.WritableEvents)
		}
		if got := inner.got.String(); got != want.String() {
			t.Errorf("writes of %d bytes: %d arrived of %d, or not as they were", size, len(got), want.Len())
		}
	}
}
