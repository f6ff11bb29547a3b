package policy

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// base is a policy whose function f sends an http request and then a statement, in any number of rounds.
const base = `{"app":"shop","app_cfg":{"f":{"edges":[[0,0,0]],` +
	`"labels":[{"asynchronous":false,"callback":"","callee":"f","join":0,"retries":0}],"start":[0],"states":1}},"entries":["f"],"format":"kalium-compiled/v3",` +
	`"functions":{"f":{"accept":[0],"edges":[[0,0,1],[1,1,0]],"invocation_timeout_ms":1000,"max_body":10,"max_inflight":1,"mode":"enforce",` +
	`"quiet_ms":200,"retire_ms":30000,"reuse":"always","start":[0],"states":2,"symbols":[` +
	`{"kind":"http","line":3,"method":"GET","path":"/a/{x}/","peer":"api","query":["p","q"],` +
	`"retries":1,"grpc":false,"upgrade":false,"tail":false,"text":"http GET api /a/{x}/"},` +
	`{"kind":"mysql","line":4,"peer":"db","read":["t"],"tail":false,"text":"mysql select read t","verb":"select","write":[]}],` +
	`"tail_ms":10000,"tls":"open"}},` +
	`"mode":"enforce","on_unavailable":{"app_edge":"deny","deadline_ms":250},` +
	`"peers":{"api":{"host":"api.example","port":80,"protocol":"http"},"db":{"host":"db","port":3306,"protocol":"mysql","schema":"shop"}},` +
	`"source_sha256":"","version":7}`

func parsed(t testing.TB) *Function {
	t.Helper()
	p, err := Parse([]byte(base))
	if err != nil {
		t.Fatal(err)
	}
	return p.Functions["f"]
}

func request(path string, query ...string) *Message {
	return &Message{Kind: KindHTTP, Peer: "api", Method: "GET", Path: path, Query: query}
}

func TestAPolicyIsReadWhole(t *testing.T) {
	p, err := Parse([]byte(base))
	if err != nil {
		t.Fatal(err)
	}
	if p.App != "shop" || p.Version != 7 || p.Mode != ModeEnforce || p.DeadlineMS != 250 || !p.Entries["f"] || len(p.Functions) != 1 {
		t.Errorf("%#v", p)
	}
	if want := (Peer{Name: "db", Host: "db", Port: 3306, Protocol: ProtocolMySQL, Schema: "shop"}); p.Peers["db"] != want {
		t.Errorf("%#v", p.Peers["db"])
	}
	other, err := Parse([]byte(strings.Replace(base, `"version":7`, `"version":8`, 1)))
	if err != nil || other.SHA256 == p.SHA256 || p.SHA256 == [32]byte{} {
		t.Errorf("digests %x and %x, %v", p.SHA256, other.SHA256, err)
	}
}

func TestZeroValuesDeny(t *testing.T) {
	f := parsed(t)
	var nobody *Function
	if v, next := nobody.Step(nil, request("/a/1/")); v.Allowed || v.Reason != ReasonUnknownFunction || next != nil {
		t.Errorf("no function: %#v, %v", v, next)
	}
	if nobody.Start() != nil || nobody.Accepts(f.Start()) || nobody.Knows(request("/a/1/")) {
		t.Error("no function starts, accepts or knows something")
	}
	if v, _ := f.Step(nil, request("/a/1/")); v.Allowed || v.Reason != ReasonOutOfOrder {
		t.Errorf("no cursor: %#v", v)
	}
	for name, m := range map[string]*Message{"no message": nil, "the zero message": {}, "a kind beyond the last": {Kind: KindSMTP + 1}} {
		if v, next := f.Step(f.Start(), m); v.Allowed || v.Reason != ReasonNotInPolicy || !slices.Equal(next, f.Start()) {
			t.Errorf("%s: %#v", name, v)
		}
	}
	if (Verdict{}).Allowed || Reason("").Known() || Mode(0).String() != "invalid" || Kind(0).String() != "other" {
		t.Error("a zero value means something")
	}
	if (&Symbol{}).Matches(&Message{}) || (&Symbol{Kind: KindInvoke}).Matches(&Message{Kind: KindInvoke}) {
		t.Error("a zero symbol matches")
	}
}

