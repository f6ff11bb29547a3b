package agent

import (
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// startMonitored starts the agent with its metrics served, and returns where.
func (s *site) startMonitored() string {
	s.t.Helper()
	s.config.Metrics = &Metrics{Listen: "127.0.0.1:0"}
	s.start()
	listening := regexp.MustCompile(`event=` + eventMonitorListens + ` address=(\S+)`)
	s.until("the metrics are served", func() bool { return listening.MatchString(s.log.String()) })
	return "http://" + listening.FindStringSubmatch(s.log.String())[1]
}

// startMonitoredConnected is startConnected with the metrics served.
func (s *site) startMonitoredConnected() string {
	s.t.Helper()
	s.controller.offer("shop", s.sign(compiled("shop", 1)))
	s.controller.start()
	address := s.startMonitored()
	s.untilConnected()
	return address
}

func get(t *testing.T, url string) (status int, body string) {
	t.Helper()
	client := http.Client{Timeout: patience}
	answer, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	return answer.StatusCode, string(must(io.ReadAll(answer.Body)))
}

// value is that of one sample, written as in the text; -1 when it is not there.
func value(text, sample string) float64 {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, sample+" "); ok {
			return must(strconv.ParseFloat(strings.TrimSpace(rest), 64))
		}
	}
	return -1
}

func TestWhatGuardsSayIsCounted(t *testing.T) {
	s := newSite(t)
	address := s.startMonitoredConnected()
	g := s.guard("c1", "pay")
	s.register("c2", "ship")
	denied := `kalium_agent_verdicts_total{app="shop",mode="enforce",reason="out_of_order"}`
	if _, text := get(t, address+"/metrics"); value(text, denied) != 0 {
		t.Errorf("before the first denial its series is %v, not 0", value(text, denied))
	}

	for _, r := range []frame.VerdictRecord{
		{Mode: "enforce", Reason: "out_of_order"},
		{Mode: "audit", Reason: "unknown_peer", Allowed: true, WouldDeny: true},
		{Mode: "enforce", Reason: "controller_unavailable", FailMode: "last_known"},
		{Mode: "as I like", Reason: "allowed", Allowed: true},
	} {
		r.Event, r.Expected, r.States = frame.EventVerdict, []string{}, []int{}
		g.send(0, &frame.Verdict{Record: r})
	}

	for sample, want := range map[string]float64{
		denied: 1,
		`kalium_agent_verdicts_total{app="shop",mode="none",reason="allowed"}`:     1,
		`kalium_agent_would_deny_total{app="shop",reason="unknown_peer"}`:          1,
		`kalium_agent_fail_mode_verdicts_total{app="shop",fail_mode="last_known"}`: 1,
		`kalium_agent_fail_mode_verdicts_total{app="shop",fail_mode="allow"}`:      0,
		`kalium_agent_policy_version{app="shop"}`:                                  1,
		`kalium_agent_guards`:                       1,
		`kalium_agent_controller_connected`:         1,
		`kalium_agent_log_writable{log="verdicts"}`: 1,
		`kalium_agent_instances{app="shop",function="ship",asked="enforce",mode="none"}`:         1,
		`kalium_agent_events_total{event="instance.registered"}`:                                 2,
		`kalium_agent_events_total{event="guard.refused"}`:                                       0,
		`kalium_agent_verdicts_total{app="shop",mode="enforce",reason="controller_unavailable"}`: 1,
		`kalium_agent_question_seconds_bucket{question="invoke",le="+Inf"}`:                      0,
		`kalium_agent_suppressed_denials_total{reason="out_of_order"}`:                           0,
	} {
		s.until(fmt.Sprintf("%s is %v", sample, want), func() bool {
			_, text := get(t, address+"/metrics")
			return value(text, sample) == want
		})
	}
	if _, text := get(t, address+"/metrics"); value(text, "kalium_agent_lease_seconds") < 1 || strings.Contains(text, "as I like") {
		t.Errorf("no lease, or what a guard says is a label:\n%s", text)
	}
}

func TestAQuestionsWaitIsMeasured(t *testing.T) {
	s := newSite(t)
	address := s.startMonitoredConnected()
	g := s.guard("c1", "pay")
	g.send(7, &frame.Start{Step: step, Version: 1})
	asked, _ := expect[*frame.Start](s.controller)
	s.controller.send(asked.conn, asked.id, &frame.Answer{Allowed: true, Reason: "allowed", Call: "c", Invocation: "i"})
	g.answer()

	_, text := get(t, address+"/metrics")

	if n := value(text, `kalium_agent_question_seconds_count{question="start"}`); n != 1 {
		t.Errorf("%v questions were measured, not 1", n)
	}
	if sum := value(text, `kalium_agent_question_seconds_sum{question="start"}`); sum <= 0 || sum > patience.Seconds() {
		t.Errorf("they took %v s", sum)
	}
}

func TestReadinessNamesTheCheckThatFails(t *testing.T) {
	s := newSite(t)
	address := s.startMonitored()
	checks := func() (int, map[string]string) {
		status, body := get(t, address+"/readyz")
		var document struct {
			Ready  bool
			Checks map[string]string
		}
		if err := json.Unmarshal([]byte(body), &document); err != nil || document.Ready != (status == http.StatusOK) {
			t.Fatalf("%d %q: %v", status, body, err)
		}
		return status, document.Checks
	}

	status, found := checks()
	if status != http.StatusServiceUnavailable || found["controller"] == "ok" || found["policies"] == "ok" || found["verdicts"] != "ok" {
		t.Errorf("without a controller: %d %v", status, found)
	}
	if status, body := get(t, address+"/healthz"); status != http.StatusOK || body != "ok\n" {
		t.Errorf("it lives all the same: %d %q", status, body)
	}
	s.controller.offer("shop", s.sign(compiled("shop", 1)))
	s.controller.start()
	s.untilConnected()
	if status, found = checks(); status != http.StatusOK {
		t.Errorf("with a controller: %d %v", status, found)
	}
	wrong := (&scene{connected: true, policies: map[string]int{"shop": 1}, verdictsOK: false, auditOK: false}).wrong()
	if wrong["verdicts"] == "" || wrong["audit"] == "" || wrong["controller"] != "" || wrong["policies"] != "" {
		t.Errorf("with logs that fail: %v", wrong)
	}
}

