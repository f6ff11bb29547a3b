package guard

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

// Audit equals enforce: on the same sequence, up to the first denial on each connection, both log the same verdicts and
// stand at the same cursors. After a denial enforce has no connection any more, so the sequence goes on with a new one.

// pair is one sandbox in enforce and one in audit, which everything is done to alike.
type pair struct {
	enforce, audit *Guard
	controllers    [2]*guardtest.Controller
	seen           int
}

func newPair(t testing.TB, identity Identity, welcome func(mode string) *frame.Welcome) *pair {
	t.Helper()
	p := &pair{controllers: [2]*guardtest.Controller{guardtest.NewController(), guardtest.NewController()}}
	for i, mode := range []string{"enforce", "audit"} {
		calls := 0
		p.controllers[i].OnStart = func(*frame.Start) (*frame.Answer, error) {
			calls++
			return &frame.Answer{Allowed: true, Reason: "allowed", Call: fmt.Sprintf("%032x", calls), Invocation: fmt.Sprintf("%032x", 1000+calls)}, nil
		}
		g, err := New(identity, guardtest.PublicKey, welcome(mode), p.controllers[i])
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			p.enforce = g
		} else {
			p.audit = g
		}
	}
	return p
}

func (p *pair) guards() []*Guard { return []*Guard{p.enforce, p.audit} }

// compare checks the verdicts since the last comparison and the cursors, and tells whether any verdict was a denial.
func (p *pair) compare(t testing.TB, after string) (denied bool) {
	t.Helper()
	var logs [2][]frame.VerdictRecord
	for i, c := range p.controllers {
		logs[i] = c.Since(p.seen)
		for j := range logs[i] {
			r := &logs[i][j]
			if (r.Allowed && !r.WouldDeny) != (r.Reason == "allowed") {
				t.Fatalf("after %s: verdict %+v", after, r)
			}
			r.Allowed, r.WouldDeny = r.Allowed && !r.WouldDeny, false
			denied = denied || !r.Allowed
			r.Mode, r.LatencyUS = "", 0
		}
	}
	if !reflect.DeepEqual(logs[0], logs[1]) {
		t.Fatalf("after %s: the verdicts differ:\n%+v\n%+v", after, logs[0], logs[1])
	}
	p.seen += len(logs[0])
	if a, b := stateOf(p.enforce), stateOf(p.audit); a != b {
		t.Fatalf("after %s: enforce stands at %s, audit at %s", after, a, b)
	}
	return denied
}

// stateOf writes down where a guard stands.
func stateOf(g *Guard) string {
	var b strings.Builder
	for _, inv := range g.walk.parts {
		fmt.Fprintf(&b, "%s %t %t %t %d:", inv.call, inv.tailing, inv.adrift, inv.unknown, inv.edges)
		if g.walk.branches == nil {
			fmt.Fprint(&b, inv.cursor.States())
		}
		for _, l := range inv.lost {
			fmt.Fprint(&b, l.left, l.waiting)
		}
	}
	for _, branch := range g.walk.branches {
		for _, cursor := range branch {
			fmt.Fprint(&b, cursor.States())
		}
		b.WriteByte('|')
	}
	return b.String()
}

