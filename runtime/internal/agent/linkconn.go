package agent

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// linkConn is one connection to a controller.
type linkConn struct {
	controller Controller
	expires    time.Time // when the first of the two certificates does
	reader     *frameReader
	sender     sender
	reading    atomic.Int64 // since when, by clock, the reader waits for bytes; 0 while it works on some

	mu      sync.Mutex
	lastID  uint32               // guarded by mu
	asked   uint64               // guarded by mu; questions so far
	pending map[uint32]*question // guarded by mu; nil when the connection has ended
	unsure  []unsureEnd          // guarded by mu; in the order in which they were told

	registered []*instance // what was registered over it before questions went over it; of the goroutine that serves it
}

// unsureEnd is an END that the controller may not have read yet. It has, once it answers a question that was asked after it.
type unsureEnd struct {
	end   *frame.End
	asked uint64 // questions of the connection by then
}

func newLinkConn(raw net.Conn, controller Controller, expires time.Time) *linkConn {
	c := &linkConn{
		controller: controller, expires: expires,
		sender:  sender{conn: raw, inline: true, max: linkPendingMax, timeout: linkWriteTimeout},
		pending: map[uint32]*question{},
	}
	c.reader = &frameReader{
		conn: raw, buffer: make([]byte, linkReadBytes),
		begin: func() { c.reading.Store(clock()) }, end: func() { c.reading.Store(0) },
	}
	return c
}

var clockBegin = time.Now()

// clock is monotonic and never 0.
func clock() int64 { return int64(time.Since(clockBegin)) + 1 }

// silent is how long the controller has said nothing. While we do not listen it may have spoken.
func (c *linkConn) silent() time.Duration {
	since := c.reading.Load()
	if since == 0 {
		return 0
	}
	return time.Duration(clock() - since)
}

// ask sends a question. It returns "" when the question was taken, and otherwise why not. It is not alive when the connection
// has ended: the question is still the caller's.
func (c *linkConn) ask(q *question) (refused policy.Reason, alive bool) {
	c.mu.Lock()
	data, refused, alive := c.add(nil, q)
	c.mu.Unlock()
	if refused == "" && alive {
		// When the write fails the connection is closed, and its end takes care of this question as of every open one.
		_ = c.sender.send(data)
	}
	return refused, alive
}

// add takes q and appends its frame to data. It needs mu.
func (c *linkConn) add(data []byte, q *question) (longer []byte, refused policy.Reason, alive bool) {
	if c.pending == nil {
		return data, "", false
	}
	if len(c.pending) >= q.max {
		return data, policy.ReasonOverloaded, true
	}
	for {
		c.lastID++
		if _, used := c.pending[c.lastID]; c.lastID != 0 && !used {
			break
		}
	}
	longer, err := frame.Append(data, c.lastID, q.m)
	if err != nil {
		return data, policy.ReasonMalformed, true // a field beyond its bound: it cannot be asked
	}
	c.asked++
	q.since, q.number = time.Now(), c.asked
	c.pending[c.lastID] = q
	return longer, "", true
}

// begin tells and asks what has waited for this connection, with few writes.
func (c *linkConn) begin(ends []*frame.End, parked []*question) {
	var data []byte
	flush := func(above int) {
		if len(data) > above {
			_ = c.sender.send(data) // as in ask
			data = data[:0]
		}
	}
	for _, end := range ends {
		c.mu.Lock()
		if longer, err := frame.Append(data, 0, end); err == nil {
			data = longer
			c.unsure = append(c.unsure, unsureEnd{end, c.asked})
		}
		c.mu.Unlock()
		flush(linkWriteBytes)
	}
	for _, q := range parked {
		c.mu.Lock()
		longer, refused, _ := c.add(data, q)
		c.mu.Unlock()
		if data = longer; refused != "" {
			q.done(denial(refused, "the next controller has no room for the question"))
		}
		flush(linkWriteBytes)
	}
	flush(0)
}

// tell sends what has no answer.
func (c *linkConn) tell(m frame.Message) error {
	data, err := frame.Append(nil, 0, m)
	if err != nil {
		return err
	}
	return c.sender.send(data)
}

// ended tells the end of an invocation and remembers it until the controller has certainly read it. It is not alive when the
// connection has ended.
func (c *linkConn) ended(m *frame.End) (alive bool) {
	_ = c.tell(m) // when it fails the connection ends, and it is told over the next one
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending == nil {
		return false
	}
	if len(c.unsure) >= endsMax {
		c.unsure = c.unsure[1:] // read long ago, most likely
	}
	c.unsure = append(c.unsure, unsureEnd{m, c.asked})
	return true
}

