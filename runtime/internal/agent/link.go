package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// linkHooks is what the agent does with what a controller says. No two of them run at once.
type linkHooks interface {
	// welcomed is called with each new connection before questions of guards go over it.
	welcomed(c *linkConn, welcome *frame.ControllerWelcome)
	// opened is called once questions go over it.
	opened(c *linkConn)
	policyArrived(app string, envelope []byte)
	leaseArrived(leaseMS int)
}

// link keeps one connection to one of the controllers, and makes a new one whenever it ends.
//
// What was asked and not answered when a connection ends is parked and asked again over the next one, with its step, by
// which the controllers know it again. With one controller there is nobody else to ask, so it is denied at once.
type link struct {
	config      *Config
	order       []Controller // in which they are tried; drawn at the start, so that the agents of a site are spread over them
	runID       string       // of this start of the agent
	connections atomic.Int64 // that said hello, to whichever controller
	hooks       linkHooks
	count       *metrics
	log         *slog.Logger

	silence     time.Duration // after which a connection is given up
	redialEvery time.Duration // while a certificate is about to expire

	mu        sync.Mutex
	conn      *linkConn    // guarded by mu; nil while no controller is connected
	parkUntil time.Time    // guarded by mu; without a connection, questions are parked until then and denied afterwards
	parked    []*question  // guarded by mu; in the order in which they are to be asked
	untold    []*frame.End // guarded by mu; those to tell over the next connection
	forgotten int          // guarded by mu; ENDs that found no room in untold since the last connection
}

// question is asked of a controller until it has its answer.
type question struct {
	m     frame.Message
	max   int                 // open questions at which one of this kind is refused
	again bool                // may be asked over the next connection too: a repetition changes nothing
	done  func(*frame.Answer) // called exactly once: with the answer, or with nil when no controller gives one

	// The link's:
	since  time.Time // when it was asked over its connection
	until  time.Time // how long it may be parked; zero when it never was
	number uint64    // of the questions of its connection
	ping   bool
}

func newLink(config *Config, runID string, hooks linkHooks, count *metrics, log *slog.Logger) *link {
	order := slices.Clone(config.Controllers)
	rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	l := &link{config: config, order: order, runID: runID, hooks: hooks, count: count, log: log, silence: silenceAlone, redialEvery: redialEvery}
	if len(order) > 1 {
		l.silence = silenceAmongOthers
	}
	return l
}

// run connects and serves until ctx ends, and then answers what is still parked with nil.
func (l *link) run(ctx context.Context) {
	defer l.deny()
	failed, lost := 0, 0 // attempts in a row, and connections in a row that did not last
	last := ""           // the address that was connected last
	for next := 0; ctx.Err() == nil; next = (next + 1) % len(l.order) {
		controller := l.order[next]
		// In the first round the next controller is worth more than patience with this one.
		patient := failed >= len(l.order)
		c, welcome, err := l.open(ctx, controller, patient)
		if err != nil {
			if ctx.Err() == nil && (!patient || failed%(len(l.order)*sayAwayEvery) < len(l.order)) {
				l.sayAway(controller, err)
			}
			// Only behind a whole round: one of the others may be there.
			if failed++; failed%len(l.order) == 0 {
				rest(ctx, failed/len(l.order), backoffMax)
			}
			continue
		}
		if last != "" && last != controller.Address {
			l.count.failOvers.Add(1)
		}
		last = controller.Address
		began := time.Now()
		err = l.serve(ctx, c, welcome)
		if ctx.Err() != nil {
			return
		}
		l.log.Warn(eventControllerLost, keyAddress, controller.Address, keyName, controller.Name, keyError, err)
		failed = 0
		if time.Since(began) >= stableAfter {
			lost = 0
		}
		if lost++; lost >= len(l.order) {
			rest(ctx, lost-len(l.order)+1, backoffLost)
		}
	}
}

