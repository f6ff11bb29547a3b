package agent

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// reports tells the controller what the node runs: on each new connection, soon after a change, and now and then.
type reports struct {
	changed chan struct{}
	send    func()
}

func newReports(send func()) *reports {
	return &reports{changed: make(chan struct{}, 1), send: send}
}

// soon asks for a report. It does not wait.
func (r *reports) soon() { signal(r.changed) }

// run sends reports until ctx ends.
func (r *reports) run(ctx context.Context) {
	ticker := time.NewTicker(reportEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-r.changed:
		}
		r.send()
		// What changes meanwhile is told together.
		pause := time.NewTimer(reportPause)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
	}
}

// row is what the instances have in common that one row of a report counts.
type row struct {
	app, function, mode string
	version             int
}

func compareRows(a, b row) int {
	return cmp.Or(cmp.Compare(a.app, b.app), cmp.Compare(a.function, b.function), cmp.Compare(a.mode, b.mode), cmp.Compare(a.version, b.version))
}

// effective is the mode that is in force in an instance, by its guard's own word, and by which version. It needs the agent's mu.
func (i *instance) effective() (mode string, version int) {
	if i.guard == nil || i.guard.mode == "" {
		return modeNone, 0
	}
	return i.guard.mode, i.guard.version
}

// report is what the node runs now.
func (a *Agent) report() *frame.Report {
	rows := map[row]int{}
	a.mu.Lock()
	for _, i := range a.instances {
		if i.acknowledged {
			mode, version := i.effective()
			rows[row{i.app, i.function, mode, version}]++
		}
	}
	a.mu.Unlock()
	m := &frame.Report{}
	for _, each := range slices.SortedFunc(maps.Keys(rows), compareRows) {
		m.App, m.Function = append(m.App, each.app), append(m.Function, each.function)
		m.Mode, m.Version = append(m.Mode, each.mode), append(m.Version, each.version)
		m.Count = append(m.Count, rows[each])
	}
	m.AuditSeq, m.AuditHash = a.audit.head()
	m.Denied, m.WouldDeny, m.FailModes = a.counts.snapshot()
	return m
}

// sendReport tells the connected controller, if there is one; the next one hears it at its welcome.
func (a *Agent) sendReport() {
	c := a.link.current()
	if c == nil {
		return
	}
	if err := c.tell(a.report()); err != nil {
		a.log.Warn(eventReportDropped, keyError, err)
	}
}
