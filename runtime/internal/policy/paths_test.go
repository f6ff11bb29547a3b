package policy_test

import (
	"fmt"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// TestAPathOfAPolicyIsOneThatTheParserOfRequestsTakes: a character that only one of the two takes would be a line that no
// request can match.
func TestAPathOfAPolicyIsOneThatTheParserOfRequestsTakes(t *testing.T) {
	const document = `{"app":"a","app_cfg":{"f":{"edges":[],"labels":[],"start":[0],"states":1}},"entries":["f"],"format":"kalium-compiled/v3",` +
		`"functions":{"f":{"accept":[0],"edges":[[0,0,0]],"invocation_timeout_ms":1,"max_body":0,"max_inflight":1,"mode":"enforce","quiet_ms":1,` +
		`"retire_ms":1,"reuse":"always","start":[0],"states":1,"symbols":[{"grpc":false,"kind":"http","line":1,"method":"GET","path":%q,` +
		`"peer":"p","query":[],"retries":0,"tail":false,"text":"x","upgrade":false}],"tail_ms":1,"tls":"open"}},"mode":"enforce",` +
		`"on_unavailable":{"app_edge":"deny","deadline_ms":1},"peers":{"p":{"host":"p","port":80,"protocol":"http"}},"source_sha256":"","version":1}`
	for c := range 256 {
		path := "/a" + string([]byte{byte(c)}) + "b"

		_, _, refused := http1.ParseRequest([]byte("GET " + path + " HTTP/1.1\r\nHost: p\r\n\r\n"))
		p, malformed := policy.Parse(fmt.Appendf(nil, document, path))

		// A question mark ends the path and begins a query, which a template has elsewhere.
		if accepted := refused == nil && c != '?'; accepted != (malformed == nil) {
			t.Errorf("byte %#02x: the parser says %v, the policy %v", c, refused, malformed)
		}
		m := &policy.Message{Kind: policy.KindHTTP, Peer: "p", Method: "GET", Path: path}
		if malformed == nil && !p.Functions["f"].Knows(m) {
			t.Errorf("byte %#02x: the line does not match its own path", c)
		}
	}
}