// rest waits the nth time in a row: twice as long each time up to longest, and a random part of it, so that the agents of a site do not come back in step.
func rest(ctx context.Context, nth int, longest time.Duration) {
	delay := longest
	if nth < 16 {
		delay = min(backoffMin<<(nth-1), longest)
	}
	wait := time.NewTimer(delay/2 + rand.N(delay/2))
	defer wait.Stop()
	select {
	case <-ctx.Done():
	case <-wait.C:
	}
}

func (l *link) sayAway(controller Controller, err error) {
	var refused *refusedError
	if errors.As(err, &refused) && refused.reason == reasonDuplicateAgent {
		// Either the node's name was given twice, or somebody has this agent's key.
		l.log.Error(eventDuplicateAgent, keyAddress, controller.Address, keyName, controller.Name, keyNode, l.config.Node, keyError,
			"another agent of this name is connected; if no second one was set up, its key is stolen: issue new certificates from a new CA")
		return
	}
	l.log.Warn(eventControllerAway, keyAddress, controller.Address, keyName, controller.Name, keyError, err)
}

// serve uses a welcomed connection to its end, and its successors, which it makes before a certificate expires. The error
// says why the last one ended.
func (l *link) serve(ctx context.Context, c *linkConn, welcome *frame.ControllerWelcome) error {
	for {
		successor, next, err := l.serveOne(ctx, c, welcome)
		if successor == nil {
			return err
		}
		c, welcome = successor, next
	}
}

// serveOne uses a welcomed connection. It returns the one that is to take its place, or why it ended.
func (l *link) serveOne(ctx context.Context, c *linkConn, welcome *frame.ControllerWelcome) (*linkConn, *frame.ControllerWelcome, error) {
	stop := context.AfterFunc(ctx, c.close)
	defer stop()
	l.welcome(c, welcome)
	ended := make(chan error, 1)
	stopped := make(chan struct{})
	defer close(stopped)
	go func() { ended <- l.listen(c) }()
	go c.watch(l.silence, stopped)
	l.use(c)
	l.log.Info(eventControllerUp, keyAddress, c.controller.Address, keyName, c.controller.Name)
	redial := time.NewTimer(l.untilRedial(c, time.Now()))
	defer redial.Stop()
	for {
		select {
		case err := <-ended:
			l.lost(c, len(l.order) > 1)
			return nil, nil, err
		case <-redial.C:
			successor, next, err := l.open(ctx, c.controller, false)
			if err != nil {
				l.log.Error(eventRedialFailed, keyAddress, c.controller.Address, keyName, c.controller.Name, keyError, err)
				redial.Reset(l.untilRedial(c, time.Now()))
				continue
			}
			// The controller may have closed the old one already: one agent has one connection. No two of them are read at once.
			c.close()
			<-ended
			l.lost(c, true)
			l.log.Info(eventRedialled, keyAddress, c.controller.Address, keyName, c.controller.Name)
			return successor, next, nil
		}
	}
}

// welcome gives the welcome to the agent, which registers its instances over c.
func (l *link) welcome(c *linkConn, welcome *frame.ControllerWelcome) {
	l.mu.Lock()
	l.parkUntil = time.Now().Add(parkMax) // a controller is there: what is asked from here on waits for its turn
	l.mu.Unlock()
	l.hooks.welcomed(c, welcome)
}

// use makes c the connection over which questions go. First go the ENDs that could not be told: a callback may wait for one.
// Then what is parked, and only then what is new.
func (l *link) use(c *linkConn) {
	for {
		l.mu.Lock()
		ends, parked, forgotten := l.untold, l.parked, l.forgotten
		l.untold, l.parked, l.forgotten = nil, nil, 0
		if len(ends) == 0 && len(parked) == 0 {
			l.conn = c
			l.mu.Unlock()
			break
		}
		l.mu.Unlock()
		if forgotten > 0 {
			l.log.Warn(eventEndDropped, keyCount, forgotten)
		}
		for _, q := range parked {
			if !q.since.IsZero() {
				l.count.repeated.Add(1)
			}
		}
		c.begin(ends, parked)
		l.count.parked.Add(-int64(len(parked)))
	}
	l.hooks.opened(c)
}