func TestADenialLeavesTheCursorAndAnAllowedStepDoesNotChangeTheOldOne(t *testing.T) {
	f := parsed(t)
	start := f.Start()
	before := slices.Clone(start)

	denied, same := f.Step(start, &Message{Kind: KindMySQL, Peer: "db", Verb: "select", Read: []string{"t"}})
	allowed, next := f.Step(start, request("/a/1/", "q"))

	if denied.Allowed || denied.Reason != ReasonOutOfOrder || denied.Line != 4 || !slices.Equal(same, before) {
		t.Errorf("%#v, %v", denied, same)
	}
	if !allowed.Allowed || !slices.Equal(next.States(), []int{1}) || !slices.Equal(start, before) {
		t.Errorf("%#v, %v, %v", allowed, next.States(), start.States())
	}
	if f.Accepts(next) || !f.Accepts(start) {
		t.Error("the end is allowed at the wrong state")
	}
	start.set(1) // a caller that changes its cursor does not change the policy
	if got := f.Start().States(); !slices.Equal(got, []int{0}) {
		t.Errorf("start is %v", got)
	}
}

func TestAPathMatchesItsTemplateOnly(t *testing.T) {
	f := parsed(t)
	for path, want := range map[string]bool{
		"/a/1/": true, "/a/x.y-z/": true, "/a/.../": true, "/a/1": false, "/a//": false, "/a/1/2/": false, "/a/1//": false, "/A/1/": false,
		"/a/./": false, "/a/../": false, "/a/%31/": false, "/a/%2e%2e/": false, "": false, "/": false, "a/1/": false, "/a/1/?": false, "//a/1/": false,
	} {
		if got := f.Knows(request(path)); got != want {
			t.Errorf("%q matches: %t", path, got)
		}
	}
}

func TestQueryKeysAreASubsetOfTheListedOnes(t *testing.T) {
	f := parsed(t)
	for keys, want := range map[string]bool{"": true, "p": true, "q,p": true, "p,q,r": false, "P": false, "pq": false} {
		m := request("/a/1/")
		if keys != "" {
			m.Query = strings.Split(keys, ",")
		}
		if got := f.Knows(m); got != want {
			t.Errorf("%q matches: %t", keys, got)
		}
	}
}

func TestATableMoreOrLessIsAnotherStatement(t *testing.T) {
	f := parsed(t)
	for name, m := range map[string]*Message{
		"another verb":    {Verb: "insert", Read: []string{"t"}},
		"another table":   {Verb: "select", Read: []string{"u"}},
		"a table more":    {Verb: "select", Read: []string{"t", "u"}},
		"no table":        {Verb: "select"},
		"a written table": {Verb: "select", Read: []string{"t"}, Write: []string{"t"}},
		"the other side":  {Verb: "select", Write: []string{"t"}},
		"upper case":      {Verb: "select", Read: []string{"T"}},
	} {
		m.Kind, m.Peer = KindMySQL, "db"
		if f.Knows(m) {
			t.Errorf("%s matches", name)
		}
	}
	if f.Knows(&Message{Kind: KindMySQL, Peer: "api", Verb: "select", Read: []string{"t"}}) {
		t.Error("the statement matches at another peer")
	}
}

// wide is a function with many states: state i goes to every state j > i by symbol j%symbols.
func wide(t *testing.T, states, symbols int) *Function {
	t.Helper()
	var list []string
	for i := range symbols {
		list = append(list, fmt.Sprintf(`{"kind":"mysql","line":%d,"peer":"db","read":["t%04d"],"tail":false,"text":"s%d","verb":"select","write":[]}`, i+1, i, i))
	}
	var edges []string
	for i := range states {
		for j := i + 1; j < states; j++ {
			edges = append(edges, fmt.Sprintf("[%d,%d,%d]", i, j%symbols, j))
		}
	}
	slices.SortFunc(edges, func(a, b string) int {
		var x, y [3]int64
		_, _ = fmt.Sscanf(a, "[%d,%d,%d]", &x[0], &x[1], &x[2])
		_, _ = fmt.Sscanf(b, "[%d,%d,%d]", &y[0], &y[1], &y[2])
		if rising(x, y) {
			return -1
		}
		return 1
	})
	text := strings.Replace(base, `"edges":[[0,0,1],[1,1,0]]`, `"edges":[`+strings.Join(edges, ",")+`]`, 1)
	text = strings.Replace(text, `"states":2`, fmt.Sprintf(`"states":%d`, states), 1)
	begin := strings.Index(text, `"symbols":[`) + len(`"symbols":[`)
	end := strings.Index(text, `],"tail_ms"`)
	p, err := Parse([]byte(text[:begin] + strings.Join(list, ",") + text[end:]))
	if err != nil {
		t.Fatal(err)
	}
	return p.Functions["f"]
}

