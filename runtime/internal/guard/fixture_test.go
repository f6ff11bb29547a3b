package guard

import (
	"net/netip"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

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