// answered gives a question its answer.
func (c *linkConn) answered(id uint32, answer *frame.Answer) error {
	q, err := c.take(id, false)
	if err != nil {
		return err
	}
	q.done(answer)
	return nil
}

func (c *linkConn) ponged(id uint32) error {
	_, err := c.take(id, true)
	return err
}

func (c *linkConn) take(id uint32, ping bool) (*question, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	q := c.pending[id]
	if q == nil || q.ping != ping {
		return nil, fmt.Errorf("an answer with id %d, which no open question of its kind has", id)
	}
	delete(c.pending, id)
	if q.again {
		// It was decided, and the frames of a connection are worked on in their order: so the ENDs in front of it were too.
		read := 0
		for read < len(c.unsure) && c.unsure[read].asked < q.number {
			read++
		}
		c.unsure = c.unsure[read:]
	}
	return q, nil
}

// end takes what is open, in the order in which it was asked and told. Nothing more is taken after it.
func (c *linkConn) end() (questions []*question, ends []*frame.End) {
	c.sender.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range c.pending {
		if !q.ping {
			questions = append(questions, q)
		}
	}
	slices.SortFunc(questions, func(a, b *question) int { return cmp.Compare(a.number, b.number) })
	for _, each := range c.unsure {
		ends = append(ends, each.end)
	}
	c.pending, c.unsure = nil, nil
	return questions, ends
}

// close ends the connection behind what was sent.
func (c *linkConn) close() { c.sender.finish(linkFinishTimeout) }

// giveUp ends the connection without waiting for anything: the controller is not believed to be there.
func (c *linkConn) giveUp(why error) { c.sender.giveUp(why) }

var (
	errSilent  = errors.New("the controller says nothing")
	errOverdue = errors.New("the controller leaves a question without an answer")
	errExpired = errors.New("a certificate of the connection has expired")
)

// watch gives the connection up when the controller is silent, owes an answer for too long, or when a certificate expires:
// after that the connection proves nothing any more. A controller that has nothing to say is asked whether it is there.
func (c *linkConn) watch(silence time.Duration, stop <-chan struct{}) {
	timer := time.NewTimer(pingAfter)
	defer timer.Stop()
	for {
		select {
		case <-stop:
			return
		case <-timer.C:
		}
		silent := c.silent()
		switch {
		case silent >= silence:
			c.giveUp(fmt.Errorf("%w for %d ms", errSilent, silent.Milliseconds()))
			return
		case c.isOverdue(time.Now()):
			c.giveUp(fmt.Errorf("%w for %v", errOverdue, answerTimeout))
			return
		case !time.Now().Before(c.expires):
			c.giveUp(errExpired)
			return
		}
		wait := pingAfter - silent
		if wait <= 0 {
			c.ping()
			wait = pingAfter
		}
		timer.Reset(min(wait, silence-silent))
	}
}

// ping must not wait for a write: who watches does it.
func (c *linkConn) ping() {
	c.mu.Lock()
	data, refused, alive := c.add(nil, &question{m: &frame.Ping{}, max: questionsMax, ping: true})
	c.mu.Unlock()
	if refused == "" && alive {
		_ = c.sender.sendAside(data)
	}
}

func (c *linkConn) isOverdue(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range c.pending {
		if now.Sub(q.since) > answerTimeout {
			return true
		}
	}
	return false
}

// frameReader takes frames from a connection.
type frameReader struct {
	conn   net.Conn
	frames frame.Reader
	buffer []byte
	begin  func() // called around each read; nil: nobody wants to know
	end    func()
}

var errHalfFrame = errors.New("the stream ends inside a frame")

func (r *frameReader) next() (uint32, frame.Message, error) {
	for {
		id, m, err := r.frames.Next()
		if err != frame.ErrShort {
			return id, m, err
		}
		n, err := r.read()
		r.frames.Feed(r.buffer[:n])
		if n == 0 && err != nil {
			if r.frames.Held() > 0 && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
				err = fmt.Errorf("%w: %w", errHalfFrame, err)
			}
			return 0, nil, err
		}
	}
}

func (r *frameReader) read() (int, error) {
	if r.begin == nil {
		return r.conn.Read(r.buffer)
	}
	r.begin()
	defer r.end()
	return r.conn.Read(r.buffer)
}
