package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// Bounds of the listener for metrics.
const (
	monitorConnsMax  = 16
	monitorHeadBytes = 8 * 1024
	monitorTimeout   = 5 * time.Second // of a request, and of its answer
)

const (
	metricPrefix = "kalium_agent_"
	labelOther   = "other"
	modeNone     = "none" // of an instance without a guard
)

// metrics is what the agent has counted since its start. Labels come from closed sets: reasons, modes and events from
// this program, apps and functions from policies in force. The zero value is ready.
type metrics struct {
	mu         sync.Mutex
	verdicts   map[verdictKey]uint64 // guarded by mu
	wouldDeny  map[appKey]uint64     // guarded by mu; by app and reason
	failModes  map[appKey]uint64     // guarded by mu; by app and fail mode
	suppressed map[string]uint64     // guarded by mu; by reason
	events     map[string]uint64     // guarded by mu; lines of the daemon's own log

	start, invoke spans // how long guards waited for the controller
	parked        atomic.Int64
	repeated      atomic.Uint64
	failOvers     atomic.Uint64
}

type verdictKey struct{ app, mode, reason string }

type appKey struct{ app, value string }

// verdict counts one line of the verdict log. What a guard says is checked against the sets that labels come from.
func (m *metrics) verdict(app string, r *frame.VerdictRecord) {
	reason := r.Reason
	if !policy.Reason(reason).Known() {
		reason = labelOther
	}
	mode := modeLabel(r.Mode)
	m.mu.Lock()
	defer m.mu.Unlock()
	count(&m.verdicts, verdictKey{app, mode, reason}, 1)
	if r.WouldDeny {
		count(&m.wouldDeny, appKey{app, reason}, 1)
	}
	if slices.Contains(failModes[:], r.FailMode) {
		count(&m.failModes, appKey{app, r.FailMode}, 1)
	}
}

var failModes = [...]string{"deny", "allow", "last_known"}

// modeLabel is text when it names a mode, and otherwise modeNone.
func modeLabel(text string) string {
	for _, mode := range [...]policy.Mode{policy.ModeOff, policy.ModeLearn, policy.ModeAudit, policy.ModeEnforce} {
		if mode.String() == text {
			return text
		}
	}
	return modeNone
}

func count[K comparable](table *map[K]uint64, key K, more uint64) {
	if *table == nil {
		*table = map[K]uint64{}
	}
	(*table)[key] += more
}

// suppress counts denials that stand without a line of their own.
func (m *metrics) suppress(reason string, more int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	count(&m.suppressed, reason, uint64(more))
}

// answered says how long a guard waited for the answer to its question.
func (m *metrics) answered(question frame.Message, span time.Duration) {
	switch question.(type) {
	case *frame.Start:
		m.start.add(span)
	case *frame.Invoke:
		m.invoke.add(span)
	}
}

// countingHandler counts the lines of the daemon's log by event: a line and its counter cannot differ.
type countingHandler struct {
	slog.Handler
	metrics *metrics
}

// Handle implements slog.Handler.
func (h countingHandler) Handle(ctx context.Context, record slog.Record) error {
	h.metrics.mu.Lock()
	count(&h.metrics.events, record.Message, 1)
	h.metrics.mu.Unlock()
	return h.Handler.Handle(ctx, record)
}

// instanceKey is one series of the instances there are.
type instanceKey struct{ app, function, asked, mode string }

// scene is what is there at one moment, and what /readyz looks at.
type scene struct {
	connected  bool
	policies   map[string]int // app -> version
	instances  map[instanceKey]int
	leaseLeft  time.Duration
	guards     int
	notAfter   time.Time // when the first certificate of the connection ends; zero: there is none
	verdictsOK bool
	auditOK    bool
	auditSeq   int
}

