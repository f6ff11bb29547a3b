package guard

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

// patience bounds every wait of these tests. A test that passes never needs it.
const patience = 30 * time.Second

var client = netip.MustParseAddrPort(guardtest.HostAddress + ":40000")

var testIdentity = Identity{Container: "0123456789abcdef0123", App: "shop", Function: "buyer"}

func newGuard(t testing.TB, mode string) (*Guard, *guardtest.Controller) {
	t.Helper()
	c := guardtest.NewController()
	g, err := New(testIdentity, guardtest.PublicKey, guardtest.Welcome(t, mode), c)
	if err != nil {
		t.Fatal(err)
	}
	return g, c
}

// invoked is a guard with a released request.
func invoked(t testing.TB, mode string) (*Guard, *guardtest.Controller, *Incoming) {
	t.Helper()
	g, c := newGuard(t, mode)
	in, outcome := g.Accept(8080, client)
	if outcome != Allowed {
		t.Fatal("the connection was not accepted")
	}
	if a := in.Admit([]byte(postRequest), nil); a.Release == nil {
		t.Fatalf("the request was not released: %+v", a)
	}
	return g, c, in
}

const postRequest = "POST / HTTP/1.1\r\nHost: f\r\nContent-Length: 2\r\n\r\n"

func connect(t testing.TB, g *Guard, to string) *Outgoing {
	t.Helper()
	out, outcome := g.Connect(netip.MustParseAddrPort(to))
	if outcome == Denied {
		t.Fatalf("connect %s was denied", to)
	}
	return out
}

func request(line, host string, more ...string) string {
	return line + " HTTP/1.1\r\nHost: " + host + "\r\n" + strings.Join(more, "") + "\r\n"
}

// edited is a guard with parts of its policy replaced.
func edited(t testing.TB, mode string, pairs ...string) (*Guard, *guardtest.Controller) {
	t.Helper()
	c := guardtest.NewController()
	g, err := New(testIdentity, guardtest.PublicKey, guardtest.WelcomeEdited(t, mode, pairs...), c)
	if err != nil {
		t.Fatal(err)
	}
	return g, c
}

// failDeny is what the policy says of app edges that nobody answers for; failing says something else.
const failDeny = `"app_edge":"deny"`

func failing(mode string) string { return `"app_edge":"` + mode + `"` }

// setPolicy brings a newer version.
func setPolicy(t testing.TB, g *Guard, mode, version string, pairs ...string) {
	t.Helper()
	if err := g.SetPolicy("shop", guardtest.Edited(t, mode, version, pairs...)); err != nil {
		t.Fatal(err)
	}
}

var getA = &policy.Message{Kind: policy.KindHTTP, Peer: "api", Method: "GET", Path: "/a"}
var postB = &policy.Message{Kind: policy.KindHTTP, Peer: "api", Method: "POST", Path: "/b"}
var selectItems = &policy.Message{Kind: policy.KindMySQL, Peer: "database", Verb: "select", Read: []string{"items"}}

// judged judges messages in turn and expects the same outcome of each.
func judged(t testing.TB, g *Guard, want Outcome, messages ...*policy.Message) {
	t.Helper()
	for _, m := range messages {
		if outcome, _ := g.judge(nil, m, m.Kind.String()); outcome != want {
			t.Fatalf("%s: outcome %d, want %d", m.Text(), outcome, want)
		}
	}
}

func lastReason(t testing.TB, c *guardtest.Controller, want policy.Reason) {
	t.Helper()
	if r := c.Last(t); r.Reason != string(want) {
		t.Fatalf("verdict %+v, want %s", r, want)
	}
}

const noContentAnswer = "HTTP/1.1 204 No Content\r\n\r\n"