// TestStepAgreesWithASlowExecutor compares with the definition of a nondeterministic automaton, on random messages.
func TestStepAgreesWithASlowExecutor(t *testing.T) {
	const states, symbols = 130, 7
	f := wide(t, states, symbols)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		cursor := f.Start()
		slow := map[int]bool{0: true}
		for range 12 {
			symbol := random.IntN(symbols)
			next := map[int]bool{}
			for i := range slow {
				for j := i + 1; j < states; j++ {
					if j%symbols == symbol {
						next[j] = true
					}
				}
			}
			verdict, after := f.Step(cursor, &Message{Kind: KindMySQL, Peer: "db", Verb: "select", Read: []string{fmt.Sprintf("t%04d", symbol)}})
			if verdict.Allowed != (len(next) > 0) {
				t.Fatalf("allowed %t, slow %v", verdict.Allowed, next)
			}
			if verdict.Allowed {
				slow = next
			}
			var want []int
			for i := range slow {
				want = append(want, i)
			}
			slices.Sort(want)
			if !slices.Equal(after.States(), want) || !slices.Equal(verdict.States, want) {
				t.Fatalf("states %v, slow %v", after.States(), want)
			}
			cursor = after
		}
	}
}

func TestTheCostOfAStepDoesNotDependOnThePathBehindIt(t *testing.T) {
	f := parsed(t)
	a, b := request("/a/1/"), &Message{Kind: KindMySQL, Peer: "db", Verb: "select", Read: []string{"t"}}
	allocations := func(cursor Cursor) float64 {
		return testing.AllocsPerRun(100, func() { f.Step(cursor, a) })
	}
	first, cursor := allocations(f.Start()), f.Start()
	for range 1000 {
		for _, m := range []*Message{a, b} {
			var v Verdict
			if v, cursor = f.Step(cursor, m); !v.Allowed {
				t.Fatalf("%#v", v)
			}
		}
	}
	if last := allocations(cursor); last != first || len(cursor) != 1 {
		t.Errorf("%v allocations in step 1, %v in step 2001, a cursor of %d words", first, last, len(cursor))
	}
}

// around is a policy whose function f sends mails around its answer: a mail in the body, then one in the tail, and others
// at its startup; g has a mode of its own.
const around = `{"app":"shop","app_cfg":{"f":{"edges":[],"labels":[],"start":[0],"states":1},"g":{"edges":[],"labels":[],"start":[0],"states":1}},"entries":["f","g"],` +
	`"format":"kalium-compiled/v3","functions":{"f":{"accept":[1,2],"edges":[[0,0,1],[1,1,2]],"invocation_timeout_ms":1000,"max_body":10,` +
	`"max_inflight":4,"mode":"audit","quiet_ms":2,"retire_ms":3,"reuse":"never","start":[0],"states":3,"symbols":[` +
	`{"from":"f@shop.example","kind":"smtp","line":3,"peer":"mail","tail":false,"text":"in the body","to":["a@x.example","b@x.example"]},` +
	`{"from":"","kind":"smtp","line":4,"peer":"mail","tail":true,"text":"in the tail","to":[]}],"tail_ms":1,"tls":"terminate",` +
	`"startup":{"accept":[1],"edges":[[0,0,1]],"start":[0],"states":2,"symbols":[` +
	`{"from":"","kind":"smtp","line":5,"peer":"mail","tail":false,"text":"at startup","to":[]}]}},` +
	`"g":{"accept":[0],"edges":[],"invocation_timeout_ms":1000,"max_body":10,"max_inflight":1,"mode":"off","quiet_ms":200,"retire_ms":30000,` +
	`"reuse":"always","start":[0],"states":1,"symbols":[],"tail_ms":10000,"tls":"open"}},"mode":"enforce",` +
	`"on_unavailable":{"app_edge":"deny","deadline_ms":250},"peers":{"mail":{"host":"mail","port":25,"protocol":"smtp"}},"source_sha256":"","version":7}`