// generated plays a random sequence of messages, requests, answers and lost connections.
func generated(t *testing.T, p *pair, function *policy.Function, random *rand.Rand, length int) (allowed, denied int) {
	messages := messagesOf(function, random)
	incoming := [2][]*Incoming{}
	for range length {
		switch n := random.IntN(12); {
		case n == 0 && len(incoming[0]) < function.MaxInflight:
			for i, g := range p.guards() {
				in := accept(t, g)
				released(t, in.Admit([]byte(postRequest), nil))
				incoming[i] = append(incoming[i], in)
			}
			p.compare(t, "a request")
		case n == 1 && len(incoming[0]) > 0:
			at := random.IntN(len(incoming[0]))
			for i := range incoming {
				answer(t, incoming[i][at], noContentAnswer, len(noContentAnswer), Allowed)
				incoming[i] = slices.Delete(incoming[i], at, at+1)
			}
			p.compare(t, "an answer")
		case len(messages) > 0:
			m := messages[random.IntN(len(messages))]
			if random.IntN(8) == 0 {
				m = mutated(m, random)
			}
			call := fmt.Sprintf("%032x", 1+random.IntN(4))
			answer, failed := &frame.Answer{Allowed: true, Reason: "allowed", Token: guardtest.Token}, error(nil)
			if m.Callback != "" {
				answer.Callback = guardtest.Token
			}
			switch random.IntN(40) {
			case 0, 1, 2, 3:
				answer = &frame.Answer{Reason: "edge_not_allowed"}
			case 4:
				answer = &frame.Answer{Reason: "controller_unavailable"}
			case 5:
				answer = &frame.Answer{Allowed: true}
			case 6:
				answer, failed = nil, errLinkDown
			}
			lost := random.IntN(6) == 0
			var outcomes [2]Outcome
			for i, g := range p.guards() {
				var e *edge
				said, number := *m, 0
				if m.Kind == policy.KindInvoke {
					e = &edge{call: call, ask: func(*invocation, bool) (*frame.Answer, error) { return answer, failed }}
					said.Callback = "" // which the program does not say
				}
				could := g.could(m, m.Kind.String())
				var inv *invocation
				if outcomes[i], inv = g.judgeEdge(nil, &said, m.Kind.String(), e); e != nil {
					number = e.number
				}
				if e == nil && (could == Allowed) != (outcomes[i] == Allowed) {
					t.Fatalf("%s: could say %d, and the judge %d", m.Text(), could, outcomes[i])
				}
				if lost && outcomes[i] == Allowed {
					g.lose(inv, &said, number)
				}
			}
			if (outcomes[0] == Allowed) != (outcomes[1] == Allowed) || outcomes[0] == Marked {
				t.Fatalf("%s: outcomes %v", m.Text(), outcomes)
			}
			if outcomes[0] == Allowed {
				allowed++
			} else {
				denied++
			}
			p.compare(t, m.Text())
		}
	}
	return allowed, denied
}

// messagesOf makes a message of each symbol.
func messagesOf(function *policy.Function, random *rand.Rand) []*policy.Message {
	placeholder := regexp.MustCompile(`\{[^}]*\}`)
	symbols := function.Symbols
	if function.Startup != nil {
		symbols = append(slices.Clone(symbols), function.Startup.Symbols...)
	}
	var messages []*policy.Message
	for i := range symbols {
		s := &symbols[i]
		m := &policy.Message{
			Kind: s.Kind, Peer: s.Peer, Method: s.Method, Path: placeholder.ReplaceAllString(s.Path, "v"), Callee: s.Callee, Verb: s.Verb, Asynchronous: s.Asynchronous, Callback: s.Callback,
			Read: s.Read, Write: s.Write, From: s.From, To: s.To, Upgrade: s.Upgrade, GRPC: s.GRPC,
		}
		if len(s.Query) > 0 {
			m.Query = s.Query[:random.IntN(len(s.Query)+1)]
		}
		messages = append(messages, m)
	}
	return messages
}

func mutated(m *policy.Message, random *rand.Rand) *policy.Message {
	other := *m
	switch random.IntN(5) {
	case 0:
		other.Path += "x"
	case 1:
		other.Peer = "elsewhere"
	case 2:
		other.Verb, other.Method = "delete", "DELETE"
	case 3:
		other.Query = []string{"unknown"}
	default:
		other.Kind = policy.KindUnknown
	}
	return &other
}

