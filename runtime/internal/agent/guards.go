package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// guard is one connection on the guard socket. Its identity comes from the registration of the instance that its hello
// named, and never changes.
type guard struct {
	conn     *net.UnixConn
	sender   sender
	identity frame.Identity
	protos   []int // that the guard speaks

	mode    string // guarded by the agent's mu; what is in force in the sandbox; "" while the guard has not said it
	version int    // guarded by the agent's mu; by which policy

	mu   sync.Mutex
	open map[uint32]struct{} // guarded by mu; ids of questions without an answer
}

func newGuard(conn *net.UnixConn) (*guard, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	attempt := func(data []byte) int {
		written := 0
		// The descriptor does not block. Whatever goes wrong here is met again, and handled, by the blocking write.
		_ = raw.Write(func(fd uintptr) bool {
			if n, err := unix.Write(int(fd), data); err == nil {
				written = n
			}
			return true
		})
		return written
	}
	return &guard{
		conn:   conn,
		sender: sender{conn: conn, max: guardPendingMax, timeout: guardWriteTimeout, attempt: attempt},
		open:   map[uint32]struct{}{},
	}, nil
}

// dismiss ends the connection of a guard that is to decide nothing more. To its policy an agent that is gone may be a reason to
// let messages pass, so the last that it hears is that its lease is over. It must not be in the table any more, or a new
// lease could follow.
func (g *guard) dismiss() {
	data, err := frame.Append(nil, 0, &frame.Lease{LeaseMS: 0})
	if err == nil {
		err = g.sender.send(data)
	}
	if err == nil {
		g.sender.finish(guardDismissTimeout)
	}
	g.sender.close()
}

// serveGuard runs one connection to its end.
func (a *Agent) serveGuard(conn *net.UnixConn) {
	defer conn.Close()
	g, err := newGuard(conn)
	if err != nil {
		a.log.Warn(eventGuardRefused, keyError, err)
		return
	}
	reader := &frameReader{conn: conn, buffer: make([]byte, readBytes)}
	if err := a.welcome(g, reader); err != nil {
		a.log.Warn(eventGuardRefused, keyInstance, g.identity.Instance, keyApp, g.identity.App, keyFunction, g.identity.Function, keyError, err)
		return
	}
	a.log.Info(eventGuardWelcome, keyInstance, g.identity.Instance, keyApp, g.identity.App, keyFunction, g.identity.Function)
	err = a.listen(g, reader)
	a.forget(g)
	if g.sender.reason() == nil && !errors.Is(err, io.EOF) {
		g.dismiss()
	}
	g.sender.close()
	if errors.Is(err, io.EOF) && !errors.Is(err, errHalfFrame) || errors.Is(err, net.ErrClosed) {
		a.log.Info(eventGuardClosed, keyInstance, g.identity.Instance)
		return
	}
	a.log.Warn(eventGuardClosed, keyInstance, g.identity.Instance, keyError, err)
}

// welcome reads the hello and answers it. After nil the guard belongs to its instance.
func (a *Agent) welcome(g *guard, reader *frameReader) error {
	if err := g.conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	id, m, err := reader.next()
	if err != nil {
		return fmt.Errorf("no hello: %w", err)
	}
	hello, ok := m.(*frame.Hello)
	if !ok {
		return fmt.Errorf("a frame of type %d in place of the hello", m.Type())
	}
	if frame.Negotiated(hello.Protos) == 0 {
		return fmt.Errorf("protocols %v, not %v", hello.Protos, frame.Protos())
	}
	g.protos = hello.Protos
	g.identity = frame.Identity{Instance: hello.Container, App: hello.App, Function: hello.Function}
	if reason := a.admitInTime(g, id); reason != "" {
		err := fmt.Errorf("refused: %s", reason)
		data, encodeErr := frame.Append(nil, id, &frame.Welcome{Reason: reason})
		if encodeErr != nil {
			return errors.Join(err, encodeErr)
		}
		if writeErr := g.conn.SetWriteDeadline(time.Now().Add(guardWriteTimeout)); writeErr != nil {
			return errors.Join(err, writeErr)
		}
		_, writeErr := g.conn.Write(data)
		return errors.Join(err, writeErr)
	}
	return g.conn.SetReadDeadline(time.Time{}) // from here on a guard speaks when its function does
}

