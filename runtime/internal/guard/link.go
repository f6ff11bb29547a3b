package guard

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// Bounds of the link.
const (
	queueMax   = 1024 // frames that wait to be written
	pendingMax = 256  // questions without an answer, the abandoned ones included
	readBytes  = 64 << 10

	lastWordMax = time.Second // for what the agent said before it went
)

// Errors of a link. The texts are details for people.
var (
	errLinkDown   = errors.New("the agent is gone")
	errNoAnswer   = errors.New("no answer within the policy's deadline")
	errLinkFull   = errors.New("too many questions wait for an answer")
	errQueueStuck = errors.New("the agent takes no frames")
	errStarved    = errors.New("the sandbox had no time to hear the answer")
)

// Link is the guard's end of the connection to the agent. The connection cannot be made again from inside of the
// sandbox: when it is down, questions fail at once and local decisions go on until the lease ends.
type Link struct {
	conn  io.ReadWriteCloser // Close ends reads and writes that are under way
	asks  chan *[]byte       // questions, each of them pending: they never wait behind what is only told
	mode  chan *[]byte       // the newest word on the mode in force
	queue chan *[]byte       // other frames
	spare chan *[]byte       // buffers of frames that were written
	down  chan struct{}
	once  sync.Once
	lost  func() // hears that the agent is gone, before anybody who asks does
	// fallback takes verdicts of which the agent will not hear any more.
	fallback func(*frame.VerdictRecord)

	mu      sync.Mutex
	last    uint32
	pending map[uint32]*question
}

// question waits for its answer. An abandoned one stays until the answer comes, because a granted start has to be
// ended by somebody.
type question struct {
	answer    chan *frame.Answer
	abandoned bool
	start     bool
}

// NewLink makes a link of conn, on which Hello and Welcome were exchanged with ids up to lastID. Call Serve to begin.
func NewLink(conn io.ReadWriteCloser, lastID uint32, fallback func(*frame.VerdictRecord)) *Link {
	return &Link{
		conn: conn, asks: make(chan *[]byte, pendingMax), mode: make(chan *[]byte, 1), queue: make(chan *[]byte, queueMax),
		spare: make(chan *[]byte, queueMax), down: make(chan struct{}), lost: func() {}, fallback: fallback,
		last: lastID, pending: map[uint32]*question{},
	}
}

// Serve reads and writes until the connection fails, in two goroutines that Serve starts. reader may hold bytes that
// came behind the Welcome. What the agent tells goes to g; report hears why it stopped, and of updates that were refused.
func (l *Link) Serve(reader *frame.Reader, g *Guard, report func(string)) {
	l.lost = g.orphaned
	go l.write(report)
	go l.read(reader, g, report)
}

func (l *Link) fail(report func(string), why error) {
	l.once.Do(func() {
		l.lost()
		close(l.down)
		l.conn.Close()
		report(why.Error())
	})
}

func (l *Link) write(report func(string)) {
	for {
		queued := l.nextFrame()
		if queued == nil {
			return
		}
		for b := *queued; len(b) > 0; {
			n, err := l.conn.Write(b)
			if err != nil {
				// What the agent said last may still be there to be read: that the lease is over.
				time.AfterFunc(lastWordMax, func() { l.fail(report, fmt.Errorf("write to the agent: %w", err)) })
				return
			}
			b = b[n:]
		}
		l.recycle(queued)
	}
}

// nextFrame is what is to be written next; nil: nothing any more.
func (l *Link) nextFrame() *[]byte {
	select {
	case b := <-l.asks:
		return b
	default:
	}
	select {
	case b := <-l.asks:
		return b
	case b := <-l.mode:
		return b
	case b := <-l.queue:
		return b
	case <-l.down:
		return nil
	}
}

func (l *Link) read(reader *frame.Reader, g *Guard, report func(string)) {
	buffer := make([]byte, readBytes)
	for {
		for {
			id, m, err := reader.Next()
			if err == frame.ErrShort {
				break
			}
			if err == nil {
				err = l.take(id, m, g, report)
			}
			if err != nil {
				l.fail(report, fmt.Errorf("what the agent said: %w", err))
				return
			}
		}
		n, err := l.conn.Read(buffer)
		if n == 0 || err != nil {
			if err == nil {
				err = io.EOF
			}
			l.fail(report, fmt.Errorf("read from the agent: %w", err))
			return
		}
		reader.Feed(buffer[:n])
	}
}

func (l *Link) take(id uint32, m frame.Message, g *Guard, report func(string)) error {
	switch m := m.(type) {
	case *frame.Answer:
		l.answered(id, m)
	case *frame.Policy:
		if err := g.SetPolicy(m.App, m.Policy); err != nil {
			report("a policy was refused, the last good one stays: " + err.Error())
		}
	case *frame.Lease:
		g.Renew(m.LeaseMS)
	case *frame.Names:
		if err := g.SetNames(m.Names); err != nil {
			report("a list of names was refused, the last one stays: " + err.Error())
		}
	default:
		return fmt.Errorf("message of type %d, which is not for a guard", m.Type())
	}
	return nil
}

func (l *Link) answered(id uint32, answer *frame.Answer) {
	l.mu.Lock()
	q := l.pending[id]
	delete(l.pending, id)
	late := q != nil && q.abandoned
	if q != nil && !late {
		q.answer <- answer // has room for one
	}
	l.mu.Unlock()
	if late && q.start && answer.Allowed {
		l.End(&frame.End{Call: answer.Call, Invocation: answer.Invocation, Outcome: outcomeClosed})
	}
}

