package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// linkHooks is what the agent does with what the controller says. They are called on the reading goroutine.
type linkHooks interface {
	// welcomed is called with each new connection before questions of guards go over it.
	welcomed(c *linkConn, welcome *frame.ControllerWelcome)
	// opened is called once questions go over it.
	opened(c *linkConn)
	policyArrived(app string, envelope []byte)
	leaseArrived(leaseMS int)
}

// link keeps one connection to the controller, and makes a new one whenever it ends.
type link struct {
	config *Config
	runID  string // of this start of the agent
	hooks  linkHooks
	log    *slog.Logger

	mu   sync.Mutex
	conn *linkConn // guarded by mu; nil while the controller is away
}

// linkConn is one welcomed connection.
type linkConn struct {
	sender sender

	mu      sync.Mutex
	lastID  uint32              // guarded by mu
	pending map[uint32]question // guarded by mu; nil when the connection has ended

	registered []*instance // what was registered over it before it was opened; of the reading goroutine
}

// question waits for its answer. done is called exactly once: with the answer, or with nil when the connection ends.
type question struct {
	since time.Time
	done  func(*frame.Answer)
}

// run connects and serves until ctx ends.
func (l *link) run(ctx context.Context) {
	delay := backoffMin
	for ctx.Err() == nil {
		welcomed, err := l.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if welcomed {
			delay = backoffMin
			l.log.Warn(eventControllerLost, keyAddress, l.config.Controllers[0].Address, keyError, err)
		} else if delay == backoffMin || delay == backoffMax { // the first failure, and then one every two seconds
			l.log.Warn(eventControllerAway, keyAddress, l.config.Controllers[0].Address, keyError, err)
		}
		// A random part, so that the agents of a site do not come back in step.
		wait := time.NewTimer(delay/2 + rand.N(delay/2))
		select {
		case <-ctx.Done():
		case <-wait.C:
		}
		wait.Stop()
		delay = min(2*delay, backoffMax)
	}
}

// session serves one connection to its end and tells whether the controller welcomed it.
func (l *link) session(ctx context.Context) (welcomed bool, err error) {
	raw, err := l.dial(ctx)
	if err != nil {
		return false, err
	}
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() }) // ends the read below
	defer stop()
	c := &linkConn{
		sender:  sender{conn: raw, inline: true, max: linkPendingMax, timeout: linkWriteTimeout},
		pending: map[uint32]question{},
	}
	defer c.end()
	reader := &frameReader{conn: raw, buffer: make([]byte, linkReadBytes)}
	welcome, err := l.hello(c, reader)
	if err != nil {
		return false, err
	}
	l.hooks.welcomed(c, welcome)
	l.set(c)
	defer l.set(nil) // before c.end: new questions are refused at once, and then the open ones are answered
	l.hooks.opened(c)
	l.log.Info(eventControllerUp, keyAddress, l.config.Controllers[0].Address)
	watched := make(chan struct{})
	defer close(watched)
	go c.watch(watched)
	for {
		if err := raw.SetReadDeadline(time.Now().Add(linkIdle)); err != nil {
			return true, err
		}
		id, m, err := reader.next()
		if err != nil {
			return true, err
		}
		if err := l.take(c, id, m); err != nil {
			return true, err
		}
	}
}

func (l *link) set(c *linkConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn = c
}

// current returns the connection, or nil when the controller is away.
func (l *link) current() *linkConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn
}

// dial reads the certificates each time, so that new ones come into force without a restart.
func (l *link) dial(ctx context.Context) (net.Conn, error) {
	controller, files := l.config.Controllers[0], l.config.TLS
	authority, err := readBounded(files.CA, configBytesMax)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		return nil, fmt.Errorf("%s holds no certificate", files.CA)
	}
	own, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: controller.Name, Certificates: []tls.Certificate{own},
	}}
	return dialer.DialContext(ctx, "tcp", controller.Address)
}