// admitInTime admits the guard, or waits for what may pass by itself: for its registration, since on a cluster both follow
// from the same pod and either may come first, and for the end of the guard that the instance has, since a container that
// was started again may be faster than the last bytes of its last run. It returns the reason for a refusal, or "".
func (a *Agent) admitInTime(g *guard, id uint32) string {
	reason, news := a.admit(g, id)
	if news == nil || a.patience(reason) == 0 || !a.enterWaiting() {
		return reason
	}
	defer a.leaveWaiting()
	a.log.Info(eventGuardWaits, keyInstance, g.identity.Instance, keyApp, g.identity.App, keyFunction, g.identity.Function, keyReason, reason)
	begin := time.Now()
	for news != nil {
		left := time.NewTimer(a.patience(reason) - time.Since(begin))
		select {
		case <-news:
			reason, news = a.admit(g, id)
		case <-left.C:
			news = nil
		case <-a.stopping:
			news = nil
		}
		left.Stop()
	}
	return reason
}

// patience is how long a hello waits for what may pass by itself.
func (a *Agent) patience(reason string) time.Duration {
	if reason == reasonConnected {
		return guardEndWait
	}
	return time.Duration(a.config.AdmitWaitMS) * time.Millisecond
}

// reasonConnected is the reason of a welcome that says no because the instance has a guard. One instance is one sandbox: a
// second one under its name is somebody else.
const reasonConnected = "already_connected"

// enterWaiting says no when as many hellos wait as may.
func (a *Agent) enterWaiting() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting == waitingMax {
		return false
	}
	a.waiting++
	return true
}

func (a *Agent) leaveWaiting() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting--
}

// admit checks the guard's identity and sends the welcome, in one step with what makes it receive later policies and
// leases, so that none is missed in between. It returns the reason for a refusal, or "". Where the refusal may pass by
// itself, news is closed when it is worth to ask again.
func (a *Agent) admit(g *guard, id uint32) (reason string, news <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	// Under mu: a failure that comes later finds this guard in the table and drops it.
	if !a.verdicts.healthy() || !a.audit.healthy() {
		return string(policy.ReasonNoGuard), nil
	}
	registered := a.instances[g.identity.Instance]
	if registered == nil || !registered.acknowledged {
		return string(policy.ReasonUnregistered), a.admitted
	}
	if registered.identity() != g.identity {
		return string(policy.ReasonUnregistered), nil
	}
	if registered.guard != nil {
		return reasonConnected, a.admitted
	}
	held := a.policies[g.identity.App]
	if held == nil {
		return string(policy.ReasonPolicyMismatch), nil
	}
	function := held.policy.Functions[g.identity.Function]
	if function == nil {
		return string(policy.ReasonUnknownFunction), nil
	}
	welcome := &frame.Welcome{
		OK: true, Proto: frame.Negotiated(g.protos), Policy: held.envelope, LeaseMS: a.leaseLeft(), Names: a.names.of(held.hosts),
		Port: a.config.Incoming.Port, Sources: a.config.Incoming.Sources, HealthPath: a.config.Incoming.HealthPath,
		Roots: a.roots(function.Terminate),
	}
	var behind frame.Message
	data, err := frame.Append(nil, id, welcome)
	if err != nil {
		// The largest policy and the longest names do not fit one frame together.
		behind = &frame.Names{Names: welcome.Names}
		welcome.Names = map[string][]string{}
		if data, err = frame.Append(nil, id, welcome); err != nil {
			a.log.Error(eventGuardRefused, keyApp, g.identity.App, keyError, err)
			return string(policy.ReasonPolicyMismatch), nil
		}
	}
	registered.guard = g
	if err := g.sender.send(data); err == nil && behind != nil {
		a.push(g, behind)
	}
	return "", nil
}

// push tells a guard what it did not ask for. It needs no lock and does not block.
func (a *Agent) push(g *guard, m frame.Message) {
	data, err := frame.Append(nil, 0, m)
	if err == nil {
		err = g.sender.send(data)
	}
	if err != nil {
		// A guard that misses a policy or a lease must not go on with the old one.
		g.sender.close()
		a.log.Warn(eventGuardClosed, keyInstance, g.identity.Instance, keyError, err)
	}
}

// forget takes g from its instance.
func (a *Agent) forget(g *guard) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if registered := a.instances[g.identity.Instance]; registered != nil && registered.guard == g {
		registered.guard = nil
		a.tellWaiting()
		a.reports.soon()
	}
}