func TestAuditGivesTheVerdictsOfEnforceOnGeneratedMessages(t *testing.T) {
	const folder = "../../../tests/vectors/policies"
	mode := regexp.MustCompile(`"mode":"[a-z]+"`)
	times := regexp.MustCompile(`"(invocation_timeout_ms|tail_ms)":[0-9]+`)
	failModes := regexp.MustCompile(`"app_edge":"[a-z_]+"`)
	texts := map[string]string{}
	paths, err := filepath.Glob(filepath.Join(folder, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		var vector struct{ Compiled string }
		if err != nil || json.Unmarshal(data, &vector) != nil || vector.Compiled == "" {
			continue // refused.json and envelopes.json are lists
		}
		texts[filepath.Base(path)] = vector.Compiled
	}
	if len(texts) < 8 {
		t.Fatalf("%d policies in %s", len(texts), folder)
	}
	allowed, denied := 0, 0
	for name, text := range texts {
		compiled, err := policy.Parse([]byte(text))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		hosts := map[string][]string{}
		for _, peer := range compiled.Peers {
			hosts[peer.Host] = []string{guardtest.HostAddress}
		}
		for function := range compiled.Functions {
			for seed := range uint64(6) {
				inflight := []int{1, 1, 1, 2, 3, 8}[seed]
				text := regexp.MustCompile(`"max_inflight":[0-9]+`).ReplaceAllString(text, fmt.Sprintf(`"max_inflight":%d`, inflight))
				text = strings.ReplaceAll(text, `"reuse":"never"`, `"reuse":"always"`)
				text = times.ReplaceAllString(text, `"$1":60000`) // no clock decides anything here
				text = failModes.ReplaceAllString(text, `"app_edge":"`+[]string{"deny", "allow", "last_known"}[seed%3]+`"`)
				p := newPair(t, Identity{Container: "c", App: compiled.App, Function: function}, func(as string) *frame.Welcome {
					welcome := guardtest.Welcome(t, as)
					welcome.Names, welcome.Policy = hosts, guardtest.Sign(t, mode.ReplaceAllString(text, `"mode":"`+as+`"`))
					return welcome
				})
				random := rand.New(rand.NewPCG(seed, uint64(len(text))))
				a, d := generated(t, p, p.enforce.force.function, random, 80)
				allowed, denied = allowed+a, denied+d
			}
		}
	}
	t.Logf("%d messages were allowed, %d denied", allowed, denied)
	if allowed < 500 || denied < 500 {
		t.Errorf("the sequences judge too little: %d allowed, %d denied", allowed, denied)
	}
}

func TestAuditGivesTheVerdictsOfEnforceAroundAnInvocation(t *testing.T) {
	allowed := 0
	for seed := range uint64(60) {
		random := rand.New(rand.NewPCG(seed, 7))
		pairs := []string{guardtest.RetriesOfGet, fmt.Sprintf(`"query":[],"retries":%d,"tail":false,"text":"http GET api /a"`, random.IntN(4))}
		pairs = append(pairs, guardtest.Inflight, guardtest.Startup+fmt.Sprintf(`"max_inflight":%d`, 1+random.IntN(3)))
		if random.IntN(2) == 0 {
			pairs = append(pairs, selectText, selectTail)
		}
		pairs = append(pairs, payerText, []string{
			payerLine(3, false, "", random.IntN(3)), payerLine(3, true, "", random.IntN(3)), payerLine(3, true, "buyer", random.IntN(3)),
		}[random.IntN(3)])
		pairs = append(pairs, failDeny, failing([]string{"deny", "allow", "last_known"}[random.IntN(3)]))
		p := newPair(t, testIdentity, func(mode string) *frame.Welcome { return guardtest.WelcomeEdited(t, mode, pairs...) })
		a, _ := generated(t, p, p.enforce.force.function, random, 120)
		allowed += a
	}
	if allowed < 500 {
		t.Errorf("only %d messages were allowed", allowed)
	}
}

// stream is one connection of a byte trace, in both modes.
type stream struct {
	out  [2]*Outgoing
	sent [2]strings.Builder
	dead bool
}

func (p *pair) stream(t testing.TB, to string) *stream {
	return &stream{out: [2]*Outgoing{connect(t, p.enforce, to), connect(t, p.audit, to)}}
}

// write writes to both and compares what is known and what left.
func (p *pair) write(t testing.TB, s *stream, b string) {
	t.Helper()
	if s.dead {
		return
	}
	for i, out := range s.out {
		send, outcome := out.Write([]byte(b))
		s.sent[i].Write(send)
		if i == 1 && outcome == Denied {
			t.Fatalf("audit denied %q", b)
		}
		s.dead = s.dead || i == 0 && outcome == Denied
	}
	if p.compare(t, fmt.Sprintf("%.60q", b)) != s.dead {
		t.Fatalf("after %.60q: the connection is dead: %t", b, s.dead)
	}
	enforce, audit := s.sent[0].String(), s.sent[1].String()
	if !s.dead && enforce != audit || !strings.HasPrefix(audit, enforce) {
		t.Fatalf("after %.60q: enforce sent %q, audit %q", b, enforce, audit)
	}
}

var addressOf = map[string]string{"api": api, "database": database, "gateway": "10.137.0.1:8080"}

// The files of testdata/traces were recorded from programs: a protocol, a connection and what one read of the server
// returned in each line.
func TestAuditGivesTheVerdictsOfEnforceOnRecordedTraces(t *testing.T) {
	paths, err := filepath.Glob("testdata/traces/*.txt")
	if err != nil || len(paths) < 5 {
		t.Fatalf("%d traces, %v", len(paths), err)
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for state := range 5 {
			for _, size := range []int{1, 7, 1 << 20} {
				p := newPair(t, testIdentity, func(mode string) *frame.Welcome { return guardtest.WelcomeEdited(t, mode) })
				for _, g := range p.guards() {
					released(t, accept(t, g).Admit([]byte(postRequest), nil))
					g.live.cursor = atState(g, state)
				}
				p.compare(t, "the request")
				streams := map[string]*stream{}
				for line := range strings.Lines(string(data)) {
					fields := strings.SplitN(strings.TrimSpace(line), " ", 3)
					if fields[0] == "#" {
						continue
					}
					text, err := strconv.Unquote(fields[2])
					if err != nil {
						t.Fatalf("%s: %v in %s", path, err, line)
					}
					s := streams[fields[1]]
					if s == nil {
						s = p.stream(t, addressOf[fields[0]])
						streams[fields[1]] = s
					}
					for part := range slices.Chunk([]byte(text), size) {
						p.write(t, s, string(part))
					}
				}
				if p.seen < 2 {
					t.Errorf("%s judges nothing", path)
				}
			}
		}
	}
}

// units of the protocols in clear, right and wrong ones.
var units = map[string][]string{
	"api": {
		request("GET /a", "api.test:8080"), request("POST /b", "api.test:8080"), request("POST /b", "api.test:8080", "Content-Length: 5\r\n") + "01234",
		request("POST /b", "api.test:8080", "Transfer-Encoding: chunked\r\n") + "3\r\nabc\r\n0\r\n\r\n",
		request("POST /b", "api.test:8080", "Transfer-Encoding: chunked\r\n") + "zz\r\n", request("POST /b", "api.test:8080", "Content-Length: 500\r\n"),
		request("GET /a", "elsewhere:8080"), request("POST /function/payer", "gateway:8080"), request("GET /system/functions", "gateway:8080"),
		request("POST /function/payer", "gateway:8080", "X-Kalium-Token: mine\r\n", "X-Call-Id: l\r\n"), "GET / HTTP/0.9\r\n\r\n", "\x00\x01\x02",
	},
	"database": {
		guardtest.Packet(0, "\x03SELECT name FROM items"), guardtest.Packet(0, "\x0e"), guardtest.Packet(0, "\x03DELETE FROM items"),
		guardtest.Packet(0, "\x03nonsense"), guardtest.Packet(0, "\x03SELECT 1; SELECT 2"),
	},
}

func TestAuditGivesTheVerdictsOfEnforceOnGeneratedBytes(t *testing.T) {
	for seed := range uint64(80) {
		random := rand.New(rand.NewPCG(seed, 11))
		p := newPair(t, testIdentity, func(mode string) *frame.Welcome {
			return guardtest.WelcomeEdited(t, mode, guardtest.RetriesOfGet, retryOnce)
		})
		var incoming [2]*Incoming
		begin := func() {
			for i, g := range p.guards() {
				incoming[i] = accept(t, g)
				released(t, incoming[i].Admit([]byte(postRequest), nil))
			}
			p.compare(t, "a request")
		}
		begin()
		streams := map[string]*stream{}
		for range 40 {
			if random.IntN(10) == 0 {
				for _, in := range incoming {
					respond(t, in)
				}
				p.compare(t, "an answer")
				begin()
			}
			protocol := []string{"api", "database"}[random.IntN(2)]
			key := protocol + strconv.Itoa(random.IntN(2))
			s := streams[key]
			if s == nil || s.dead {
				s = p.stream(t, addressOf[protocol])
				streams[key] = s
				if protocol == "database" {
					p.write(t, s, guardtest.LoginPacket("shop"))
				}
			}
			unit := units[protocol][random.IntN(len(units[protocol]))]
			for len(unit) > 0 {
				n := 1 + random.IntN(len(unit))
				p.write(t, s, unit[:n])
				unit = unit[n:]
			}
		}
	}
}