// write writes everything, sorted, so that two scrapes of one state are the same bytes.
func (m *metrics) write(e *exposition, now *scene) {
	m.mu.Lock()
	verdicts, wouldDeny, failed := maps.Clone(m.verdicts), maps.Clone(m.wouldDeny), maps.Clone(m.failModes)
	suppressed, events := maps.Clone(m.suppressed), maps.Clone(m.events)
	m.mu.Unlock()
	// A series begins with 0, or the first denial of an app would be no increase.
	for key := range now.instances {
		for _, reason := range policy.Reasons() {
			count(&verdicts, verdictKey{key.app, key.asked, string(reason)}, 0)
			count(&suppressed, string(reason), 0)
		}
		for _, mode := range failModes {
			count(&failed, appKey{key.app, mode}, 0)
		}
	}
	for _, event := range loggedEvents {
		count(&events, event, 0)
	}

	name := metricPrefix + "verdicts_total"
	e.family(name, counter, "Verdicts of guards; those with a reason other than allowed deny, or would have.")
	for _, key := range slices.SortedFunc(maps.Keys(verdicts), func(a, b verdictKey) int {
		return cmp.Or(cmp.Compare(a.app, b.app), cmp.Compare(a.mode, b.mode), cmp.Compare(a.reason, b.reason))
	}) {
		e.sample(name, float64(verdicts[key]), label{"app", key.app}, label{"mode", key.mode}, label{"reason", key.reason})
	}
	byApp(e, "would_deny_total", "Messages that passed and that enforce would have refused.", "reason", wouldDeny)
	byApp(e, "fail_mode_verdicts_total", "Verdicts about app edges that were made without a controller.", "fail_mode", failed)
	byValue(e, "suppressed_denials_total", "Denials beyond the rate bound, which have no line of their own.", "reason", suppressed)
	byValue(e, "events_total", "Lines of the agent's own log.", "event", events)

	name = metricPrefix + "question_seconds"
	e.family(name, histogram, "How long guards waited for the controller.")
	e.histogram(name, &m.start, label{"question", "start"})
	e.histogram(name, &m.invoke, label{"question", "invoke"})
	e.single(metricPrefix+"questions_parked", gauge, "Questions that wait for another controller.", float64(m.parked.Load()))
	e.single(metricPrefix+"questions_repeated_total", counter, "Questions that were asked again of another controller.", float64(m.repeated.Load()))
	e.single(metricPrefix+"fail_overs_total", counter, "Connections that another controller took over.", float64(m.failOvers.Load()))
	now.write(e)
}

func (s *scene) write(e *exposition) {
	e.single(metricPrefix+"controller_connected", gauge, "Whether a controller is connected.", truth(s.connected))
	e.single(metricPrefix+"lease_seconds", gauge, "How long guards may decide before they need the controller again.", s.leaseLeft.Seconds())
	e.single(metricPrefix+"guards", gauge, "Guards that are connected.", float64(s.guards))
	if !s.notAfter.IsZero() {
		e.single(metricPrefix+"certificate_not_after_seconds", gauge, "When the first certificate of the connection ends, since 1970.", float64(s.notAfter.Unix()))
	}
	name := metricPrefix + "log_writable"
	e.family(name, gauge, "Whether the log can be written; while one cannot, every guard is closed.")
	e.sample(name, truth(s.auditOK), label{"log", "audit"})
	e.sample(name, truth(s.verdictsOK), label{"log", "verdicts"})
	e.single(metricPrefix+"audit_seq", gauge, "Number of the last entry of the audit log.", float64(s.auditSeq))
	name = metricPrefix + "policy_version"
	e.family(name, gauge, "Version of each app's policy in force.")
	for _, app := range slices.Sorted(maps.Keys(s.policies)) {
		e.sample(name, float64(s.policies[app]), label{"app", app})
	}
	name = metricPrefix + "instances"
	e.family(name, gauge, "Instances by the mode that the policy asks for and the one in force.")
	for _, key := range slices.SortedFunc(maps.Keys(s.instances), func(a, b instanceKey) int {
		return cmp.Or(cmp.Compare(a.app, b.app), cmp.Compare(a.function, b.function), cmp.Compare(a.asked, b.asked), cmp.Compare(a.mode, b.mode))
	}) {
		e.sample(name, float64(s.instances[key]), label{"app", key.app}, label{"function", key.function}, label{"asked", key.asked}, label{"mode", key.mode})
	}
	name = metricPrefix + "build_info"
	e.family(name, gauge, "What runs.")
	e.sample(name, 1, label{"version", Version()}, label{"go", runtime.Version()})
}

// Version is the commit that the program was built from, as far as the build knows it.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	revision, modified := info.Main.Version, ""
	for _, setting := range info.Settings {
		switch {
		case setting.Key == "vcs.revision":
			revision = setting.Value
		case setting.Key == "vcs.modified" && setting.Value == "true":
			modified = " modified"
		}
	}
	return revision + modified
}

func truth(claim bool) float64 {
	if claim {
		return 1
	}
	return 0
}

func byApp(e *exposition, name, help, second string, table map[appKey]uint64) {
	name = metricPrefix + name
	e.family(name, counter, help)
	for _, key := range slices.SortedFunc(maps.Keys(table), func(a, b appKey) int {
		return cmp.Or(cmp.Compare(a.app, b.app), cmp.Compare(a.value, b.value))
	}) {
		e.sample(name, float64(table[key]), label{"app", key.app}, label{second, key.value})
	}
}

