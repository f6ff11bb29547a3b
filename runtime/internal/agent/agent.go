package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kalium.dev/kalium/runtime/internal/audit"
	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// Agent is the daemon of a node.
type Agent struct {
	config   *Config
	key      ed25519.PublicKey
	log      *slog.Logger
	versions *versions
	verdicts *verdictLog
	audit    auditing
	denials  *denials
	timings  *timingLog
	names    *names
	link     *link
	counts   *counts
	reports  *reports
	metrics  *metrics

	// mu guards the tables. Nothing under it waits: guards are written to without blocking, the controller never.
	mu        sync.Mutex
	policies  map[string]*held     // guarded by mu; app -> the last good policy
	instances map[string]*instance // guarded by mu; container -> registration
	leaseEnd  time.Time            // guarded by mu
	waiting   int                  // guarded by mu; hellos that wait for their registration
	admitted  chan struct{}        // guarded by mu; closed, and replaced, when a hello that waits may be asked again

	verdictsOut outage // of the goroutine that writes the verdict log
	stopping    <-chan struct{}
}

// held is a policy in force.
type held struct {
	envelope []byte
	policy   *policy.Policy
	hosts    []string
}

// Serve runs the agent until ctx ends; then it flushes, closes everything and returns nil. Its own log goes to log.
// reopen asks for the verdict log to be opened again. An error says why the agent could not start.
func Serve(ctx context.Context, config *Config, log io.Writer, reopen <-chan os.Signal) error {
	return run(ctx, config, newLogger(log), reopen, systemLookup)
}

func run(ctx context.Context, config *Config, log *slog.Logger, reopen <-chan os.Signal, resolve lookup) (err error) {
	counted := &metrics{}
	log = slog.New(countingHandler{log.Handler(), counted})
	a := &Agent{
		config: config, log: log, metrics: counted, counts: newCounts(), denials: newDenials(), policies: map[string]*held{}, instances: map[string]*instance{},
		admitted: make(chan struct{}), stopping: ctx.Done(),
	}
	if err := config.checkRoots(); err != nil {
		return err
	}
	if a.key, err = loadOperatorKey(config.OperatorKey); err != nil {
		return err
	}
	if a.versions, err = openVersions(config.StateDir); err != nil {
		return err
	}
	runID := newRun()
	a.link = newLink(config, runID, a, counted, log)
	a.reports = newReports(a.sendReport)
	a.names = newNames(config.Names, resolve, log, a.namesChanged)
	if err := a.openAudit(runID); err != nil {
		return err
	}
	// Whatever ends this function, verdicts that were taken are written first.
	defer func() { err = errors.Join(err, a.audit.close()) }()
	a.verdicts, err = openVerdictLog(config.VerdictLog, config.Node, runID, a.verdictsFailed, a.verdictsWell)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.verdicts.close()) }()
	a.timings = openTimingLog(config.TimingLog, config.Node, func(err error) { log.Warn(eventTimingsFailed, keyError, err) })
	defer a.timings.close()
	guards, err := listen(config.GuardSocket)
	if err != nil {
		return err
	}
	registrations, err := listen(config.RegisterSocket)
	if err != nil {
		return errors.Join(err, guards.Close(), os.Remove(config.GuardSocket))
	}
	var monitored net.Listener
	if config.Metrics != nil {
		if monitored, err = listenMonitor(config.Metrics.Listen); err != nil {
			return errors.Join(err, guards.Close(), registrations.Close(), os.Remove(config.GuardSocket), os.Remove(config.RegisterSocket))
		}
	}
	// The link outlives the guards: their last words go over it.
	linked, unlink := context.WithCancel(context.WithoutCancel(ctx))
	defer unlink()
	var parts, linking sync.WaitGroup
	linking.Go(func() { a.link.run(linked) })
	parts.Go(func() { a.accept(ctx, config.GuardSocket, guards, guardsMax, a.serveGuard) })
	parts.Go(func() { a.accept(ctx, config.RegisterSocket, registrations, registerConnsMax, a.serveRegister) })
	parts.Go(func() { a.names.run(ctx) })
	parts.Go(func() { a.reports.run(ctx) })
	parts.Go(func() { a.reopenVerdicts(ctx, reopen) })
	parts.Go(func() { a.tellSuppressed(ctx) })
	if monitored != nil {
		parts.Go(func() { a.monitor(ctx, monitored) })
	}
	parts.Go(func() { a.notifySystem(ctx) })
	log.Info(eventStarted, keyNode, config.Node)
	parts.Wait()
	a.suppressed()
	a.leave()
	unlink()
	linking.Wait()
	log.Info(eventStopped, keyNode, config.Node)
	return errors.Join(os.Remove(config.GuardSocket), os.Remove(config.RegisterSocket))
}