func (l *link) hello(c *linkConn, reader *frameReader) (*frame.ControllerWelcome, error) {
	const helloID = 1
	data, err := frame.Append(nil, helloID, &frame.AgentHello{Protos: frame.Protos(), Node: l.config.Node, Run: l.runID})
	if err != nil {
		return nil, err
	}
	c.lastID = helloID
	if err := c.sender.send(data); err != nil {
		return nil, err
	}
	if err := reader.conn.SetReadDeadline(time.Now().Add(welcomeTimeout)); err != nil {
		return nil, err
	}
	id, m, err := reader.next()
	if err != nil {
		return nil, err
	}
	welcome, ok := m.(*frame.ControllerWelcome)
	if !ok || id != helloID {
		return nil, fmt.Errorf("a frame of type %d in place of the welcome", m.Type())
	}
	if welcome.OK && frame.Negotiated([]int{welcome.Proto}) == 0 {
		return nil, fmt.Errorf("the controller chose protocol %d, which this agent did not offer", welcome.Proto)
	}
	if !welcome.OK {
		return nil, fmt.Errorf("the controller refuses this agent: %s", policy.Printable(welcome.Reason, logTextMax))
	}
	return welcome, nil
}

// take handles one frame. An error is the controller's mistake and ends the connection.
func (l *link) take(c *linkConn, id uint32, m frame.Message) error {
	switch m := m.(type) {
	case *frame.Answer:
		if m.Allowed != (m.Reason == string(policy.ReasonAllowed)) {
			return fmt.Errorf("an answer that says allowed=%t with reason %s", m.Allowed, m.Reason)
		}
		return c.answered(id, m)
	case *frame.Policy:
		l.hooks.policyArrived(m.App, m.Policy)
	case *frame.Lease:
		l.hooks.leaseArrived(m.LeaseMS)
	default:
		return fmt.Errorf("a frame of type %d, which a controller does not send", m.Type())
	}
	return nil
}

// ask sends a question. It returns false when the question was not taken, and then done is not called. max is the
// number of open questions at which this kind of question is refused.
func (c *linkConn) ask(m frame.Message, max int, done func(*frame.Answer)) bool {
	c.mu.Lock()
	if c.pending == nil || len(c.pending) >= max {
		c.mu.Unlock()
		return false
	}
	for {
		c.lastID++
		if _, used := c.pending[c.lastID]; c.lastID != 0 && !used {
			break
		}
	}
	id := c.lastID
	data, err := frame.Append(nil, id, m)
	if err != nil {
		c.mu.Unlock()
		return false // a field beyond its bound: the question cannot be asked
	}
	c.pending[id] = question{since: time.Now(), done: done}
	c.mu.Unlock()
	// When the write fails the connection is closed, and its end answers this question like every open one.
	_ = c.sender.send(data)
	return true
}

// tell sends what has no answer.
func (c *linkConn) tell(m frame.Message) error {
	data, err := frame.Append(nil, 0, m)
	if err != nil {
		return err
	}
	return c.sender.send(data)
}

func (c *linkConn) answered(id uint32, answer *frame.Answer) error {
	c.mu.Lock()
	q, open := c.pending[id]
	delete(c.pending, id)
	c.mu.Unlock()
	if !open {
		return fmt.Errorf("an answer with id %d, which no open question has", id)
	}
	q.done(answer)
	return nil
}

// end closes the connection and tells every open question.
func (c *linkConn) end() {
	c.sender.close()
	c.mu.Lock()
	open := c.pending
	c.pending = nil
	c.mu.Unlock()
	for _, q := range open {
		q.done(nil)
	}
}

// watch closes the connection when a question stays without an answer: a controller that owes one for so long is dead,
// whatever its kernel still acknowledges.
func (c *linkConn) watch(stop <-chan struct{}) {
	ticker := time.NewTicker(answerCheck)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-ticker.C:
			if c.overdue(now) {
				c.sender.close()
				return
			}
		}
	}
}

func (c *linkConn) overdue(now time.Time) bool {
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
}

var errHalfFrame = errors.New("the stream ends inside a frame")

func (r *frameReader) next() (uint32, frame.Message, error) {
	for {
		id, m, err := r.frames.Next()
		if err != frame.ErrShort {
			return id, m, err
		}
		n, err := r.conn.Read(r.buffer)
		r.frames.Feed(r.buffer[:n])
		if n == 0 && err != nil {
			if r.frames.Held() > 0 && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
				err = fmt.Errorf("%w: %w", errHalfFrame, err)
			}
			return 0, nil, err
		}
	}
}
