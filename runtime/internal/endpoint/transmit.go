package endpoint

import (
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	highWater = 256 << 10        // no more is taken from the program while so much waits
	closeWait = 60 * time.Second // for the peer to take what was written before close(2)
)

func connected(state uint32) bool {
	s := tcp.EndpointState(state)
	return s == tcp.StateEstablished || s == tcp.StateCloseWait
}

// gone tells that the connection failed or that both sides have ended it for good. Before that there may be bytes to read,
// also when the program has ended its own side.
func gone(state uint32) bool {
	s := tcp.EndpointState(state)
	return s == tcp.StateError || s == tcp.StateClose
}

// transmit holds judged bytes that the inner endpoint has no room for. A message was read and judged once, so it has to
// be taken whole: a message is admitted while less than highWater waits, and the socket is writable exactly then. At
// most highWater, messageMax and the held bytes of one unit wait, in memory that is a few times as long.
//
// While bytes wait, one goroutine feeds them to the inner endpoint. The waiter's callback cannot: the stack calls it with
// the endpoint's lock held.
type transmit struct {
	inner tcpip.Endpoint
	queue *waiter.Queue
	gone  func() // hears that inner was closed here

	mu      sync.Mutex
	parts   []message
	n       int
	opts    tcpip.WriteOptions
	out     payload       // to save an allocation
	stop    chan struct{} // not nil while the goroutine runs; closed by drop
	shut    tcpip.ShutdownFlags
	closing bool
	dropped bool
}

func (q *transmit) size() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.n
}

// admit tells whether a message may be read. The caller is the only one who sends, so room stays there.
func (q *transmit) admit() tcpip.Error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.shut != 0 || q.closing:
		return &tcpip.ErrClosedForSend{}
	case q.dropped:
		return &tcpip.ErrConnectionReset{}
	case q.n >= highWater:
		return &tcpip.ErrWouldBlock{}
	}
	return nil
}

func (q *transmit) readiness(mask, ready waiter.EventMask) waiter.EventMask {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.stop == nil {
		return ready
	}
	if q.n >= highWater {
		return ready &^ waiter.WritableEvents
	}
	if connected(q.inner.State()) {
		ready |= mask & waiter.WritableEvents
	}
	return ready
}

// send takes all of m, or says that the connection is gone. It may take the buffer out of m.
func (q *transmit) send(m *message, o tcpip.WriteOptions) tcpip.Error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.shut != 0 || q.closing:
		return &tcpip.ErrClosedForSend{}
	case q.dropped:
		return &tcpip.ErrConnectionReset{}
	}
	sent := 0
	if q.stop == nil {
		q.out.b = m.b
		n, err := q.inner.Write(&q.out, o)
		q.out.b = nil
		if _, full := err.(*tcpip.ErrWouldBlock); err != nil && !full {
			return err
		}
		if sent = int(n); sent == len(m.b) {
			return nil
		}
		q.stop = make(chan struct{})
		go q.feed(q.stop)
	}
	q.opts = o
	q.n += len(m.b) - sent
	if !q.join(m.b[sent:]) {
		q.parts = append(q.parts, m.rest(sent))
	}
	return nil
}

// join puts b behind the last part, if there is room in its buffer: otherwise each of many tiny writes would keep one.
func (q *transmit) join(b []byte) bool {
	if len(q.parts) == 0 {
		return false
	}
	last := &q.parts[len(q.parts)-1]
	if len(b) > cap(last.b)-len(last.b) {
		return false
	}
	last.b = append(last.b, b...)
	return true
}

// later puts a shutdown or a close behind the waiting bytes. It says no when none wait.
func (q *transmit) later(f tcpip.ShutdownFlags, closing bool) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.stop == nil {
		return false
	}
	q.shut |= f
	q.closing = q.closing || closing
	return true
}

// drop forgets the waiting bytes; nothing is sent any more.
func (q *transmit) drop() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.parts, q.n, q.dropped = nil, 0, true
	if q.stop != nil {
		close(q.stop)
		q.stop = nil
	}
}

func (q *transmit) feed(stop chan struct{}) {
	entry, room := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	q.queue.EventRegister(&entry)
	defer q.queue.EventUnregister(&entry)
	var deadline <-chan time.Time
	for {
		more, closing := q.advance(stop)
		if !more {
			return
		}
		if closing && deadline == nil {
			timer := time.NewTimer(closeWait)
			defer timer.Stop()
			deadline = timer.C
		}
		select {
		case <-room:
		case <-stop: // advance sees what is left to do
		case <-deadline:
			q.drop()
			q.inner.Abort()
			q.inner.Close()
			q.gone()
			return
		}
	}
}

// advance gives the inner endpoint what it has room for. more says that bytes still wait.
func (q *transmit) advance(stop chan struct{}) (more, closing bool) {
	q.mu.Lock()
	if q.stop != stop {
		// Whoever dropped the bytes ended the connection; the program may have closed it before.
		closing = q.closing
		q.mu.Unlock()
		if closing {
			q.inner.Close()
			q.gone()
		}
		return false, false
	}
	before := q.n
	var failed tcpip.Error
	for len(q.parts) > 0 && failed == nil {
		m := &q.parts[0]
		q.out.b = m.b
		n, err := q.inner.Write(&q.out, q.opts)
		q.out.b = nil
		q.n -= int(n)
		if m.b = m.b[n:]; len(m.b) == 0 {
			m.free()
			q.parts = q.parts[1:]
			continue
		}
		if _, full := err.(*tcpip.ErrWouldBlock); full || err == nil && n == 0 {
			break
		}
		failed = err
	}
	if failed != nil {
		q.parts, q.n = nil, 0
	}
	if len(q.parts) > 0 {
		closing = q.closing
		woke := before >= highWater && q.n < highWater
		q.mu.Unlock()
		if woke {
			q.queue.Notify(waiter.WritableEvents)
		}
		return true, closing
	}
	q.parts, q.stop = nil, nil
	shut, closing := q.shut, q.closing
	q.mu.Unlock()
	if shut != 0 && failed == nil {
		q.inner.Shutdown(shut)
	}
	if closing {
		q.inner.Close()
		q.gone()
	}
	q.queue.Notify(waiter.WritableEvents)
	return false, false
}