func TestOtherPathsAndMethodsAreRefused(t *testing.T) {
	s := newSite(t)
	address := s.startMonitored()

	if status, _ := get(t, address+"/debug/pprof/"); status != http.StatusNotFound {
		t.Errorf("a path that is not there: %d", status)
	}
	answer := must(http.Post(address+"/metrics", "text/plain", strings.NewReader("x")))
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", answer.StatusCode)
	}
}

func TestAConnectionBeyondTheBoundIsClosedUnread(t *testing.T) {
	s := newSite(t)
	address := strings.TrimPrefix(s.startMonitored(), "http://")
	var silent []net.Conn
	for range monitorConnsMax {
		silent = append(silent, must(net.Dial("tcp", address)))
	}
	conn := must(net.Dial("tcp", address))
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"); err == nil {
		if data, _ := io.ReadAll(conn); len(data) > 0 {
			t.Errorf("one connection too many is answered %q", data)
		}
	}

	for _, each := range silent {
		_ = each.Close()
	}

	s.until("there is room again", func() bool {
		client := http.Client{Timeout: patience}
		answer, err := client.Get("http://" + address + "/healthz")
		if err == nil {
			_ = answer.Body.Close()
		}
		return err == nil
	})
}

func TestAHistogramIsCumulative(t *testing.T) {
	var s spans
	for _, span := range []time.Duration{spanBounds[0], spanBounds[0] + 1, time.Hour} {
		s.add(span)
	}
	var e exposition

	e.histogram("x", &s, label{"question", "start"})

	text := e.String()
	for sample, want := range map[string]float64{
		`x_bucket{question="start",le="2.5e-05"}`: 1, `x_bucket{question="start",le="5e-05"}`: 2, `x_bucket{question="start",le="1"}`: 2,
		`x_bucket{question="start",le="+Inf"}`: 3, `x_count{question="start"}`: 3,
	} {
		if value(text, sample) != want {
			t.Errorf("%s is %v, not %v in\n%s", sample, value(text, sample), want, text)
		}
	}
}

func TestALabelsValueCannotEndIt(t *testing.T) {
	var e exposition

	e.sample("x", 1, label{"app", "a\"} 5\nkalium \\"})

	if want := `x{app="a\"} 5\nkalium \\"} 1` + "\n"; e.String() != want {
		t.Errorf("%q, not %q", e.String(), want)
	}
}

// Every constant of log.go that names an event has its series.
func TestEveryEventIsCounted(t *testing.T) {
	var declared []string
	ast.Inspect(must(parser.ParseFile(token.NewFileSet(), "log.go", nil, 0)), func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok && strings.HasPrefix(spec.Names[0].Name, "event") && len(spec.Values) == 1 {
			if text, ok := spec.Values[0].(*ast.BasicLit); ok {
				declared = append(declared, must(strconv.Unquote(text.Value)))
			}
		}
		return true
	})
	counted := slices.Sorted(slices.Values(loggedEvents[:]))
	slices.Sort(declared)
	if len(declared) < 20 || !slices.Equal(declared, counted) {
		t.Errorf("log.go has the events %v, loggedEvents %v", declared, counted)
	}
}

var update = flag.Bool("update", false, "write the vectors anew")

// What the agent exports is a vector: tests/unit/test_dashboards.py reads it with Prometheus's own parser and holds the dashboard
// and the alerts against it.
func TestTheVectorIsWhatTheAgentExports(t *testing.T) {
	const path = "../../../tests/vectors/metrics/agent.prom"
	var m metrics
	for _, r := range []frame.VerdictRecord{
		{Mode: "enforce", Reason: "allowed", Allowed: true},
		{Mode: "enforce", Reason: "out_of_order"},
		{Mode: "audit", Reason: "unknown_peer", Allowed: true, WouldDeny: true},
		{Mode: "enforce", Reason: "controller_unavailable", FailMode: "last_known"},
		{Mode: "enforce", Reason: "no reason of ours"},
	} {
		m.verdict("shop", &r)
	}
	m.suppress("out_of_order", 7)
	m.answered(&frame.Start{}, 300*time.Microsecond)
	m.answered(&frame.Invoke{}, 40*time.Microsecond)
	m.answered(&frame.Invoke{}, 2*time.Second)
	now := &scene{
		connected: true, policies: map[string]int{"shop": 7}, leaseLeft: 59 * time.Second, guards: 3, notAfter: time.Unix(1_800_000_000, 0),
		verdictsOK: true, auditSeq: 12,
		instances: map[instanceKey]int{
			{"shop", "buy", "enforce", "enforce"}: 2, {"shop", "buy", "enforce", "none"}: 1, {labelOther, labelOther, labelOther, modeNone}: 1,
		},
	}
	var text exposition
	m.write(&text, now)
	got := strings.NewReplacer(Version(), "VERSION", runtime.Version(), "GO").Replace(text.String())

	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	if want := string(must(os.ReadFile(path))); got != want {
		t.Errorf("the agent exports something else than %s; when that is meant: go test ./internal/agent -run TheVector -update\n%s", path, got)
	}
}