// lost takes what is open from a connection that has ended. With park it waits for the next one.
func (l *link) lost(c *linkConn, park bool) {
	now := time.Now()
	l.mu.Lock()
	l.conn = nil
	l.parkUntil = now
	if park {
		l.parkUntil = now.Add(parkMax)
	}
	l.mu.Unlock()
	questions, ends := c.end()
	var denied []*question
	l.mu.Lock()
	for _, end := range ends {
		l.keep(end)
	}
	for _, q := range questions {
		if q.until.IsZero() {
			q.until = now.Add(parkMax)
		}
		if park && q.again && now.Before(q.until) {
			l.park(q)
		} else {
			denied = append(denied, q)
		}
	}
	l.mu.Unlock()
	for _, q := range denied {
		q.done(nil)
	}
	if park {
		time.AfterFunc(parkMax, l.sweep)
	}
}

// park needs mu.
func (l *link) park(q *question) {
	l.parked = append(l.parked, q)
	l.count.parked.Add(1)
}

// keep holds an END for the next connection. At the bound the oldest goes: its controller ends the invocation by its own
// clock sooner than those of the others. It needs mu.
func (l *link) keep(end *frame.End) {
	if len(l.untold) >= endsMax {
		l.untold = l.untold[1:]
		l.forgotten++
	}
	l.untold = append(l.untold, end)
}

// sweep denies what was parked for as long as it may be.
func (l *link) sweep() {
	now := time.Now()
	l.mu.Lock()
	var over []*question
	kept := l.parked[:0]
	for _, q := range l.parked {
		if now.Before(q.until) {
			kept = append(kept, q)
		} else {
			over = append(over, q)
		}
	}
	clear(l.parked[len(kept):])
	l.parked = kept
	l.count.parked.Add(-int64(len(over)))
	l.mu.Unlock()
	for _, q := range over {
		q.done(nil)
	}
}

// deny ends the parking: the agent stops.
func (l *link) deny() {
	l.mu.Lock()
	parked := l.parked
	l.parked, l.parkUntil = nil, time.Time{}
	l.count.parked.Add(-int64(len(parked)))
	l.mu.Unlock()
	for _, q := range parked {
		q.done(nil)
	}
}

// ask asks the controller, now or, while another one is sought, as soon as one is connected. It returns "" when the question
// was taken; otherwise the reason for which it was not, and done is not called.
func (l *link) ask(q *question) policy.Reason {
	for {
		l.mu.Lock()
		c := l.conn
		if c == nil {
			defer l.mu.Unlock()
			switch {
			case !time.Now().Before(l.parkUntil):
				return policy.ReasonControllerUnavailable
			case len(l.parked) >= q.max:
				return policy.ReasonOverloaded
			}
			q.until = l.parkUntil
			l.park(q)
			return ""
		}
		l.mu.Unlock()
		if reason, taken := c.ask(q); taken {
			return reason
		}
		// It has ended meanwhile, and is not l.conn any more.
	}
}

// ended tells the controller the end of an invocation, over the next connection if there is none.
func (l *link) ended(m *frame.End) {
	for {
		l.mu.Lock()
		c := l.conn
		if c == nil {
			l.keep(m)
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		if c.ended(m) {
			return
		}
	}
}

// tell sends what is worth nothing to the next controller.
func (l *link) tell(m frame.Message) error {
	c := l.current()
	if c == nil {
		return errAway
	}
	return c.tell(m)
}

var errAway = errors.New("no controller is connected")

// current returns the connection, or nil while no controller is connected.
func (l *link) current() *linkConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn
}