const (
	frameBytes   = 512  // that nearly every verdict fits into
	frameKeptMax = 1024 // bytes of a buffer that is worth keeping
)

// buffer is one for a frame: of those that were written, if there is one.
func (l *Link) buffer() *[]byte {
	select {
	case b := <-l.spare:
		return b
	default:
		b := make([]byte, 0, frameBytes)
		return &b
	}
}

func (l *Link) recycle(b *[]byte) {
	if cap(*b) > frameKeptMax {
		return
	}
	*b = (*b)[:0]
	select {
	case l.spare <- b:
	default:
	}
}

// send queues one frame, which is not the caller's any more unless send fails. A nil timeout does not wait.
func (l *Link) send(b *[]byte, timeout <-chan time.Time) error {
	select {
	case <-l.down:
		return errLinkDown
	default:
	}
	select {
	case l.queue <- b:
		return nil
	default:
	}
	if timeout == nil {
		return errQueueStuck
	}
	select {
	case l.queue <- b:
		return nil
	case <-timeout:
		return errQueueStuck
	case <-l.down:
		return errLinkDown
	}
}

func (l *Link) ask(deadline time.Time, m frame.Message, start bool) (*frame.Answer, error) {
	select {
	case <-l.down:
		return nil, errLinkDown
	default:
	}
	q := &question{answer: make(chan *frame.Answer, 1), start: start}
	l.mu.Lock()
	if len(l.pending) >= pendingMax {
		l.mu.Unlock()
		return nil, errLinkFull
	}
	for taken := true; taken; _, taken = l.pending[l.last] {
		if l.last++; l.last == 0 {
			l.last = 1
		}
	}
	id := l.last
	l.pending[id] = q
	l.mu.Unlock()
	b, err := frame.Append(nil, id, m)
	if err == nil {
		select {
		case l.asks <- &b:
		default: // there is room for all that are pending, as long as nobody answers what was not asked
			err = errQueueStuck
		}
	}
	if err != nil {
		l.mu.Lock()
		delete(l.pending, id)
		l.mu.Unlock()
		return nil, err
	}
	answer, err := l.wait(q, deadline)
	switch {
	case answer != nil:
		return answer, nil
	case err == errNoAnswer && len(l.queue) == cap(l.queue):
		err = errQueueStuck
	}
	l.mu.Lock()
	q.abandoned = true
	l.mu.Unlock()
	select {
	case answer := <-q.answer: // came at the same moment
		return answer, nil
	default:
		return nil, err
	}
}

const (
	waitSlice  = 5 * time.Millisecond
	starvedMax = 8 // deadlines, after which nobody waits any more
)

// wait waits for the answer to q. The deadline runs only while this process does: a program that uses up the processors of its
// sandbox, so that all of it stands still, must not make an answer that is there already look like none.
func (l *Link) wait(q *question, deadline time.Time) (*frame.Answer, error) {
	last := time.Now()
	left := deadline.Sub(last)
	end := last.Add(starvedMax * left)
	timer := time.NewTimer(min(left, waitSlice))
	defer timer.Stop()
	for {
		select {
		case answer := <-q.answer:
			return answer, nil
		case <-l.down:
			return nil, errLinkDown
		case <-timer.C:
		}
		now := time.Now()
		left -= min(now.Sub(last), waitSlice)
		switch {
		case left <= 0:
			return nil, errNoAnswer
		case now.After(end):
			return nil, errStarved
		}
		last = now
		timer.Reset(min(left, waitSlice))
	}
}

// Start implements Controller.
func (l *Link) Start(deadline time.Time, m *frame.Start) (*frame.Answer, error) {
	return l.ask(deadline, m, true)
}

// Invoke implements Controller.
func (l *Link) Invoke(deadline time.Time, m *frame.Invoke) (*frame.Answer, error) {
	return l.ask(deadline, m, false)
}

// Finish implements Controller.
func (l *Link) Finish(deadline time.Time, m *frame.Finish) (*frame.Answer, error) {
	return l.ask(deadline, m, false)
}

// Mode implements Controller. It takes the place of what was not written yet.
func (l *Link) Mode(m *frame.Mode) {
	b, err := frame.Append(nil, 0, m)
	if err != nil {
		panic(err) // a mode and a version fit every frame
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.mode:
	default:
	}
	l.mode <- &b
}

// End implements Controller. While the queue is full it waits in the background; an end that is never told is one that
// the controller's own bounds make up for.
func (l *Link) End(m *frame.End) {
	b, err := frame.Append(nil, 0, m)
	if err != nil {
		panic(err) // both names came from the controller in a frame, so they fit one
	}
	if l.send(&b, nil) == errQueueStuck {
		go l.send(&b, time.After(HoldMax))
	}
}

// Log implements Controller. Once the agent is gone, verdicts go to the fallback: local decisions are meant to go on.
func (l *Link) Log(deadline time.Time, r *frame.VerdictRecord) error {
	b := l.buffer()
	whole, err := frame.AppendVerdict((*b)[:0], r)
	if err != nil {
		l.recycle(b)
		return err
	}
	*b = whole
	if err = l.send(b, nil); err == errQueueStuck {
		timer := time.NewTimer(time.Until(deadline))
		defer timer.Stop()
		err = l.send(b, timer.C)
	}
	if err != nil {
		l.recycle(b)
	}
	if err == errLinkDown {
		l.fallback(r)
		return nil
	}
	return err
}
