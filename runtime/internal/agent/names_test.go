package agent

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// answers is a resolver that says what the test sets.
type answers struct {
	mu    sync.Mutex
	hosts map[string][]string
}

func (a *answers) set(host string, addresses ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hosts[host] = addresses
}

func (a *answers) lookup(_ context.Context, host string) ([]netip.Addr, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	texts, known := a.hosts[host]
	if !known {
		return nil, errors.New("no such host")
	}
	var out []netip.Addr
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out, nil
}

func newTestNames(t *testing.T) (*names, *answers) {
	a := &answers{hosts: map[string][]string{}}
	n := newNames(map[string][]string{"gateway": {"10.137.0.1"}}, a.lookup, newLogger(&syncBuffer{}), func() {})
	n.want([]string{"gateway", "shop.example", "10.9.9.9", "9.9.9.9", "10.137.0.1"})
	return n, a
}

func (n *names) one(host string) []string { return n.of([]string{host})[host] }

func TestFixedNamesAreNeverLookedUp(t *testing.T) {
	n, a := newTestNames(t)
	a.set("gateway", "8.8.8.8")
	a.set("9.9.9.9", "8.8.8.8")

	n.refresh(t.Context())

	if want := map[string][]string{"gateway": {"10.137.0.1"}, "9.9.9.9": {"9.9.9.9"}}; !reflect.DeepEqual(n.of([]string{"gateway", "9.9.9.9"}), want) {
		t.Errorf("%v", n.of([]string{"gateway", "9.9.9.9"}))
	}
}

func TestAPolicyAloneDoesNotLeadToAPrivateAddress(t *testing.T) {
	n, a := newTestNames(t)
	a.set("10.9.9.9", "10.9.9.9")
	n.refresh(t.Context())

	for host, want := range map[string][]string{
		"10.9.9.9": nil, "127.0.0.1": nil, "169.254.169.254": nil, "::ffff:10.9.9.9": nil,
		"10.137.0.1": {"10.137.0.1"}, // the configuration's, by another name
	} {
		if got := n.one(host); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v", host, got)
		}
	}
}

func TestANameThatIsNotListedIsNotLookedUp(t *testing.T) {
	n, a := newTestNames(t)
	a.set("other.example", "8.8.8.8")

	n.refresh(t.Context())

	if got := n.one("other.example"); got != nil {
		t.Errorf("%v", got)
	}
}

func TestAddressesAreSortedAndChangesAreSeen(t *testing.T) {
	n, a := newTestNames(t)
	a.set("shop.example", "8.8.8.8", "1.1.1.1", "8.8.8.8", "2606:4700::1111")

	first := n.refresh(t.Context())
	again := n.refresh(t.Context())
	got := n.one("shop.example")
	a.set("shop.example", "8.8.8.8")
	changed := n.refresh(t.Context())

	if !first || again || !changed || !reflect.DeepEqual(got, []string{"1.1.1.1", "8.8.8.8"}) {
		t.Errorf("changed %t, %t, %t; %v", first, again, changed, got)
	}
}

func TestAnAddressThatIsNotPublicRefusesTheWholeAnswer(t *testing.T) {
	for _, private := range []string{
		"10.0.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1",
		"255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.0.1", "192.0.2.1", "203.0.113.9", "198.51.100.1", "::ffff:10.0.0.1",
	} {
		n, a := newTestNames(t)
		a.set("shop.example", "8.8.8.8", private)

		n.refresh(t.Context())

		if got := n.one("shop.example"); len(got) != 0 {
			t.Errorf("%s: %v", private, got)
		}
	}
}

func TestAPrivateAnswerTakesTheOldOneAway(t *testing.T) {
	n, a := newTestNames(t)
	a.set("shop.example", "8.8.8.8")
	n.refresh(t.Context())
	a.set("shop.example", "10.0.0.1")

	changed := n.refresh(t.Context())

	if got := n.one("shop.example"); !changed || len(got) != 0 {
		t.Errorf("%t, %v", changed, got)
	}
}

func TestAnAnswerOutlivesFailingLookupsForABoundedTime(t *testing.T) {
	n, a := newTestNames(t)
	now := time.Now()
	n.now = func() time.Time { return now }
	a.set("shop.example", "8.8.8.8")
	n.refresh(t.Context())
	a.mu.Lock()
	delete(a.hosts, "shop.example")
	a.mu.Unlock()

	now = now.Add(lookupKeep)
	if changed := n.refresh(t.Context()); changed || len(n.one("shop.example")) != 1 {
		t.Errorf("within the time: %t, %v", changed, n.one("shop.example"))
	}
	now = now.Add(time.Second)
	if changed := n.refresh(t.Context()); !changed || len(n.one("shop.example")) != 0 {
		t.Errorf("after it: %t, %v", changed, n.one("shop.example"))
	}
}

func TestAddressesOfANameAreBounded(t *testing.T) {
	n, a := newTestNames(t)
	var many []string
	for i := range addressesMax + 5 {
		many = append(many, netip.AddrFrom4([4]byte{8, 8, 8, byte(i)}).String())
	}
	a.set("shop.example", many...)

	n.refresh(t.Context())

	if got := n.one("shop.example"); len(got) != addressesMax {
		t.Errorf("%d addresses", len(got))
	}
}

func TestALookupHasADeadline(t *testing.T) {
	n, _ := newTestNames(t)
	var left time.Duration
	n.lookup = func(ctx context.Context, _ string) ([]netip.Addr, error) {
		deadline, _ := ctx.Deadline()
		left = time.Until(deadline)
		return nil, context.DeadlineExceeded
	}

	n.refresh(t.Context())

	if left <= 0 || left > lookupTimeout {
		t.Errorf("%v are left", left)
	}
}

func TestAChangedAddressReachesTheGuards(t *testing.T) {
	s := newSite(t)
	a := &answers{hosts: map[string][]string{}}
	a.set("shop.example", "8.8.8.8")
	s.resolve = a.lookup
	s.startConnected()
	g := s.guard("c1", "pay")

	// The lookup may have ended before the guard came or end after it.
	want := []string{"8.8.8.8"}
	s.until("the guard can learn it", func() bool {
		_ = g.conn.Close()
		other, welcome := s.hello("c1", "shop", "pay")
		g = other
		return reflect.DeepEqual(welcome.Names["shop.example"], want)
	})
	a.set("shop.example", "1.1.1.1")
	s.controller.push(&frame.Policy{App: "shop", Policy: s.sign(compiled("shop", 2))}) // wakes the lookups

	for {
		_, m := g.receive()
		if names, ok := m.(*frame.Names); ok && reflect.DeepEqual(names.Names["shop.example"], []string{"1.1.1.1"}) {
			break
		}
	}
}
