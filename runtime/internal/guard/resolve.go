package guard

import (
	"strings"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/dns"
)

// ttlSeconds is short, because the agent may learn other addresses at any time, and long enough for a request's work.
const ttlSeconds = 30

// Resolve answers a DNS query that a program sent to whatever address. Nothing leaves: what is known is the agent's list
// of the policy's hosts. nil means that the query is refused.
//
// In every mode an unlisted name does not exist. Audit cannot let it pass, because there is nobody to ask.
func (g *Guard) Resolve(query []byte) []byte {
	began := g.clock()
	s := g.stand()
	question, err := dns.ParseQuery(query)
	what := subject{kind: "name", text: "name " + question.Name, never: true}
	if s.refusal != "" {
		g.refuse(s, what, s.refusal, began)
		return nil
	}
	if err != nil {
		what.text = "name " + err.Error()
		g.refuse(s, what, reasonOf(err), began)
		return nil
	}
	listed, known := false, false
	for _, peer := range s.policy.Peers {
		listed = listed || peer.Host == question.Name
		// A resolver with a search list asks for the listed name with each suffix first.
		known = known || strings.HasPrefix(question.Name, peer.Host+".")
	}
	if listed {
		if addresses := g.addresses(question.Name, false); question.Type == dns.TypeA && question.Class == dns.ClassIN && len(addresses) > 0 {
			return dns.Answer(query, addresses, ttlSeconds)
		}
		return dns.NoData(query)
	}
	if !known && !g.ownName(question.Name) {
		g.refuse(s, what, policy.ReasonNameNotListed, began)
	}
	return dns.NXDomain(query)
}

// ownName tells names that programs look up about themselves when they start: Python's http.server asks for the name
// of its own address. They do not exist either, but a line in the log for each start would hide the real ones.
func (g *Guard) ownName(name string) bool {
	hostname := g.identity.Container
	if len(hostname) > 12 {
		hostname = hostname[:12] // podman's default
	}
	first, _, _ := strings.Cut(name, ".")
	return first == strings.ToLower(hostname) || name == "localhost" ||
		strings.HasSuffix(name, ".in-addr.arpa") || strings.HasSuffix(name, ".ip6.arpa")
}