func byValue(e *exposition, name, help, only string, table map[string]uint64) {
	name = metricPrefix + name
	e.family(name, counter, help)
	for _, value := range slices.Sorted(maps.Keys(table)) {
		e.sample(name, float64(table[value]), label{only, value})
	}
}

// wrong says by name what keeps the agent from serving, "" for what does not.
func (s *scene) wrong() map[string]string {
	checks := map[string]string{"controller": "", "policies": "", "verdicts": "", "audit": ""}
	if !s.connected {
		checks["controller"] = "no connection to a controller"
	}
	if len(s.policies) == 0 {
		checks["policies"] = "no policy is in force"
	}
	if !s.verdictsOK {
		checks["verdicts"] = "the verdict log cannot be written"
	}
	if !s.auditOK {
		checks["audit"] = "the audit log cannot be written"
	}
	return checks
}

// readiness is the answer to /readyz.
func (s *scene) readiness() (int, []byte) {
	checks, ready := s.wrong(), true
	for name, wrong := range checks {
		if wrong == "" {
			checks[name] = "ok"
		} else {
			ready = false
		}
	}
	body, err := json.Marshal(map[string]any{"ready": ready, "checks": checks})
	if err != nil {
		return http.StatusInternalServerError, nil // cannot happen: it is a map of texts
	}
	if !ready {
		return http.StatusServiceUnavailable, append(body, '\n')
	}
	return http.StatusOK, append(body, '\n')
}

// scene looks at everything once.
func (a *Agent) scene() *scene {
	c := a.link.current()
	s := &scene{
		connected: c != nil, verdictsOK: a.verdicts.healthy(), auditOK: a.audit.healthy(),
		policies: map[string]int{}, instances: map[instanceKey]int{},
	}
	s.auditSeq, _ = a.audit.head()
	if c != nil {
		s.notAfter = c.expires
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s.leaseLeft = max(0, time.Until(a.leaseEnd))
	for app, held := range a.policies {
		s.policies[app] = held.policy.Version
	}
	for _, i := range a.instances {
		key := instanceKey{i.app, i.function, labelOther, modeNone}
		key.mode, _ = i.effective()
		if held := a.policies[i.app]; held != nil && held.policy.Functions[i.function] != nil {
			key.asked = held.policy.ModeOf(i.function).String()
		} else {
			key.app, key.function = labelOther, labelOther
		}
		if i.guard != nil {
			s.guards++
		}
		s.instances[key]++
	}
	return s
}

// monitor serves /metrics, /healthz and /readyz until ctx ends.
func (a *Agent) monitor(ctx context.Context, listener net.Listener) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		var text exposition
		a.metrics.write(&text, a.scene())
		reply(w, http.StatusOK, expositionType, text.Bytes())
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, "text/plain; charset=utf-8", []byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		status, body := a.scene().readiness()
		reply(w, status, "application/json", body)
	})
	server := &http.Server{
		Handler: mux, ReadTimeout: monitorTimeout, WriteTimeout: monitorTimeout, MaxHeaderBytes: monitorHeadBytes,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // a peer that breaks off is not worth a line
	}
	server.SetKeepAlivesEnabled(false)
	a.log.Info(eventMonitorListens, keyAddress, listener.Addr())
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(&boundedListener{Listener: listener, free: make(chan struct{}, monitorConnsMax)}); ctx.Err() == nil {
		a.log.Error(eventMonitorFailed, keyError, err)
	}
}

func reply(w http.ResponseWriter, status int, kind string, body []byte) {
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(status)
	_, _ = w.Write(body) // a peer that is gone needs no answer
}

// listenMonitor makes the socket that monitor serves.
func listenMonitor(address string) (net.Listener, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, environment("agent.metrics", "cannot listen on "+address+" for metrics", "change metrics.listen in the configuration", "%v", err)
	}
	return listener, nil
}

// boundedListener closes a connection at once when as many are open as may be.
type boundedListener struct {
	net.Listener
	free chan struct{} // as long as its capacity are the connections that are open
}

// Accept implements net.Listener.
func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.free <- struct{}{}:
			return &boundedConn{Conn: conn, release: sync.OnceFunc(func() { <-l.free })}, nil
		default:
			_ = conn.Close()
		}
	}
}

type boundedConn struct {
	net.Conn
	release func()
}

// Close implements net.Conn.
func (c *boundedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