// newRun names this start of the agent, so that a controller can tell a second agent of the same name from the same one.
func newRun() string {
	var raw [frame.StepBytes / 2]byte
	rand.Read(raw[:]) // never fails, see its documentation
	return hex.EncodeToString(raw[:])
}

// listen makes a socket that only its owner can use. One that is left over from a run that was killed is replaced; one
// that answers belongs to an agent that runs.
func listen(path string) (*net.UnixListener, error) {
	refuse := func(err error) error {
		return environment("agent.socket", "cannot listen on "+path, "stop the other agent, or create the socket's folder", "%v", err)
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, refuse(errors.New("something that is not a socket is there"))
		}
		if conn, err := net.DialTimeout("unix", path, statusTimeout); err == nil {
			return nil, errors.Join(refuse(errors.New("another agent answers there")), conn.Close())
		}
		if err := os.Remove(path); err != nil {
			return nil, refuse(err)
		}
	}
	// Nobody may connect between bind and chmod, so the socket is made under another name.
	temporary := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.RemoveAll(temporary); err != nil {
		return nil, refuse(err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, refuse(err)
	}
	listener.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(temporary, 0o600), os.Rename(temporary, path)); err != nil {
		return nil, errors.Join(refuse(err), listener.Close())
	}
	return listener, nil
}

// accept serves each connection of root's processes on a goroutine of its own, at most max at once, and returns after
// ctx has ended and all of them too. What a peer had sent by then is still read: it may hold verdicts.
func (a *Agent) accept(ctx context.Context, path string, listener *net.UnixListener, max int, serve func(*net.UnixConn)) {
	var mu sync.Mutex
	open := map[*net.UnixConn]struct{}{} // guarded by mu
	stop := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		_ = listener.Close() // nothing to do about a failure at the end
		for conn := range open {
			_ = conn.CloseRead()
		}
	})
	defer stop()
	var served sync.WaitGroup
	defer served.Wait()
	for {
		conn, err := listener.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return
		}
		if err != nil {
			// Out of descriptors, most likely: what is open ends sooner or later.
			a.log.Error(eventConnectionRefused, keySocket, path, keyError, err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
			continue
		}
		mu.Lock()
		err = a.acceptable(conn, len(open), max)
		if err == nil && ctx.Err() != nil {
			err = ctx.Err()
		}
		if err == nil {
			open[conn] = struct{}{}
		}
		mu.Unlock()
		if err != nil {
			_ = conn.Close()
			a.log.Warn(eventConnectionRefused, keySocket, path, keyError, err)
			continue
		}
		served.Go(func() {
			serve(conn)
			mu.Lock()
			delete(open, conn)
			mu.Unlock()
		})
	}
}

// acceptable checks who has connected: SO_PEERCRED is what the kernel recorded at connect.
func (a *Agent) acceptable(conn *net.UnixConn, open, max int) error {
	if open >= max {
		return fmt.Errorf("%d connections are open", max)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var credentials *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) {
		credentials, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if peerErr != nil {
		return peerErr
	}
	if credentials.Uid != a.config.peerUID {
		return fmt.Errorf("the peer's uid is %d, not %d", credentials.Uid, a.config.peerUID)
	}
	return nil
}

func (a *Agent) reopenVerdicts(ctx context.Context, reopen <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-reopen:
			a.timings.reopenFile()
			if err := a.verdicts.reopenFile(); err != nil {
				a.log.Error(eventVerdictsReopened, keyError, err)
				continue
			}
			a.log.Info(eventVerdictsReopened)
		}
	}
}

// verdictsFailed makes every guard deny: a verdict that nobody can read later must not have been acted on.
func (a *Agent) verdictsFailed(err error) {
	a.log.Error(eventVerdictsFailed, keyError, err)
	a.verdictsOut = outage{time.Now(), err, a.closeGuards()}
}

// verdictsWell puts on record that there was a time without a verdict log.
func (a *Agent) verdictsWell() {
	a.log.Warn(eventVerdictsWell)
	a.record(audit.EventOutage, a.verdictsOut.entry("verdict_log", 0))
}

// closeGuards ends the connection of every guard and returns how many there were.
func (a *Agent) closeGuards() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	dropped := 0
	for _, i := range a.instances {
		if a.dismiss(i) {
			dropped++
		}
	}
	if dropped > 0 {
		a.tellWaiting()
		a.reports.soon()
	}
	a.log.Error(eventGuardsDropped, keyCount, dropped)
	return dropped
}