// tellWaiting wakes the hellos that wait. It needs mu.
func (a *Agent) tellWaiting() {
	close(a.admitted)
	a.admitted = make(chan struct{})
}

// listen serves a welcomed guard. The error says why it ended.
func (a *Agent) listen(g *guard, reader *frameReader) error {
	for {
		id, m, err := reader.next()
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *frame.Start:
			err = a.question(g, id, m, &m.Identity)
		case *frame.Invoke:
			err = a.question(g, id, m, &m.Identity)
		case *frame.Finish:
			err = a.question(g, id, m, &m.Identity)
		case *frame.End:
			err = a.ended(g, m)
		case *frame.Mode:
			err = a.mode(g, m)
		case *frame.Verdict:
			err = a.verdict(g, &m.Record)
		case *frame.Times:
			a.timings.add(&g.identity, m)
		default:
			err = fmt.Errorf("a frame of type %d, which a guard does not send", m.Type())
		}
		if err != nil {
			return err
		}
	}
}

var errSpoken = errors.New("a guard says who it is outside its hello")

// question passes a question on with the identity of the registration, or answers no at once. An error is the guard's
// mistake.
func (a *Agent) question(g *guard, id uint32, m frame.Message, identity *frame.Identity) error {
	if *identity != (frame.Identity{}) {
		return errSpoken
	}
	*identity = g.identity
	g.mu.Lock()
	_, twice := g.open[id]
	full := len(g.open) >= guardQuestionsMax
	if !twice && !full {
		g.open[id] = struct{}{}
	}
	g.mu.Unlock()
	if twice {
		return fmt.Errorf("a second question with the id %d of an open one", id)
	}
	if full {
		// Not the controller's fault, so not a reason that a policy may forgive.
		return g.answer(id, denial(policy.ReasonHeldTooLong, fmt.Sprintf("%d questions of this instance are open", guardQuestionsMax)))
	}
	since := time.Now()
	reply := func(answer *frame.Answer) {
		a.metrics.answered(m, time.Since(since))
		g.mu.Lock()
		delete(g.open, id)
		g.mu.Unlock()
		if answer == nil {
			answer = denial(policy.ReasonControllerUnavailable, "no connection to a controller")
		}
		err := g.answer(id, answer)
		if err == nil {
			return
		}
		if !errors.Is(err, errClosed) {
			a.log.Warn(eventGuardClosed, keyInstance, g.identity.Instance, keyError, err)
		}
		if _, start := m.(*frame.Start); start && answer.Allowed {
			// The sandbox went while it asked: what was begun for it is over, and nobody else knows.
			a.link.ended(&frame.End{Call: answer.Call, Invocation: answer.Invocation, Outcome: "closed", Identity: g.identity})
		}
	}
	switch refused := a.link.ask(&question{m: m, max: stepQuestionsMax, again: true, done: reply}); refused {
	case "":
	case policy.ReasonControllerUnavailable:
		reply(nil)
	default:
		reply(denial(refused, "the agent cannot ask it"))
	}
	return nil
}

func denial(reason policy.Reason, detail string) *frame.Answer {
	return &frame.Answer{Reason: string(reason), Detail: detail}
}

func (g *guard) answer(id uint32, answer *frame.Answer) error {
	data, err := frame.Append(nil, id, answer)
	if err != nil {
		g.sender.close()
		return err
	}
	return g.sender.send(data)
}

// ended passes the end of an invocation on, now or to the next controller.
func (a *Agent) ended(g *guard, m *frame.End) error {
	if m.Identity != (frame.Identity{}) {
		return errSpoken
	}
	m.Identity = g.identity
	a.link.ended(m)
	return nil
}

// modes are those that a guard can be in.
var modes = []string{policy.ModeOff.String(), policy.ModeLearn.String(), policy.ModeAudit.String(), policy.ModeEnforce.String()}

// mode keeps what is in force in the sandbox, by its own word.
func (a *Agent) mode(g *guard, m *frame.Mode) error {
	if !slices.Contains(modes, m.Mode) || m.Version < 0 {
		return fmt.Errorf("mode %q by version %d, which a guard cannot be in", m.Mode, m.Version)
	}
	a.mu.Lock()
	changed := g.mode != m.Mode || g.version != m.Version
	g.mode, g.version = m.Mode, m.Version
	a.mu.Unlock()
	if changed {
		a.modeChanged(&g.identity, m)
	}
	a.reports.soon()
	return nil
}