func parsedAround(t testing.TB) *Policy {
	t.Helper()
	p, err := Parse([]byte(around))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestTheSettingsOfAFunctionAreRead(t *testing.T) {
	p := parsedAround(t)
	f, g := p.Functions["f"], p.Functions["g"]
	if !f.Terminate || f.TailMS != 1 || f.QuietMS != 2 || f.RetireMS != 3 || f.MaxInflight != 4 || !f.ReuseNever || f.Startup == nil {
		t.Errorf("%#v", f)
	}
	if g.Terminate || g.TailMS != 10_000 || g.QuietMS != 200 || g.RetireMS != 30_000 || g.MaxInflight != 1 || g.ReuseNever || g.Startup != nil {
		t.Errorf("%#v", g)
	}
}

func TestTheModeIsThatOfTheFunction(t *testing.T) {
	p := parsedAround(t)
	for function, want := range map[string]Mode{"f": ModeAudit, "g": ModeOff, "h": ModeInvalid, "": ModeInvalid} {
		if got := p.ModeOf(function); got != want {
			t.Errorf("%q is in mode %v", function, got)
		}
	}
	if p.Mode != ModeEnforce || (*Policy)(nil).ModeOf("f") != ModeInvalid {
		t.Error("the policy's own mode, or that of none")
	}
}

func TestAfterTheAnswerNothingButTheTailIsLeft(t *testing.T) {
	f := parsedAround(t).Functions["f"]
	body := &Message{Kind: KindSMTP, Peer: "mail", From: "f@shop.example", To: []string{"b@x.example"}}
	tail := &Message{Kind: KindSMTP, Peer: "mail", To: []string{"c@x.example"}}

	verdict, cursor := f.StepTail(f.Start(), body)
	if verdict.Allowed || verdict.Reason != ReasonOutOfOrder || verdict.Line != 3 || len(verdict.Expected) != 0 || !slices.Equal(cursor, f.Start()) {
		t.Errorf("the body after the answer: %#v, %v", verdict, cursor)
	}
	if verdict, _ = f.StepTail(f.Start(), tail); verdict.Allowed {
		t.Errorf("the tail of a body that may not end: %#v", verdict)
	}
	if verdict, cursor = f.Step(f.Start(), body); !verdict.Allowed || !f.Accepts(cursor) {
		t.Fatalf("the body: %#v", verdict)
	}
	if verdict, _ := f.Step(cursor, tail); !verdict.Allowed || verdict.Line != 4 {
		t.Errorf("the tail before the answer: %#v", verdict)
	}
	verdict, cursor = f.StepTail(cursor, tail)
	if !verdict.Allowed || !slices.Equal(verdict.States, []int{2}) || !f.Accepts(cursor) {
		t.Errorf("the tail after it: %#v", verdict)
	}
	if verdict, _ = f.StepTail(cursor, tail); verdict.Allowed {
		t.Errorf("the tail again: %#v", verdict)
	}
	if verdict, cursor = f.Startup.Step(f.Startup.Start(), tail); !verdict.Allowed || verdict.Line != 5 || !f.Startup.Accepts(cursor) {
		t.Errorf("at startup: %#v", verdict)
	}
}

func TestAMailMatchesBySenderAndRecipients(t *testing.T) {
	symbols := parsedAround(t).Functions["f"].Symbols
	for name, c := range map[string]struct {
		m           Message
		named, open bool
	}{
		"one of the recipients":  {Message{From: "f@shop.example", To: []string{"a@x.example"}}, true, true},
		"both, the other way":    {Message{From: "f@shop.example", To: []string{"b@x.example", "a@x.example"}}, true, true},
		"one more":               {Message{From: "f@shop.example", To: []string{"a@x.example", "c@x.example"}}, false, true},
		"another sender":         {Message{From: "g@shop.example", To: []string{"a@x.example"}}, false, true},
		"the null reverse-path":  {Message{To: []string{"a@x.example"}}, false, true},
		"no recipient as yet":    {Message{From: "f@shop.example"}, true, true},
		"a peer of another name": {Message{Peer: "relay", From: "f@shop.example", To: []string{"a@x.example"}}, false, false},
	} {
		c.m.Kind = KindSMTP
		if c.m.Peer == "" {
			c.m.Peer = "mail"
		}
		if named, open := symbols[0].Matches(&c.m), symbols[1].Matches(&c.m); named != c.named || open != c.open {
			t.Errorf("%s: %t, %t", name, named, open)
		}
	}
}

func TestARequestAndItsUpgradeAreTwoMessages(t *testing.T) {
	for _, upgrade := range []bool{false, true} {
		for _, grpc := range []bool{false, true} {
			s := Symbol{Kind: KindHTTPS, Method: "GET", Upgrade: upgrade, GRPC: grpc, segments: []segment{{}}}
			for _, m := range []*Message{{}, {Upgrade: true}, {GRPC: true}, {Upgrade: true, GRPC: true}} {
				m.Kind, m.Method, m.Path = KindHTTPS, "GET", "/"
				if got := s.Matches(m); got != (m.Upgrade == upgrade && m.GRPC == grpc) {
					t.Errorf("upgrade %t, gRPC %t: %q matches: %t", upgrade, grpc, m.Text(), got)
				}
			}
		}
	}
}

func TestTheSameFunctionThroughAnotherGatewayIsAnotherMessage(t *testing.T) {
	s := Symbol{Kind: KindInvoke, Peer: "gateway", Callee: "f"}
	if !s.Matches(&Message{Kind: KindInvoke, Peer: "gateway", Callee: "f"}) || s.Matches(&Message{Kind: KindInvoke, Peer: "other", Callee: "f"}) ||
		s.Matches(&Message{Kind: KindInvoke, Callee: "f"}) {
		t.Error("the peer does not count")
	}
}

// TestStepIntoIsStep compares both on random walks, with the cursors of one walk in two pieces of memory.
func TestStepIntoIsStep(t *testing.T) {
	const states, symbols = 130, 5
	f := wide(t, states, symbols)
	random := rand.New(rand.NewPCG(1, 2))
	spare, cursor := Cursor(nil), f.Start()
	for range 400 {
		m := &Message{Kind: KindMySQL, Peer: "db", Verb: "select", Read: []string{fmt.Sprintf("t%04d", random.IntN(symbols+1))}}
		want, next := f.Step(cursor, m)
		before := slices.Clone(cursor)

		got, after := f.StepInto(spare, cursor, m)

		if !slices.Equal(cursor, before) || !slices.Equal(after, next) {
			t.Fatalf("%v became %v; the next cursor is %v, not %v", before, cursor, after, next)
		}
		if got.Allowed {
			if got.States != nil {
				t.Fatalf("states %v", got.States)
			}
			got.States = after.AppendStates(nil)
			spare, cursor = cursor, after
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("%#v, want %#v", got, want)
		}
		if !want.Allowed && random.IntN(3) == 0 {
			spare, cursor = nil, f.Start()
		}
	}
	if verdict, next := (*Function)(nil).StepInto(nil, nil, request("/")); verdict.Allowed || verdict.Reason != ReasonUnknownFunction || next != nil {
		t.Errorf("no function: %#v, %v", verdict, next)
	}
}

// round is a way through base's f that ends where it began.
var round = []*Message{request("/a/1/", "q"), {Kind: KindMySQL, Peer: "db", Verb: "select", Read: []string{"t"}}}

func TestAnAllowedStepIntoDoesNotAllocate(t *testing.T) {
	f := parsed(t)
	spare, cursor := newCursor(f.States), f.Start()
	if got := testing.AllocsPerRun(100, func() {
		for _, m := range round {
			verdict, next := f.StepInto(spare, cursor, m)
			if !verdict.Allowed {
				t.Fatalf("%#v", verdict)
			}
			spare, cursor = cursor, next
		}
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

// BenchmarkStep is the local decision alone.
func BenchmarkStep(b *testing.B) {
	f := parsed(b)
	b.Run("allowed", func(b *testing.B) {
		b.ReportAllocs()
		spare, cursor := newCursor(f.States), f.Start()
		for i := range b.N {
			verdict, next := f.StepInto(spare, cursor, round[i%len(round)])
			if !verdict.Allowed {
				b.Fatalf("%#v", verdict)
			}
			spare, cursor = cursor, next
		}
	})
	b.Run("denied", func(b *testing.B) {
		b.ReportAllocs()
		cursor, m := f.Start(), request("/b")
		for range b.N {
			if verdict, _ := f.StepInto(nil, cursor, m); verdict.Allowed {
				b.Fatalf("%#v", verdict)
			}
		}
	})
}

func TestTextIsBoundedAndPrintable(t *testing.T) {
	for name, c := range map[string]struct {
		m    Message
		want string
	}{
		"http":               {*request("/a/1/", "p", "q"), "http GET api /a/1/?p&q"},
		"invoke":             {Message{Kind: KindInvoke, Peer: "gateway", Callee: "f"}, "invoke f"},
		"mysql":              {Message{Kind: KindMySQL, Verb: "insert", Read: []string{"a", "b"}, Write: []string{"c"}}, "mysql insert read a,b write c"},
		"websocket":          {Message{Kind: KindHTTP, Method: "GET", Peer: "api", Path: "/", Upgrade: true}, "http GET api / websocket"},
		"grpc":               {Message{Kind: KindHTTPS, Method: "POST", Peer: "api", Path: "/a", GRPC: true}, "https POST api /a grpc"},
		"smtp":               {Message{Kind: KindSMTP, Peer: "mail", From: "a@b", To: []string{"c@d", "e@f"}}, "smtp mail mail from a@b to c@d,e@f"},
		"an empty envelope":  {Message{Kind: KindSMTP, Peer: "mail"}, "smtp mail mail"},
		"other":              {Message{Peer: "x"}, "other x"},
		"a terminal's codes": {Message{Kind: KindInvoke, Callee: "a\x1b[2J\nb"}, "invoke a?[2J?b"},
		"beyond ASCII":       {Message{Kind: KindInvoke, Callee: "é\xff"}, "invoke ??"},
		"too long":           {Message{Kind: KindInvoke, Callee: strings.Repeat("é", 400)}, "invoke " + strings.Repeat("?", 290) + "..."},
	} {
		if got := c.m.Text(); got != c.want || len(got) > MessageTextMax {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestPrintableKeepsItsBound(t *testing.T) {
	for _, text := range []string{"", "a", "abcdef", "ééé", "\x00\x01\x02\x03", strings.Repeat("x", 100)} {
		for max := range 8 {
			if got := Printable(text, max); len(got) > max || len(text) <= max && strings.Trim(text, "abcdefx") == "" && got != text {
				t.Errorf("Printable(%q, %d) is %q", text, max, got)
			}
		}
	}
}

func TestReasonsAreClosed(t *testing.T) {
	seen := map[Reason]bool{}
	for _, r := range Reasons() {
		if !r.Known() || seen[r] {
			t.Errorf("%q is unknown to itself or there twice", r)
		}
		seen[r] = true
	}
	Reasons()[0] = "changed"
	if Reason("changed").Known() || Reasons()[0] != ReasonAllowed {
		t.Error("the set can be changed from outside")
	}
}

func signed(t testing.TB, key ed25519.PrivateKey, compiled string) map[string]string {
	t.Helper()
	public := key.Public().(ed25519.PublicKey)
	return map[string]string{
		"format": SignedFormat, "key_id": KeyID(public), "policy": base64.StdEncoding.EncodeToString([]byte(compiled)),
		"signature": base64.StdEncoding.EncodeToString(ed25519.Sign(key, []byte(SignedFormat+"\n"+compiled))),
	}
}

func marshal(t testing.TB, envelope map[string]string) []byte {
	t.Helper()
	data, err := json.Marshal(envelope)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestOnlyWhatTheOperatorSignedIsAPolicy(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	stranger, strange, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	good := marshal(t, signed(t, private, base))
	if p, err := Verify(good, public); err != nil || p.Version != 7 {
		t.Fatalf("%#v, %v", p, err)
	}
	change := func(name string, to func(string) string) []byte {
		envelope := signed(t, private, base)
		envelope[name] = to(envelope[name])
		return marshal(t, envelope)
	}
	plain := base64.StdEncoding.EncodeToString(ed25519.Sign(private, []byte(base)))
	for name, c := range map[string]struct {
		envelope []byte
		code     string
	}{
		"a stranger's":                 {marshal(t, signed(t, strange, base)), "policy.signature"},
		"a stranger's under our id":    {change("signature", func(string) string { return signed(t, strange, base)["signature"] }), "policy.signature"},
		"another policy":               {change("policy", func(string) string { return base64.StdEncoding.EncodeToString([]byte(base + " ")) }), "policy.signature"},
		"a signature without the name": {change("signature", func(string) string { return plain }), "policy.signature"},
		"a signature cut short":        {change("signature", func(s string) string { return s[:80] }), "policy.signature"},
		"no signature":                 {change("signature", func(string) string { return "" }), "policy.signature"},
		"another format":               {change("format", func(string) string { return "kalium-signed/v2" }), "policy.malformed"},
		"a line end in the base64":     {change("policy", func(s string) string { return s[:4] + "\n" + s[4:] }), "policy.malformed"},
		"base64 without its padding":   {change("signature", func(s string) string { return strings.TrimRight(s, "=") }), "policy.malformed"},
		"another alphabet":             {change("signature", func(s string) string { return "_" + s[1:] }), "policy.malformed"},
		"a field more":                 {bytes.Replace(good, []byte("{"), []byte(`{"more":"",`), 1), "policy.malformed"},
		"a field twice":                {bytes.Replace(good, []byte("{"), []byte(`{"format":"kalium-signed/v1",`), 1), "policy.malformed"},
		"bytes behind it":              {append(slices.Clone(good), " {}"...), "policy.malformed"},
		"nothing":                      {nil, "policy.malformed"},
		"too much":                     {append(slices.Clone(good), bytes.Repeat([]byte(" "), envelopeBytesMax)...), "policy.malformed"},
		"a signed non-policy":          {marshal(t, signed(t, private, "{}")), "policy.malformed"},
	} {
		p, err := Verify(c.envelope, public)

		var known *Error
		if p != nil || !errors.As(err, &known) || known.Code != c.code || !strings.Contains(err.Error(), "\nnext: ") {
			t.Errorf("%s: %#v, %v", name, p, err)
		}
	}
	if _, err := Verify(good, stranger); err == nil {
		t.Error("another key opens it")
	}
	if _, err := Verify(good, nil); err == nil {
		t.Error("no key opens it")
	}
}

func TestBytesThatAreNotUTF8AreRefused(t *testing.T) {
	text := strings.Replace(base, `"source_sha256":""`, "\"source_sha256\":\"\xff\"", 1)

	_, err := Parse([]byte(text))

	if err == nil || !strings.Contains(err.Error(), "not UTF-8") {
		t.Errorf("%v", err)
	}
}

// FuzzParse: whatever comes in, the only error is *Error, and what is read can be executed.
func FuzzParse(f *testing.F) {
	f.Add([]byte(base))
	f.Add([]byte(around))
	for _, v := range policyVectors(f) {
		f.Add([]byte(v.Compiled))
	}
	var refused []refusedVector
	readVector(f, "refused.json", &refused)
	for _, v := range refused {
		f.Add([]byte(v.Compiled))
	}
	messages := []*Message{
		request("/a/1/"), {Kind: KindHTTPS, Peer: "images", Method: "GET", Path: "/a"}, {Kind: KindInvoke, Callee: "f"},
		{Kind: KindMySQL, Peer: "db", Verb: "select", Read: []string{"t"}}, {Kind: KindSMTP, Peer: "mail", From: "a@b", To: []string{"c@d"}}, {},
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			var known *Error
			if p != nil || !errors.As(err, &known) {
				t.Fatalf("%#v, %v", p, err)
			}
			return
		}
		for name, function := range p.Functions {
			if mode := p.ModeOf(name); mode < ModeOff || mode > ModeEnforce {
				t.Fatalf("mode %v", mode)
			}
			cursor := function.Start()
			for range 3 {
				for _, m := range messages {
					function.Startup.Step(function.Startup.Start(), m)
					if tail, _ := function.StepTail(cursor, m); tail.Allowed && !function.Knows(m) {
						t.Fatalf("%#v", tail)
					}
					verdict, next := function.Step(cursor, m)
					if !verdict.Reason.Known() || verdict.Allowed != (verdict.Reason == ReasonAllowed) || len(verdict.Expected) > ExpectedMax {
						t.Fatalf("%#v", verdict)
					}
					if !verdict.Allowed && !slices.Equal(next, cursor) {
						t.Fatal("a denial moves the cursor")
					}
					cursor = next
				}
			}
			function.Accepts(cursor)
		}
		if again, err := Parse(data); err != nil || !reflect.DeepEqual(again, p) {
			t.Fatal("the same bytes are read differently")
		}
	})
}

// FuzzVerify: no envelope that differs from the operator's opens.
func FuzzVerify(f *testing.F) {
	private := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	good := marshal(f, signed(f, private, base))
	f.Add(good)
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Verify(data, private.Public().(ed25519.PublicKey))
		if err != nil {
			var known *Error
			if p != nil || !errors.As(err, &known) {
				t.Fatalf("%#v, %v", p, err)
			}
			return
		}
		if p.Version != 7 || p.App != "shop" {
			t.Fatalf("opened as %#v", p)
		}
	})
}

func TestEdgesAreKeptWithoutTheirOrder(t *testing.T) {
	text := strings.Replace(base, `"labels":[`, `"labels":[{"barrier":1},`, 1)
	text = strings.Replace(text, `"edges":[[0,0,0]]`, `"edges":[[0,0,0],[0,1,0]]`, 1)
	p, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var none *Policy
	if !p.Edge("f", "f") || !p.Invoked("f") || p.Edge("f", "") || p.Edge("", "f") || p.Invoked("") || none.Edge("f", "f") || none.Invoked("f") {
		t.Error("the edges are not those of the app CFG")
	}

	unused, err := Parse([]byte(strings.Replace(base, `"edges":[[0,0,0]]`, `"edges":[]`, 1)))
	if err != nil || unused.Edge("f", "f") || unused.Invoked("f") {
		t.Errorf("a label that no edge carries is an edge, %v", err)
	}
}

func TestACallbackIsInvokedAndNoEdge(t *testing.T) {
	p := shared(t, "asynchronous")
	for callee, want := range map[string][2]bool{"g": {true, true}, "h": {false, true}, "f": {false, false}} {
		if p.Edge("f", callee) != want[0] || p.Invoked(callee) != want[1] {
			t.Errorf("%s: edge %t, invoked %t", callee, p.Edge("f", callee), p.Invoked(callee))
		}
	}
}

func TestTheFailModeIsThePolicys(t *testing.T) {
	for name, want := range map[string]FailMode{"deny": FailDeny, "last_known": FailLastKnown, "allow": FailAllow} {
		p, err := Parse([]byte(strings.Replace(base, `"app_edge":"deny"`, `"app_edge":"`+name+`"`, 1)))
		if err != nil || p.AppEdge != want || want.String() != name {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
	if FailMode(0) != FailDeny || (FailAllow+1).String() != "deny" {
		t.Error("a mode that is none of them does not deny")
	}
}

// shared is the policy of a vector.
func shared(t testing.TB, name string) *Policy {
	t.Helper()
	var v policyVector
	readVector(t, name+".json", &v)
	p, err := Parse([]byte(v.Compiled))
	if err != nil {
		t.Fatal(err)
	}
	return p
}