// guards calls each for every connected guard whose app is app, or for all when app is "". It needs mu.
func (a *Agent) guards(app string, each func(*guard)) {
	for _, i := range a.instances {
		if i.guard != nil && (app == "" || i.app == app) {
			each(i.guard)
		}
	}
}

// welcomed implements linkHooks.
func (a *Agent) welcomed(c *linkConn, welcome *frame.ControllerWelcome) {
	for app, envelope := range welcome.Policies {
		a.policyArrived(app, envelope)
	}
	a.leaseArrived(welcome.LeaseMS)
	// The controller has to know the instances before it hears a question of one: frames of a connection keep their
	// order.
	for _, i := range a.acknowledged() {
		answered := func(answer *frame.Answer) {
			if answer != nil && !answer.Allowed {
				// Its questions are denied from here on; the next connection tries again.
				a.log.Warn(eventInstanceRefused, keyInstance, i.container, keyApp, i.app, keyFunction, i.function, keyReason, answer.Reason)
			}
		}
		if refused, _ := c.ask(&question{m: i.frame(), max: questionsMax, done: answered}); refused != "" {
			a.log.Warn(eventInstanceRefused, keyInstance, i.container, keyReason, refused)
		}
		c.registered = append(c.registered, i)
	}
}

// opened implements linkHooks. What was unregistered while welcomed ran could not be told then.
func (a *Agent) opened(c *linkConn) {
	a.mu.Lock()
	var gone []string
	for _, i := range c.registered {
		if a.instances[i.container] == nil {
			gone = append(gone, i.container)
		}
	}
	a.mu.Unlock()
	c.registered = nil
	for _, container := range gone {
		a.tellGone(container)
	}
	a.sendReport()
}

// leave tells the controller that the instances are gone. A sandbox cannot connect to the next agent, so whatever it asked
// would be denied, and nobody should wait for an invocation of it.
func (a *Agent) leave() {
	a.sendReport() // what was counted and put on record up to the end
	for _, i := range a.acknowledged() {
		a.tellGone(i.container)
	}
}

func (a *Agent) acknowledged() []*instance {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []*instance
	for _, i := range a.instances {
		if i.acknowledged {
			all = append(all, i)
		}
	}
	return all
}

// policyArrived implements linkHooks: a policy comes into force when its signature holds and its version has not been
// passed. Otherwise the last good one stays.
func (a *Agent) policyArrived(app string, envelope []byte) {
	refuse := func(err error) { a.policyRefused(app, envelope, err) }
	p, err := policy.Verify(envelope, a.key)
	if err != nil {
		refuse(err)
		return
	}
	if p.App != app {
		refuse(fmt.Errorf("it is the policy of app %s", p.App))
		return
	}
	if err := a.versions.raise(p); err != nil {
		refuse(err)
		return
	}
	a.mu.Lock()
	before := a.policies[app]
	if before != nil && before.policy.Version == p.Version {
		a.mu.Unlock()
		return // the same one again, after a reconnect
	}
	now := &held{envelope: envelope, policy: p, hosts: hostsOf(p)}
	a.policies[app] = now
	var hosts []string
	for _, each := range a.policies {
		hosts = append(hosts, each.hosts...)
	}
	a.names.want(hosts)
	addresses := a.names.of(now.hosts)
	a.guards(app, func(g *guard) {
		// The names first: a guard must not have a policy whose peers it cannot find.
		a.push(g, &frame.Names{Names: addresses})
		a.push(g, &frame.Policy{App: app, Policy: envelope})
	})
	a.mu.Unlock()
	a.log.Info(eventPolicyAccepted, keyApp, app, keyVersion, p.Version)
	a.policyChanged(p, envelope)
}

// leaseArrived implements linkHooks. The controller may grant less than the configuration, never more.
func (a *Agent) leaseArrived(leaseMS int) {
	leaseMS = min(leaseMS, a.config.LeaseMS)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.leaseEnd = time.Now().Add(time.Duration(leaseMS) * time.Millisecond)
	a.guards("", func(g *guard) { a.push(g, &frame.Lease{LeaseMS: leaseMS}) })
}

// leaseLeft is what a new guard gets of the lease that runs. It needs mu.
func (a *Agent) leaseLeft() int {
	return int(max(0, time.Until(a.leaseEnd).Milliseconds()))
}

// namesChanged tells every guard the addresses of its policy's hosts.
func (a *Agent) namesChanged() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for app, held := range a.policies {
		addresses := a.names.of(held.hosts)
		a.guards(app, func(g *guard) { a.push(g, &frame.Names{Names: addresses}) })
	}
}
