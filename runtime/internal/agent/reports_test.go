package agent

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// untilReport returns the first report for which holds says yes. It has to come sooner than the next one would by itself.
func (s *site) untilReport(what string, holds func(*frame.Report) bool) *frame.Report {
	s.t.Helper()
	begin := time.Now()
	for range 100 {
		if _, m := expect[*frame.Report](s.controller); holds(m) {
			if took := time.Since(begin); took > reportEvery/2 {
				s.t.Errorf("it took %v until a report said that %s", took, what)
			}
			return m
		}
	}
	s.t.Fatalf("no report says that %s", what)
	return nil
}

func TestTheControllerHearsWhatTheNodeRuns(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.startConnected()
	s.untilReport("nothing runs", func(m *frame.Report) bool { return len(m.App) == 0 && len(m.Denied) == 0 }) // at the welcome
	s.register("c3", "ship")
	for _, container := range []string{"c1", "c2"} {
		s.guard(container, "pay").send(0, &frame.Mode{Mode: "enforce", Version: 1})
	}
	g := s.guard("c4", "pay")
	g.send(0, &frame.Mode{Mode: "enforce", Version: 1})
	g.send(0, &frame.Mode{Mode: "audit", Version: 2})

	got := s.untilReport("all are there", func(m *frame.Report) bool { return len(m.App) == 3 && m.Mode[0] == "audit" && m.Count[1] == 2 })

	want := &frame.Report{
		App: []string{"shop", "shop", "shop"}, Function: []string{"pay", "pay", "ship"}, Mode: []string{"audit", "enforce", "none"},
		Version: []int{2, 1, 0}, Count: []int{1, 2, 1}, Denied: map[string]int{}, WouldDeny: map[string]int{}, FailModes: map[string]int{},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%#v", got)
	}
	g.send(0, &frame.Mode{Mode: "learn", Version: 3})
	s.untilReport("a mode has changed", func(m *frame.Report) bool { return m.Mode[1] == "learn" && m.Version[1] == 3 })
	// A guard that is gone is in force nowhere.
	_ = g.conn.Close()
	s.untilReport("the guard is gone", func(m *frame.Report) bool {
		return m.Mode[0] == "enforce" && m.Mode[1] == "none" && m.Function[1] == "pay"
	})
	s.ask(`{"op":"unregister","container":"c4"}`)
	s.untilReport("the instance is gone", func(m *frame.Report) bool { return len(m.App) == 2 })
}

func TestAModeThatAGuardCannotBeInClosesIt(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	for i, m := range []*frame.Mode{{Mode: "none", Version: 1}, {Mode: "", Version: 1}, {Mode: "Enforce", Version: 1}, {Mode: "enforce", Version: -1}} {
		g := s.guard(fmt.Sprint("c", i), "pay")
		g.send(0, m)
		g.expectClosed()
	}
}

func TestVerdictsAreCountedForTheController(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	verdict := func(change func(*frame.VerdictRecord)) {
		m := record("GET /")
		change(&m.Record)
		g.send(0, m)
	}
	verdict(func(r *frame.VerdictRecord) {})
	verdict(func(r *frame.VerdictRecord) {})
	verdict(func(r *frame.VerdictRecord) { r.Allowed, r.WouldDeny = true, true })
	verdict(func(r *frame.VerdictRecord) { r.Allowed, r.Reason = true, "allowed" })
	verdict(func(r *frame.VerdictRecord) { r.Allowed, r.Reason, r.FailMode = true, "allowed", "last_known" })
	verdict(func(r *frame.VerdictRecord) { r.Reason, r.FailMode = "controller_unavailable", "deny" })

	got := s.untilReport("all are counted", func(m *frame.Report) bool { return m.FailModes["shop deny"] == 1 })

	if want := map[string]int{"shop out_of_order": 2, "shop controller_unavailable": 1}; !reflect.DeepEqual(got.Denied, want) {
		t.Errorf("denied %v", got.Denied)
	}
	if want := map[string]int{"shop out_of_order": 1}; !reflect.DeepEqual(got.WouldDeny, want) {
		t.Errorf("would deny %v", got.WouldDeny)
	}
	if want := map[string]int{"shop deny": 1, "shop last_known": 1}; !reflect.DeepEqual(got.FailModes, want) {
		t.Errorf("fail modes %v", got.FailModes)
	}
	// The next controller hears the same.
	s.controller.stop()
	s.until("the agent has noticed", func() bool { return s.connected() < 0 })
	for len(s.controller.received) > 0 {
		<-s.controller.received
	}
	s.controller.start()
	s.untilReport("the counts are the same", func(m *frame.Report) bool { return reflect.DeepEqual(m, got) })
}

// TestTheLargestReportFitsAFrame has as many instances, apps and counters as there may be, with the longest names.
func TestTheLargestReportFitsAFrame(t *testing.T) {
	long := func(n int) string { return fmt.Sprintf("%0*d", nameBytesMax, n) }
	a := &Agent{counts: newCounts(), instances: map[string]*instance{}}
	for n := range instancesMax {
		a.instances[long(n)] = &instance{
			container: long(n), app: long(n), function: long(n), acknowledged: true, guard: &guard{mode: "enforce", version: 1 << 30},
		}
	}
	longest := ""
	for _, reason := range policy.Reasons() {
		if len(reason) > len(longest) {
			longest = string(reason)
		}
	}
	for n := range countersMax + 100 {
		for _, r := range []frame.VerdictRecord{
			{Reason: longest, FailMode: "last_known"}, {Reason: longest, Allowed: true, WouldDeny: true},
		} {
			a.counts.add(&frame.Identity{App: long(n)}, &r)
		}
	}

	m := a.report()
	data, err := frame.Append(nil, 0, m)

	if err != nil || len(m.App) != instancesMax {
		t.Fatalf("%d rows, %v", len(m.App), err)
	}
	for name, table := range map[string]map[string]int{"denied": m.Denied, "would deny": m.WouldDeny, "fail modes": m.FailModes} {
		all := 0
		for key, n := range table {
			if all += n; !strings.HasPrefix(key, "0") && n != 100 {
				t.Errorf("%s: %s is counted %d times", name, key, n)
			}
		}
		if len(table) != countersMax+1 || all != countersMax+100 {
			t.Errorf("%s: %d keys, %d verdicts", name, len(table), all)
		}
	}
	t.Logf("%d bytes of %d", len(data), frame.FrameBytesMax)
}
