package guard

import (
	"net/netip"
	"slices"
	"strings"

	"kalium.dev/kalium/runtime/internal/policy"
)

// dnsPort is answered by the guard itself and reached by nobody.
const dnsPort = 53

// Connect judges a TCP connection to an address outside of the sandbox. Denied: no packet may go there. Otherwise the
// returned stream judges what is sent.
func (g *Guard) Connect(to netip.AddrPort) (*Outgoing, Outcome) {
	began := g.clock()
	g.stir()
	s := g.stand()
	if s.off() {
		g.enter(&s)
		return newMarked(g), Marked
	}
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	what := subject{kind: "connect", text: "connect " + to.String()}
	reason := s.refusal
	var peers []policy.Peer
	if reason == "" {
		if peers = g.peersAt(s.policy, to); len(peers) == 0 {
			reason = policy.ReasonUnknownPeer
		} else if !g.rate.take(began, sandboxBurst, sandboxPerSecond) {
			reason = policy.ReasonRateBound
		}
	}
	if reason != "" {
		outcome := g.refuse(s, what, reason, began)
		if outcome == Denied {
			return nil, Denied
		}
		if !g.enter(&s) {
			return nil, g.crowded(s, what, began)
		}
		return newMarked(g), outcome
	}
	if !g.enter(&s) {
		return nil, g.crowded(s, what, began)
	}
	return newOutgoing(g, peers, s.function.Terminate), Allowed
}

// peersAt lists the peers of the policy that have the address and port, by name.
func (g *Guard) peersAt(p *policy.Policy, to netip.AddrPort) []policy.Peer {
	if to.Port() == dnsPort {
		return nil
	}
	var peers []policy.Peer
	for _, peer := range p.Peers {
		if peer.Port == to.Port() && slices.Contains(g.addresses(peer.Host, true), to.Addr()) {
			peers = append(peers, peer)
		}
	}
	slices.SortFunc(peers, func(a, b policy.Peer) int { return strings.Compare(a.Name, b.Name) })
	return peers
}

// Datagram judges a datagram to an address outside of the sandbox. No protocol of a policy uses datagrams, so only audit
// lets one pass.
func (g *Guard) Datagram(to netip.AddrPort) Outcome {
	began := g.clock()
	g.stir()
	s := g.stand()
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	reason := s.refusal
	if reason == "" {
		reason = policy.ReasonUnknownPeer
		if len(g.peersAt(s.policy, to)) > 0 {
			reason = policy.ReasonUnknownProtocol
		}
	}
	return g.refuse(s, subject{kind: "connect", text: "connect " + to.String() + " (datagram)"}, reason, began)
}

// Associate judges connect(2) on a datagram socket, which sends nothing. Resolvers do it with each address that they got
// in order to sort them, whatever the port; so the address alone decides, and what is sent is judged by Datagram.
func (g *Guard) Associate(to netip.AddrPort) Outcome {
	began := g.clock()
	s := g.stand()
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	reason := s.refusal
	if reason == "" {
		if to.Port() == dnsPort {
			return Allowed
		}
		for _, peer := range s.policy.Peers {
			if slices.Contains(g.addresses(peer.Host, true), to.Addr()) {
				return Allowed
			}
		}
		reason = policy.ReasonUnknownPeer
	}
	return g.refuse(s, subject{kind: "connect", text: "connect " + to.String() + " (datagram)"}, reason, began)
}

// DatagramFrom judges a datagram that arrived from outside of the sandbox. Only invocations come from there.
func (g *Guard) DatagramFrom(from netip.AddrPort) Outcome {
	what := subject{kind: "incoming", text: "incoming " + netip.AddrPortFrom(from.Addr().Unmap(), from.Port()).String() + " (datagram)"}
	s := g.stand()
	reason := s.refusal
	if reason == "" {
		reason = policy.ReasonIncomingNotDeclared
	}
	return g.refuse(s, what, reason, g.clock())
}
