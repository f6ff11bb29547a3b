package guard

import (
	"crypto/ed25519"
	"net/netip"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/wire/dns"
)

func TestAGuardNeedsAVerifiedPolicyOfItsApp(t *testing.T) {
	type setting struct {
		identity Identity
		key      ed25519.PublicKey
		welcome  *frame.Welcome
	}
	for name, change := range map[string]func(*setting){
		"as it should be": func(*setting) {},
		"another app":     func(s *setting) { s.identity.App = "other" },
		"no identity":     func(s *setting) { s.identity = Identity{} },
		"another key":     func(s *setting) { s.key = make([]byte, ed25519.PublicKeySize) },
		"no key":          func(s *setting) { s.key = nil },
		"a refusal":       func(s *setting) { s.welcome.OK, s.welcome.Reason = false, "unregistered" },
		"a damaged signature": func(s *setting) {
			s.welcome.Policy = []byte(strings.Replace(string(s.welcome.Policy), `"signature":"`, `"signature":"AAAA`, 1))
		},
		"no policy":                func(s *setting) { s.welcome.Policy = nil },
		"a source without a range": func(s *setting) { s.welcome.Sources = []string{"10.137.0.1"} },
		"no port":                  func(s *setting) { s.welcome.Port = 0 },
		"a host without address":   func(s *setting) { s.welcome.Names["gateway"] = []string{"nowhere"} },
	} {
		s := setting{testIdentity, guardtest.PublicKey, guardtest.Welcome(t, "enforce")}
		change(&s)

		_, err := New(s.identity, s.key, s.welcome, guardtest.NewController())

		if (err == nil) != (name == "as it should be") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAFunctionThatThePolicyDoesNotKnowIsDenied(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		c := guardtest.NewController()
		g, err := New(Identity{App: "shop", Function: "stranger"}, guardtest.PublicKey, guardtest.Welcome(t, mode), c)
		if err != nil {
			t.Fatal(err)
		}

		_, outcome := g.Connect(netip.MustParseAddrPort(api))

		if r := c.Last(t); outcome != Denied || r.Reason != "unknown_function" {
			t.Errorf("outcome %d, verdict %+v", outcome, r)
		}
		refusedWith(t, accept(t, g).Admit([]byte(postRequest), nil), "403", "unknown_function")
	}
}

func TestANewerPolicyIsTakenAndABadOneChangesNothing(t *testing.T) {
	g, _ := newGuard(t, "enforce")
	if err := g.SetPolicy("shop", guardtest.Signed(t, "enforce", "2")); err == nil {
		t.Error("an older version was taken")
	}
	if err := g.SetPolicy("shop", guardtest.Signed(t, "audit", "3")[1:]); err == nil {
		t.Error("a damaged policy was taken")
	}
	if err := g.SetPolicy("other", guardtest.Signed(t, "enforce", "4")); err == nil {
		t.Error("a policy of another app was taken")
	}
	if err := g.SetPolicy("shop", guardtest.Signed(t, "enforce", "3")); err != nil {
		t.Errorf("the same policy said again: %v", err)
	}
	if g.force.policy.Version != 3 {
		t.Fatalf("version %d is in force", g.force.policy.Version)
	}

	if err := g.SetPolicy("shop", guardtest.Signed(t, "audit", "4")); err != nil || g.force.policy.Version != 4 {
		t.Errorf("version %d is in force: %v", g.force.policy.Version, err)
	}
}

func TestACallKeepsTheVersionItBeganWith(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	if err := g.SetPolicy("shop", guardtest.Signed(t, "audit", "4")); err != nil {
		t.Fatal(err)
	}

	expect(t, connect(t, g, api), request("POST /b", "api.test:8080"), "", Denied)

	if r := c.Last(t); r.PolicyVersion != 3 || r.Mode != "enforce" {
		t.Errorf("verdict %+v", r)
	}
}

func TestAReplacedAddressStaysValidForAWhile(t *testing.T) {
	g, _ := newGuard(t, "enforce")
	now := time.Now()
	g.now = func() time.Time { return now }
	if err := g.SetNames(map[string][]string{"api.test": {"10.137.0.9"}}); err != nil {
		t.Fatal(err)
	}
	reach := func(to string) bool {
		_, outcome := g.Connect(netip.MustParseAddrPort(to))
		return outcome == Allowed
	}
	if !reach("10.137.0.9:8080") || !reach("10.137.0.1:8080") {
		t.Error("an address is not reached")
	}
	if addresses := g.addresses("api.test", false); len(addresses) != 1 || addresses[0].String() != "10.137.0.9" {
		t.Errorf("the name is answered with %v", addresses)
	}

	now = now.Add(5 * time.Minute)
	g.Renew(60000)
	if !reach("10.137.0.1:8080") {
		t.Error("an address that was given for 30 seconds is not reached five minutes later")
	}
	now = now.Add(31 * time.Second)

	if !reach("10.137.0.9:8080") || reach("10.137.0.1:8080") {
		t.Error("the old address is still valid")
	}
}

// query asks for a name's addresses.
func query(name string, kind byte) []byte {
	b := []byte{0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for _, label := range strings.Split(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0, 0, kind, 0, 1)
}

const rcodeMask = 0x0f

func TestListedNamesAreAnsweredInsideOfTheSandbox(t *testing.T) {
	g, c := newGuard(t, "enforce")

	a, aaaa := g.Resolve(query("Gateway", dns.TypeA)), g.Resolve(query("gateway", dns.TypeAAAA))

	if !strings.HasSuffix(string(a), "\x0a\x89\x00\x01") || a[7] != 1 || a[3]&rcodeMask != 0 {
		t.Errorf("answer %x", a)
	}
	if aaaa[7] != 0 || aaaa[3]&rcodeMask != 0 {
		t.Errorf("answer to AAAA %x", aaaa)
	}
	if len(c.Verdicts()) != 0 {
		t.Errorf("verdicts %+v", c.Verdicts())
	}
}

func TestUnlistedNamesDoNotExistAndAreLogged(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := newGuard(t, mode)

		got := g.Resolve(query("secret.evil.test", dns.TypeA))

		if got[3]&rcodeMask != 3 || got[7] != 0 {
			t.Errorf("answer %x", got)
		}
		if r := c.Last(t); r.Kind != "name" || r.Message != "name secret.evil.test" || r.Allowed || r.Reason != "name_not_listed" || r.Mode != mode {
			t.Errorf("verdict %+v", r)
		}
	}
}

func TestNamesOfTheSearchListAndOfTheSandboxItselfAreNotLogged(t *testing.T) {
	g, c := newGuard(t, "enforce")
	for _, name := range []string{"gateway.dns.podman", "0123456789ab", "0123456789ab.dns.podman", "1.0.137.10.in-addr.arpa"} {
		if got := g.Resolve(query(name, dns.TypeA)); got[3]&rcodeMask != 3 {
			t.Errorf("%s: answer %x", name, got)
		}
	}
	if len(c.Verdicts()) != 0 {
		t.Errorf("verdicts %+v", c.Verdicts())
	}
}

func TestWhatIsNoQueryIsRefused(t *testing.T) {
	g, c := newGuard(t, "enforce")

	if got := g.Resolve([]byte("exfiltrated bytes")); got != nil {
		t.Errorf("answer %x", got)
	}

	if r := c.Last(t); r.Kind != "name" || r.Reason != "malformed" {
		t.Errorf("verdict %+v", r)
	}
}

// Rebinding: whoever answers for a listed name cannot have an open or a later connection judged as another peer's. The
// name of a connection is that of the peer whose pins hold its address, and what is said inside has to name it again.
func TestAnAddressOfTwoNamesIsToldApartByWhatIsSaid(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	if err := g.SetNames(map[string][]string{"api.test": {"10.137.0.7"}, "gateway": {"10.137.0.7"}}); err != nil {
		t.Fatal(err)
	}
	out := connect(t, g, "10.137.0.7:8080")

	expect(t, out, request("GET /a", "elsewhere.test:8080"), "", Denied)

	lastReason(t, c, "unknown_peer")
	if _, outcome := g.Connect(netip.MustParseAddrPort("10.137.0.8:8080")); outcome != Denied {
		t.Error("an address that no name has is reached")
	}
}

func TestOtherTypesOfAListedNameHaveNoData(t *testing.T) {
	g, c := newGuard(t, "enforce")
	for _, kind := range []byte{2, 5, 15, 16, 28, 33, 65, 255} {
		if got := g.Resolve(query("api.test", kind)); got[3]&rcodeMask != 0 || got[7] != 0 {
			t.Errorf("type %d: answer %x", kind, got)
		}
		if got := g.Resolve(query("unlisted.test", kind)); got[3]&rcodeMask != 3 {
			t.Errorf("type %d of an unlisted name: answer %x", kind, got)
		}
	}
	if r := c.Last(t); r.Reason != "name_not_listed" {
		t.Errorf("verdict %+v", r)
	}
}
