package agent

import (
	"io"
	"log/slog"

	"kalium.dev/kalium/runtime/internal/policy"
)

// Events of the daemon's own log, which is for people. Never payloads, keys or tokens.
const (
	eventStarted           = "agent.started"
	eventStopped           = "agent.stopped"
	eventControllerUp      = "controller.connected"
	eventControllerLost    = "controller.lost"
	eventControllerAway    = "controller.unreachable"
	eventDuplicateAgent    = "controller.duplicate_agent"
	eventRedialled         = "controller.redialled"
	eventRedialFailed      = "controller.redial_failed"
	eventPolicyAccepted    = "policy.accepted"
	eventPolicyRefused     = "policy.refused"
	eventRoots             = "guard.roots_unreadable"
	eventGuardWaits        = "guard.waits"
	eventGuardWelcome      = "guard.welcomed"
	eventGuardRefused      = "guard.refused"
	eventGuardClosed       = "guard.closed"
	eventGuardsDropped     = "guard.all_dropped"
	eventInstanceAdded     = "instance.registered"
	eventInstanceRefused   = "instance.refused"
	eventInstanceGone      = "instance.unregistered"
	eventRegisterClosed    = "register.closed"
	eventConnectionRefused = "connection.refused"
	eventVerdictsFailed    = "verdicts.failed"
	eventVerdictsWell      = "verdicts.written_again"
	eventVerdictsReopened  = "verdicts.reopened"
	eventAuditOff          = "audit.off"
	eventAuditFailed       = "audit.failed"
	eventAuditWell         = "audit.written_again"
	eventTimingsFailed     = "timings.failed"
	eventNameFailed        = "name.failed"
	eventEndDropped        = "end.dropped"
	eventMonitorFailed     = "metrics.failed"
	eventMonitorListens    = "metrics.listening"
	eventReportDropped     = "report.dropped"
	eventSystemUntold      = "system.untold"
)

// loggedEvents are all of them: each is counted, and its series begins with 0.
var loggedEvents = [...]string{
	eventStarted, eventStopped, eventControllerUp, eventControllerLost,
	eventControllerAway, eventPolicyAccepted, eventPolicyRefused, eventRoots,
	eventGuardWaits, eventGuardWelcome, eventGuardRefused, eventGuardClosed,
	eventGuardsDropped, eventInstanceAdded, eventInstanceRefused, eventInstanceGone,
	eventRegisterClosed, eventConnectionRefused, eventVerdictsFailed, eventVerdictsWell,
	eventVerdictsReopened, eventTimingsFailed, eventNameFailed, eventEndDropped,
	eventMonitorFailed, eventMonitorListens, eventReportDropped, eventSystemUntold,
	eventDuplicateAgent, eventRedialled, eventRedialFailed,
	eventAuditOff, eventAuditFailed, eventAuditWell,
}

// Keys of its fields.
const (
	keyEvent    = "event"
	keyNode     = "node"
	keyInstance = "instance"
	keyApp      = "app"
	keyFunction = "function"
	keyVersion  = "version"
	keyReason   = "reason"
	keyError    = "error"
	keyAddress  = "address"
	keyName     = "name"
	keyHost     = "host"
	keySocket   = "socket"
	keyCount    = "count"
)

// newLogger writes one line an event: time, level, event and fields.
func newLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.MessageKey {
				a.Key = keyEvent
			}
			if err, ok := a.Value.Any().(error); ok {
				a.Value = slog.StringValue(policy.Printable(err.Error(), 2*logTextMax))
			}
			return a
		},
	}))
}
