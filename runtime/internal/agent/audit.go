package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"kalium.dev/kalium/runtime/internal/audit"
	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// auditing puts on record what the agent has to answer for. Without an audit log it does nothing and is always well.
type auditing struct {
	log *audit.Log // nil: there is none
}

// auditVerdict is an entry of a verdict that denies, would deny, or was made under a fail mode.
type auditVerdict struct {
	ID       string `json:"id"`
	Node     string `json:"node"`
	Instance string `json:"instance"`
	App      string `json:"app"`
	Function string `json:"function"`
	verdictFields
}

type auditPolicy struct {
	What    string `json:"what"` // loaded or refused
	App     string `json:"app"`
	Version int    `json:"version"` // 0: not known
	SHA256  string `json:"sha256"`  // of the signed envelope
	Detail  string `json:"detail"`
}

type auditMode struct {
	Instance string `json:"instance"`
	App      string `json:"app"`
	Function string `json:"function"`
	Mode     string `json:"mode"`
	Version  int    `json:"version"`
}

type auditSuppressed struct {
	Instance string         `json:"instance"`
	App      string         `json:"app"`
	Function string         `json:"function"`
	Counts   map[string]int `json:"counts"`
}

type auditOutage struct {
	What    string `json:"what"` // the log that could not be written
	Error   string `json:"error"`
	SinceMS int64  `json:"since_ms"`
	Guards  int    `json:"guards"` // that were closed for it
	Lost    int    `json:"lost"`   // entries
}

// outage is a log that cannot be written.
type outage struct {
	since  time.Time
	err    error
	guards int
}

func (o *outage) entry(what string, lost int) *auditOutage {
	return &auditOutage{
		What: what, Error: policy.Printable(fmt.Sprint(o.err), logTextMax), SinceMS: o.since.UnixMilli(), Guards: o.guards, Lost: lost,
	}
}

var errSlowDisk = errors.New("the disk was slower than the entries")

// openAudit continues the audit log, if there is to be one.
func (a *Agent) openAudit(run string) error {
	c := a.config.Audit
	if c == nil {
		a.log.Warn(eventAuditOff)
		return nil
	}
	key, err := audit.LoadKey(c.Key)
	if err != nil {
		return environment("agent.audit_key", "cannot read the audit key "+c.Key, "make it by `kalium pki audit-key`", "%v", err)
	}
	opened := make(chan struct{}) // the log may heal before Open has returned it
	var current outage
	log, err := audit.Open(audit.Options{
		Path: c.Log, Key: key, Writer: "agent", Name: a.config.Node, Run: run, Fsync: c.Fsync, BytesMax: int64(c.MaxMiB) << 20,
		OnFailed: func(err error) {
			a.log.Error(eventAuditFailed, keyError, err)
			current = outage{time.Now(), err, a.closeGuards()}
		},
		OnWell: func(lost int) {
			<-opened
			if current.err == nil {
				current = outage{since: time.Now(), err: errSlowDisk}
			}
			a.log.Warn(eventAuditWell, keyCount, lost)
			a.record(audit.EventOutage, current.entry("audit_log", lost))
			current = outage{}
		},
	})
	if err != nil {
		return environment("agent.audit_log", "cannot continue the audit log "+c.Log,
			"see what happened to it: `kalium audit verify "+c.Log+"* --key PUB`; then move those files away, and a new log begins", "%v", err)
	}
	a.audit.log = log
	close(opened)
	return nil
}

// healthy tells whether what is put on record gets onto the disk.
func (a *auditing) healthy() bool { return a.log == nil || a.log.Healthy() }

// head is the last entry that is on the disk for good; 0 without an audit log.
func (a *auditing) head() (seq int, hash string) {
	if a.log == nil {
		return 0, ""
	}
	place := a.log.Durable()
	return int(place.Seq), place.Hash
}

func (a *auditing) close() error {
	if a.log == nil {
		return nil
	}
	return a.log.Close()
}

func (a *auditing) add(event string, entry any) error {
	if a.log == nil {
		return nil
	}
	return a.log.Add(event, entry)
}

// record adds an entry that nothing waits for. One that finds no room is counted by the log, and the end of the outage says so.
func (a *Agent) record(event string, entry any) {
	if err := a.audit.add(event, entry); err != nil && !errors.Is(err, audit.ErrFull) {
		a.log.Error(eventAuditFailed, keyError, err)
	}
}

// verdict takes one verdict of a guard. An error ends the guard's connection.
func (a *Agent) verdict(g *guard, r *frame.VerdictRecord) error {
	a.metrics.verdict(g.identity.App, r)
	if a.counts.add(&g.identity, r) {
		a.reports.soon()
	}
	// A message that was sent under a fail mode is never left out: each took a request of the gateway.
	if (!r.Allowed || r.WouldDeny) && !a.denials.admit(g.identity, r.Reason, time.Now()) {
		return nil
	}
	id, err := a.verdicts.add(&g.identity, r)
	if err != nil {
		return err
	}
	if r.Allowed && !r.WouldDeny && r.FailMode == "" {
		return nil
	}
	return a.audit.add(audit.EventVerdict, &auditVerdict{
		ID: id, Node: a.config.Node, Instance: g.identity.Instance, App: g.identity.App, Function: g.identity.Function,
		verdictFields: fieldsOf(r),
	})
}

// policyChanged puts on record that a policy came into force.
func (a *Agent) policyChanged(p *policy.Policy, envelope []byte) {
	a.record(audit.EventPolicy, &auditPolicy{What: "loaded", App: p.App, Version: p.Version, SHA256: sha256Hex(envelope)})
}

// policyRefused says, and puts on record, that one did not. A controller that sends many fills no disk.
func (a *Agent) policyRefused(app string, envelope []byte, err error) {
	a.log.Error(eventPolicyRefused, keyApp, app, keyError, err)
	if a.denials.admit(tooMany, "policy_refused", time.Now()) {
		detail := policy.Printable(err.Error(), 2*logTextMax)
		a.record(audit.EventPolicy, &auditPolicy{What: "refused", App: policy.Printable(app, nameBytesMax), SHA256: sha256Hex(envelope), Detail: detail})
	}
}

// modeChanged puts on record what is in force in a sandbox.
func (a *Agent) modeChanged(id *frame.Identity, m *frame.Mode) {
	if a.denials.admit(*id, "mode", time.Now()) {
		a.record(audit.EventMode, &auditMode{Instance: id.Instance, App: id.App, Function: id.Function, Mode: m.Mode, Version: m.Version})
	}
}

// tellSuppressed says every second what was beyond the bound on denials, until ctx ends.
func (a *Agent) tellSuppressed(ctx context.Context) {
	ticker := time.NewTicker(suppressedEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			a.suppressed()
		}
	}
}

func (a *Agent) suppressed() {
	all := a.denials.take(time.Now())
	for _, id := range slices.SortedFunc(maps.Keys(all), func(x, y frame.Identity) int {
		return cmp.Or(cmp.Compare(x.Instance, y.Instance), cmp.Compare(x.App, y.App), cmp.Compare(x.Function, y.Function))
	}) {
		for reason, n := range all[id] {
			a.metrics.suppress(reason, n)
		}
		if err := a.verdicts.addSuppressed(&id, all[id]); err != nil {
			a.log.Error(eventVerdictsFailed, keyError, err)
		}
		a.record(audit.EventSuppressed, &auditSuppressed{Instance: id.Instance, App: id.App, Function: id.Function, Counts: all[id]})
	}
}

func sha256Hex(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
