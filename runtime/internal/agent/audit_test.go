package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kalium.dev/kalium/runtime/internal/frame"
)

// audited gives the site an audit log.
func audited(t *testing.T) *site {
	t.Helper()
	s := newSite(t)
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s.write("audit.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(private))}))
	s.config.Audit = &Audit{Log: s.dir + "/audit.jsonl", Key: s.dir + "/audit.key", Fsync: FsyncInterval, MaxMiB: 64}
	return s
}

// auditEntries are the entries of one event in the audit log. That they are a chain is tested where it is made.
func (s *site) auditEntries(event string) []map[string]any {
	s.t.Helper()
	var entries []map[string]any
	for raw := range bytes.Lines(must(os.ReadFile(s.config.Audit.Log))) {
		var line struct{ Entry map[string]any }
		if err := json.Unmarshal(raw, &line); err != nil {
			break // it is being written
		}
		if line.Entry["event"] == event {
			entries = append(entries, line.Entry)
		}
	}
	return entries
}

func marked(message string, change func(*frame.VerdictRecord)) *frame.Verdict {
	v := record(message)
	change(&v.Record)
	return v
}

func TestTheAuditLogHasTheVerdictsThatMatterByTheirIDs(t *testing.T) {
	t.Parallel()
	s := audited(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	g.send(0, record("denied"))
	g.send(0, marked("allowed", func(r *frame.VerdictRecord) { r.Allowed, r.Reason = true, "allowed" }))
	g.send(0, marked("would be denied", func(r *frame.VerdictRecord) { r.Allowed, r.WouldDeny = true, true }))
	g.send(0, marked("forgiven", func(r *frame.VerdictRecord) { r.Allowed, r.Reason, r.FailMode = true, "allowed", "allow" }))
	s.until("all are logged", func() bool { return len(s.verdictLines()) == 4 && len(s.auditEntries("verdict")) == 3 })

	lines, entries := s.verdictLines(), s.auditEntries("verdict")

	run := s.auditEntries("open")[0]["run"].(string)
	for i, line := range lines {
		if line["id"] != fmt.Sprintf("%s%08x", run[:8], i+1) {
			t.Errorf("line %d has the id %v, of the run %s", i+1, line["id"], run)
		}
	}
	for i, line := range []int{0, 2, 3} {
		for key, value := range lines[line] {
			if key != "seq" && key != "time_ms" && fmt.Sprint(entries[i][key]) != fmt.Sprint(value) {
				t.Errorf("%s of entry %d is %v, of the line %v", key, i, entries[i][key], value)
			}
		}
		if len(entries[i]) != len(lines[line]) {
			t.Errorf("entry %v of line %v", entries[i], lines[line])
		}
	}
	if entries[2]["fail_mode"] != "allow" {
		t.Errorf("fail mode %v", entries[2]["fail_mode"])
	}
}

func TestPoliciesAndModesArePutOnRecord(t *testing.T) {
	t.Parallel()
	s := audited(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	second := s.sign(compiled("shop", 2))
	s.controller.push(&frame.Policy{App: "shop", Policy: second})
	s.controller.push(&frame.Policy{App: "shop", Policy: second})
	s.controller.push(&frame.Policy{App: "shop", Policy: []byte("nonsense")})
	for range 3 {
		g.send(0, &frame.Mode{Mode: "enforce", Version: 1})
	}
	g.send(0, &frame.Mode{Mode: "audit", Version: 2})
	s.until("all are there", func() bool { return len(s.auditEntries("policy")) >= 3 && len(s.auditEntries("mode")) >= 2 })

	policies, modes := s.auditEntries("policy"), s.auditEntries("mode")

	if len(policies) != 3 || policies[0]["what"] != "loaded" || policies[1]["version"] != 2.0 || policies[1]["sha256"] != sha256Hex(second) ||
		policies[2]["what"] != "refused" || policies[2]["sha256"] != sha256Hex([]byte("nonsense")) || policies[2]["detail"] == "" {
		t.Errorf("policies %v", policies)
	}
	if len(modes) != 2 || modes[0]["mode"] != "enforce" || modes[1]["mode"] != "audit" || modes[1]["version"] != 2.0 || modes[1]["instance"] != "c1" {
		t.Errorf("modes %v", modes)
	}
}

func TestAFloodOfDenialsIsCountedAndFillsNoLog(t *testing.T) {
	t.Parallel()
	s := audited(t)
	s.startConnected()
	g, other := s.guard("c1", "pay"), s.guard("c2", "ship")
	const flood = 5000
	for i := range flood {
		v := record("m")
		if i%2 == 0 {
			v.Record.Reason = "unknown_peer"
		}
		g.send(0, v)
	}
	other.send(0, record("of another"))
	for range 50 {
		g.send(0, marked("allowed", func(r *frame.VerdictRecord) { r.Allowed, r.Reason = true, "allowed" }))
	}
	count := func(lines []map[string]any) (kept, counted int) {
		for _, line := range lines {
			switch {
			case line["event"] == "verdict" && line["message"] == "m":
				kept++
			case line["event"] == "suppressed":
				for _, n := range line["counts"].(map[string]any) {
					counted += int(n.(float64))
				}
			}
		}
		return kept, counted
	}
	all := func() bool {
		kept, counted := count(s.verdictLines())
		return kept+counted == flood
	}
	s.until("each is kept or counted", all)
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}

	kept, counted := count(s.verdictLines())
	auditKept, auditCounted := count(append(s.auditEntries("verdict"), s.auditEntries("suppressed")...))

	if kept < denialBurst || kept > denialBurst+20*denialsPerSecond || auditKept != kept || counted != flood-kept || auditCounted != counted {
		t.Errorf("%d and %d kept, %d and %d counted", kept, auditKept, counted, auditCounted)
	}
	allowed, others := 0, 0
	for _, line := range s.verdictLines() {
		if line["message"] == "allowed" {
			allowed++
		}
		if line["message"] == "of another" {
			others++
		}
	}
	reasons := s.auditEntries("suppressed")[0]["counts"].(map[string]any)
	if allowed != 50 || others != 1 || reasons["unknown_peer"] == nil || reasons["out_of_order"] == nil {
		t.Errorf("%d allowed, %d of another, reasons %v", allowed, others, reasons)
	}
}

func TestAnAuditLogThatCannotBeWrittenMakesEverythingDeny(t *testing.T) {
	t.Parallel()
	s := audited(t)
	s.startConnected()
	g, other := s.guard("c1", "pay"), s.guard("c2", "ship")
	// Somebody has moved the file and put another one in its place, which is not touched.
	moved := s.config.Audit.Log + ".moved"
	if err := os.Rename(s.config.Audit.Log, moved); err != nil {
		t.Fatal(err)
	}
	s.write("audit.jsonl", []byte("somebody's\n"))

	g.send(0, record("kept?"))

	g.expectDismissed()
	other.expectDismissed()
	if _, welcome := s.hello("c1", "shop", "pay"); welcome.OK || welcome.Reason != "no_guard" {
		t.Errorf("while the log fails: %#v", welcome)
	}
	if err := os.Remove(s.config.Audit.Log); err != nil {
		t.Fatal(err)
	}
	s.until("the log is well", func() bool { return strings.Contains(s.log.String(), eventAuditWell) })
	s.until("the outage is on record", func() bool { return len(s.auditEntries("outage")) == 1 })
	if _, welcome := s.hello("c1", "shop", "pay"); !welcome.OK {
		t.Errorf("after it: %#v", welcome)
	}
	outage := s.auditEntries("outage")[0]
	if outage["what"] != "audit_log" || outage["guards"] != 2.0 || outage["lost"] != 0.0 || outage["error"] == "" {
		t.Errorf("%v", outage)
	}
	kept := len(s.auditEntries("verdict")) + strings.Count(string(must(os.ReadFile(moved))), `"message":"kept?"`)
	if opens := s.auditEntries("open"); kept != 1 || len(opens) != 1 || opens[0]["why"] != "rotation" {
		t.Errorf("%d verdicts, begun by %v", kept, opens)
	}
}

func TestAFullDiskMakesEverythingDenyAndLosesNothing(t *testing.T) {
	t.Parallel()
	s := audited(t)
	small := s.dir + "/small"
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", small, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("a small file system needs root: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	s.config.Audit.Log = small + "/audit.jsonl"
	s.startConnected()
	g := s.guard("c1", "pay")
	sent := 0
	for ; !strings.Contains(s.log.String(), eventAuditFailed) && sent < denialBurst; sent++ {
		if _, err := g.conn.Write(must(frame.Append(nil, 0, record(strings.Repeat("x", 300))))); err != nil {
			break
		}
		if sent%20 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	g.expectDismissed()
	if _, welcome := s.hello("c1", "shop", "pay"); welcome.OK || welcome.Reason != "no_guard" {
		t.Errorf("while the disk is full: %#v", welcome)
	}

	if err := unix.Mount("none", small, "tmpfs", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}

	s.until("the outage is on record", func() bool { return len(s.auditEntries("outage")) == 1 })
	if _, welcome := s.hello("c1", "shop", "pay"); !welcome.OK {
		t.Errorf("after it: %#v", welcome)
	}
	logged := 0
	for _, line := range s.verdictLines() {
		if line["event"] == "verdict" {
			logged++
		}
	}
	if entries := len(s.auditEntries("verdict")); entries != logged || entries < 50 {
		t.Errorf("%d entries of %d verdicts, %d were sent", entries, logged, sent)
	}
}

func TestAnOutageOfTheVerdictLogIsPutOnRecord(t *testing.T) {
	t.Parallel()
	s := audited(t)
	if err := os.Symlink("/dev/full", s.config.VerdictLog); err != nil {
		t.Fatal(err)
	}
	s.startConnected()
	g := s.guard("c1", "pay")
	g.send(0, record("m"))
	g.expectClosed()
	if err := os.Remove(s.config.VerdictLog); err != nil {
		t.Fatal(err)
	}
	s.reopen <- os.Interrupt

	s.until("it is there", func() bool { return len(s.auditEntries("outage")) == 1 })

	if outage := s.auditEntries("outage")[0]; outage["what"] != "verdict_log" || outage["guards"] != 1.0 {
		t.Errorf("%v", outage)
	}
}

func TestTheChainGoesOnAfterARestartAndTheControllerHearsHowFarItIs(t *testing.T) {
	t.Parallel()
	s := audited(t)
	s.startConnected()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.until("the second start is there", func() bool { return len(s.auditEntries("open")) == 2 })

	report := s.untilReport("one with the audit log's head", func(m *frame.Report) bool { return m.AuditSeq >= 3 })

	opens := s.auditEntries("open")
	data := string(must(os.ReadFile(s.config.Audit.Log)))
	if opens[0]["log"] != opens[1]["log"] || opens[0]["run"] == opens[1]["run"] || opens[1]["why"] != "restart" || opens[1]["name"] != "node-0" {
		t.Errorf("%v", opens)
	}
	if !strings.Contains(data, fmt.Sprintf(`"hash":"%s","entry":{"seq":%d,`, report.AuditHash, report.AuditSeq)) {
		t.Errorf("no entry %d with the hash %s", report.AuditSeq, report.AuditHash)
	}
}

func TestAnAuditLogThatCannotBeContinuedKeepsTheAgentFromStarting(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil func(*site)
		says  string
	}{
		"no key":        {func(s *site) { _ = os.Remove(s.config.Audit.Key) }, "error[agent.audit_key]"},
		"another file":  {func(s *site) { s.write("audit.jsonl", []byte("hello\n")) }, "error[agent.audit_log]"},
		"no such place": {func(s *site) { s.config.Audit.Log = s.dir + "/nowhere/audit.jsonl" }, "error[agent.audit_log]"},
	} {
		s := audited(t)
		c.spoil(s)

		err := run(context.Background(), s.config, newLogger(s.log), s.reopen, s.resolve)

		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWithoutAnAuditLogTheLogSaysSo(t *testing.T) {
	t.Parallel()
	s := newSite(t)

	s.start()

	s.until("it is said", func() bool { return strings.Contains(s.log.String(), eventAuditOff) })
}

func TestInstancesBeyondTheBoundShareOneAllowance(t *testing.T) {
	t.Parallel()
	d := newDenials()
	now := time.Now()
	for i := range denialSourcesMax {
		if !d.admit(frame.Identity{Instance: fmt.Sprint(i)}, "x", now) {
			t.Fatal("the first of an instance is not admitted")
		}
	}
	admitted := 0
	for i := range 3 * denialBurst {
		if d.admit(frame.Identity{Instance: fmt.Sprint("more", i)}, "x", now) {
			admitted++
		}
	}

	beyond := d.take(now)

	if admitted != denialBurst || beyond[tooMany]["x"] != 2*denialBurst || len(beyond) != 1 {
		t.Errorf("%d admitted, %v", admitted, beyond)
	}
	if len(d.take(now.Add(time.Minute))) != 0 || len(d.known) != 0 {
		t.Errorf("%d are remembered", len(d.known))
	}
}