// status lists the controllers as the configuration has them.
func (l *link) status() []controllerStatus {
	c := l.current()
	all := make([]controllerStatus, 0, len(l.config.Controllers))
	for _, each := range l.config.Controllers {
		all = append(all, controllerStatus{Address: each.Address, Name: each.Name, Connected: c != nil && c.controller == each})
	}
	return all
}

// listen takes frames until the connection ends.
func (l *link) listen(c *linkConn) error {
	for {
		id, m, err := c.reader.next()
		if err == nil {
			err = l.hear(c, id, m)
		}
		if err != nil {
			c.sender.giveUp(err) // who writes meets the same end
			return c.sender.reason()
		}
	}
}

// hear handles one frame. An error is the controller's mistake and ends the connection.
func (l *link) hear(c *linkConn, id uint32, m frame.Message) error {
	switch m := m.(type) {
	case *frame.Answer:
		if m.Allowed != (m.Reason == string(policy.ReasonAllowed)) {
			return fmt.Errorf("an answer that says allowed=%t with reason %s", m.Allowed, m.Reason)
		}
		return c.answered(id, m)
	case *frame.Pong:
		return c.ponged(id)
	case *frame.Policy:
		l.hooks.policyArrived(m.App, m.Policy)
	case *frame.Lease:
		l.hooks.leaseArrived(m.LeaseMS)
	default:
		return fmt.Errorf("a frame of type %d, which a controller does not send", m.Type())
	}
	return nil
}

// reasonDuplicateAgent is the reason of a welcome that says no because another agent of this name is connected.
const reasonDuplicateAgent = "duplicate_agent"

// refusedError is a welcome that says no.
type refusedError struct{ reason string }

func (e *refusedError) Error() string {
	return "the controller refuses this agent: " + policy.Printable(e.reason, logTextMax)
}

// open makes a connection to a controller and returns it with its welcome. The one says more about a slow controller than
// the other; patient is for when there is no better one.
func (l *link) open(ctx context.Context, controller Controller, patient bool) (*linkConn, *frame.ControllerWelcome, error) {
	limit := attemptPatient
	if len(l.order) > 1 && !patient {
		limit = attemptBrief
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	raw, expires, err := dial(ctx, l.config, controller)
	if err != nil {
		return nil, nil, err
	}
	c := newLinkConn(raw, controller, expires)
	stop := context.AfterFunc(ctx, func() { c.giveUp(context.Cause(ctx)) })
	defer stop()
	welcome, err := l.hello(c)
	if err != nil {
		c.giveUp(err)
		return nil, nil, c.sender.reason()
	}
	if !stop() {
		return nil, nil, c.sender.reason()
	}
	return c, welcome, nil
}

func (l *link) hello(c *linkConn) (*frame.ControllerWelcome, error) {
	const helloID = 1
	data, err := frame.Append(nil, helloID, &frame.AgentHello{
		Protos: frame.Protos(), Node: l.config.Node, Run: l.runID, Connection: int(l.connections.Add(1)),
	})
	if err != nil {
		return nil, err
	}
	c.lastID = helloID
	if err := c.sender.send(data); err != nil {
		return nil, err
	}
	id, m, err := c.reader.next()
	if err != nil {
		return nil, err
	}
	welcome, ok := m.(*frame.ControllerWelcome)
	switch {
	case !ok || id != helloID:
		return nil, fmt.Errorf("a frame of type %d in place of the welcome", m.Type())
	case !welcome.OK:
		return nil, &refusedError{welcome.Reason}
	case frame.Negotiated([]int{welcome.Proto}) == 0:
		return nil, fmt.Errorf("the controller chose protocol %d, which this agent did not offer", welcome.Proto)
	}
	return welcome, nil
}

// untilRedial is how long a connection is used before its successor is made, so that neither certificate expires in use.
// Whoever renews them may come late, so it is tried more than once.
func (l *link) untilRedial(c *linkConn, now time.Time) time.Duration {
	left := c.expires.Sub(now)
	return max(left-redialBefore, min(l.redialEvery, left/2), l.redialEvery/redialsMax)
}
