package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
)

// lookup asks the system's resolver for IPv4 addresses.
type lookup func(ctx context.Context, host string) ([]netip.Addr, error)

func systemLookup(ctx context.Context, host string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip4", host)
}

// names knows the addresses of the hosts that policies list. Those of the configuration are fixed. Others are asked of
// the system's resolver again and again, and never lead to a private address: whoever answers for an outside name must
// not be able to point a function at the inside.
type names struct {
	static  map[string][]string
	lookup  lookup
	now     func() time.Time
	log     *slog.Logger
	changed func() // called without locks when an address has changed

	wake chan struct{}

	mu       sync.Mutex
	wanted   map[string]struct{} // guarded by mu; hosts to look up
	resolved map[string]resolved // guarded by mu
}

type resolved struct {
	addresses []string // sorted
	at        time.Time
}

func newNames(static map[string][]string, lookup lookup, log *slog.Logger, changed func()) *names {
	return &names{
		static: static, lookup: lookup, now: time.Now, log: log, changed: changed, wake: make(chan struct{}, 1),
		wanted: map[string]struct{}{}, resolved: map[string]resolved{},
	}
}

// hostsOf lists the hosts of a policy's peers: at most as many as a policy may have peers.
func hostsOf(p *policy.Policy) []string {
	hosts := make([]string, 0, len(p.Peers))
	for _, peer := range p.Peers {
		if !slices.Contains(hosts, peer.Host) {
			hosts = append(hosts, peer.Host)
		}
	}
	return hosts
}

// want sets what has to be looked up: every host that a policy in force lists and that has no fixed address.
func (n *names) want(hosts []string) {
	wanted := map[string]struct{}{}
	for _, host := range hosts {
		if _, fixed := n.fixed(host); !fixed {
			wanted[host] = struct{}{}
		}
	}
	n.mu.Lock()
	n.wanted = wanted
	for host := range n.resolved {
		if _, still := wanted[host]; !still {
			delete(n.resolved, host)
		}
	}
	n.mu.Unlock()
	signal(n.wake)
}

// fixed is a host of the configuration, or one that is an address itself. Such a one is reached when it is public, or when
// the configuration has it as an address of some host: a policy alone cannot lead to the inside.
func (n *names) fixed(host string) ([]string, bool) {
	if addresses, listed := n.static[host]; listed {
		return addresses, true
	}
	address, err := netip.ParseAddr(host)
	if err != nil {
		return nil, false
	}
	if address.Is4() && (public(address) || n.declared(host)) {
		return []string{host}, true
	}
	return nil, true
}

func (n *names) declared(address string) bool {
	for _, addresses := range n.static {
		if slices.Contains(addresses, address) {
			return true
		}
	}
	return false
}

// of returns the addresses of each host; a host that is not resolved yet has none.
func (n *names) of(hosts []string) map[string][]string {
	out := make(map[string][]string, len(hosts))
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, host := range hosts {
		addresses, fixed := n.fixed(host)
		if !fixed {
			addresses = n.resolved[host].addresses
		}
		out[host] = slices.Clone(addresses)
	}
	return out
}

// run looks names up until ctx ends.
func (n *names) run(ctx context.Context) {
	ticker := time.NewTicker(lookupEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-ticker.C:
		}
		if n.refresh(ctx) {
			n.changed()
		}
	}
}

// refresh looks every wanted host up once, a few at a time, and tells whether an address has changed.
func (n *names) refresh(ctx context.Context) bool {
	n.mu.Lock()
	hosts := make([]string, 0, len(n.wanted))
	for host := range n.wanted {
		hosts = append(hosts, host)
	}
	n.mu.Unlock()
	changed := false
	for group := range slices.Chunk(hosts, lookupsAtOnce) {
		answers := make([][]string, len(group))
		errs := make([]error, len(group))
		var wait sync.WaitGroup
		for i, host := range group {
			wait.Go(func() { answers[i], errs[i] = n.ask(ctx, host) })
		}
		wait.Wait()
		for i, host := range group {
			if errs[i] != nil && ctx.Err() == nil {
				n.log.Warn(eventNameFailed, keyHost, host, keyError, errs[i])
			}
			changed = n.keep(host, answers[i], errs[i]) || changed
		}
	}
	return changed
}

var errPrivate = errors.New("an answer holds an address that is not public")

// ask resolves one host. One address that is not public refuses the whole answer.
func (n *names) ask(ctx context.Context, host string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found, err := n.lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	addresses := make([]string, 0, len(found))
	for _, address := range found {
		address = address.Unmap()
		if !address.Is4() {
			continue
		}
		if !public(address) {
			return nil, errPrivate
		}
		addresses = append(addresses, address.String())
	}
	slices.Sort(addresses)
	addresses = slices.Compact(addresses)
	return addresses[:min(len(addresses), addressesMax)], nil
}

// keep stores an answer. While lookups fail the last answer stays for a bounded time.
func (n *names) keep(host string, addresses []string, err error) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, wanted := n.wanted[host]; !wanted {
		return false
	}
	before, known := n.resolved[host]
	if err != nil {
		if !known || errors.Is(err, errPrivate) || n.now().Sub(before.at) > lookupKeep {
			delete(n.resolved, host)
			return len(before.addresses) > 0
		}
		return false
	}
	n.resolved[host] = resolved{addresses: addresses, at: n.now()}
	return !slices.Equal(before.addresses, addresses)
}

// inside lists what is not public beyond what netip tells by itself (IANA, "IPv4 Special-Purpose Address Registry").
var inside = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("192.88.99.0/24"), netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("240.0.0.0/4"),
}

func public(address netip.Addr) bool {
	if !address.IsGlobalUnicast() || address.IsPrivate() {
		return false
	}
	for _, prefix := range inside {
		if prefix.Contains(address) {
			return false
		}
	}
	return true
}
