package guard

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

const api, database, images = "10.137.0.1:8080", "10.137.0.1:3306", "10.137.0.1:4443"

func expect(t *testing.T, out *Outgoing, write string, wantSent string, want Outcome) {
	t.Helper()
	send, outcome := out.Write([]byte(write))
	if string(send) != wantSent || outcome != want {
		t.Fatalf("writing %q: sent %q and outcome %d, want %q and %d", write, send, outcome, wantSent, want)
	}
}

func TestARequestLeavesAsItWasWritten(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	out := connect(t, g, api)
	m := request("GET /a", "api.test:8080", "X-Any: thing\r\n")

	expect(t, out, m, m, Allowed)

	r := c.Last(t)
	if r.Kind != "http" || !r.Allowed || r.WouldDeny || r.Message != "http GET api /a" || r.Call != guardtest.Call || r.Line != 1 || r.Mode != "enforce" {
		t.Errorf("verdict %+v", r)
	}
}

func TestBytesAreHeldUntilTheirUnitIsWhole(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	out := connect(t, g, api)
	m := request("GET /a", "api.test:8080")
	for i := range len(m) - 1 {
		expect(t, out, m[i:i+1], "", Allowed)
		if n, since := out.Held(); n != i+1 || since.IsZero() {
			t.Fatalf("%d bytes held since %v", n, since)
		}
	}

	expect(t, out, m[len(m)-1:], m, Allowed)

	if n, _ := out.Held(); n != 0 {
		t.Errorf("%d bytes are still held", n)
	}
}

func TestAMessageOutOfOrderIsDeniedAndTheCursorStays(t *testing.T) {
	g, c, _ := invoked(t, "enforce")

	expect(t, connect(t, g, api), request("POST /b", "api.test:8080"), "", Denied)

	r := c.Last(t)
	if r.Allowed || r.Reason != "out_of_order" || len(r.Expected) != 2 || r.Expected[0] != "http GET api /a @line 1" {
		t.Errorf("verdict %+v", r)
	}
	m := request("GET /a", "api.test:8080")
	expect(t, connect(t, g, api), m, m, Allowed)
}

func TestNothingLeavesOnAConnectionAfterADenial(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	out := connect(t, g, api)
	expect(t, out, request("POST /b", "api.test:8080"), "", Denied)

	expect(t, out, request("GET /a", "api.test:8080"), "", Denied)
}

func TestAPipelinedRequestIsJudgedAlone(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	first, second := request("GET /a", "api.test:8080"), request("GET /secret", "api.test:8080")

	expect(t, connect(t, g, api), first+second, first, Denied)
}

func TestABodyFollowsItsHeadUpToItsEnd(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	g.live.cursor = atState(g, 3)
	out := connect(t, g, api)
	head := request("POST /b", "api.test:8080", "Content-Length: 10\r\n")

	expect(t, out, head+"0123", head+"0123", Allowed)
	expect(t, out, "456", "456", Allowed)
	expect(t, out, "789"+request("GET /x", "api.test:8080"), "789", Denied)
}

func TestABodyBeyondTheFunctionsBoundIsDeniedAtItsHead(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	g.live.cursor = atState(g, 3)

	expect(t, connect(t, g, api), request("POST /b", "api.test:8080", "Content-Length: 101\r\n"), "", Denied)

	if r := c.Last(t); r.Reason != "too_large" {
		t.Errorf("verdict %+v", r)
	}
}

func TestAChunkedBodyBeyondTheBoundEndsTheConnection(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	g.live.cursor = atState(g, 3)
	out := connect(t, g, api)
	head := request("POST /b", "api.test:8080", "Transfer-Encoding: chunked\r\n")
	expect(t, out, head, head, Allowed)

	expect(t, out, "65\r\n"+strings.Repeat("x", 101), "", Denied)

	if r := c.Last(t); r.Reason != "too_large" {
		t.Errorf("verdict %+v", r)
	}
}

func TestARequestThatUpgradesItsConnectionIsDenied(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	upgrade := "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

	expect(t, connect(t, g, api), request("GET /a", "api.test:8080", upgrade), "", Denied)

	if r := c.Last(t); r.Reason != "not_in_policy" {
		t.Errorf("verdict %+v", r)
	}
}

func TestTheHostMustBeAPeer(t *testing.T) {
	for _, host := range []string{"10.137.0.1:8080", "api.test", "other.test:8080", "api.test:80"} {
		g, c, _ := invoked(t, "enforce")

		expect(t, connect(t, g, api), request("GET /a", host), "", Denied)

		if r := c.Last(t); r.Reason != "unknown_peer" {
			t.Errorf("host %s: verdict %+v", host, r)
		}
	}
}

func TestBytesThatAreNoProtocolOfThePeerAreDeniedAtOnce(t *testing.T) {
	for _, to := range []string{api, images} {
		g, c, _ := invoked(t, "enforce")

		expect(t, connect(t, g, to), "\x00\x01", "", Denied)

		if r := c.Last(t); r.Reason != "malformed" {
			t.Errorf("%s: verdict %+v", to, r)
		}
	}
}

func TestMessagesOutsideOfAnInvocationAreDenied(t *testing.T) {
	g, c := newGuard(t, "enforce")

	expect(t, connect(t, g, api), request("GET /a", "api.test:8080"), "", Denied)

	if r := c.Last(t); r.Reason != "no_invocation" {
		t.Errorf("verdict %+v", r)
	}
}

func TestAnInvokeIsGrantedByTheControllerAndCarriesTheToken(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	g.live.cursor = atState(g, 2)
	var asked *frame.Invoke
	c.OnInvoke = func(m *frame.Invoke) (*frame.Answer, error) { asked = m; return guardtest.GrantInvoke(m) }

	send, outcome := connect(t, g, api).Write([]byte(request("POST /function/payer", "gateway:8080",
		"X-Kalium-Token: forged\r\nX-Forwarded-For: me\r\nX-Call-Id: label\r\nContent-Length: 2\r\n") + "{}"))

	want := "POST /function/payer HTTP/1.1\r\nHost: gateway:8080\r\nX-Call-Id: label\r\nContent-Length: 2\r\nX-Kalium-Token: " + guardtest.Token + "\r\n\r\n{}"
	if string(send) != want || outcome != Allowed {
		t.Errorf("sent %q, outcome %d", send, outcome)
	}
	if asked == nil || asked.Callee != "payer" || asked.Call != guardtest.Call || asked.Invocation != guardtest.Invocation || asked.Version != 3 {
		t.Errorf("asked %+v", asked)
	}
	if r := c.Last(t); r.Kind != "invoke" || r.Message != "invoke payer" || !r.Allowed {
		t.Errorf("verdict %+v", r)
	}
}

func TestARefusedInvokeLeavesTheCursor(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	g.live.cursor = atState(g, 2)
	c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) {
		return &frame.Answer{Reason: "edge_not_allowed", Expected: []string{"other"}}, nil
	}

	expect(t, connect(t, g, api), request("POST /function/payer", "gateway:8080"), "", Denied)

	if r := c.Last(t); r.Reason != "edge_not_allowed" || len(r.Expected) != 1 || r.Line != 3 {
		t.Errorf("verdict %+v", r)
	}
	if states := g.live.cursor.States(); len(states) != 1 || states[0] != 2 {
		t.Errorf("the cursor is at %v", states)
	}
}

func TestAfterAnUnknownOutcomeNoAppEdgeIsAsked(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	g.live.cursor = atState(g, 2)
	asked := 0
	c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { asked++; return nil, errNoAnswer }

	for _, reason := range []string{"controller_unavailable", "unknown_state", "unknown_state"} {
		expect(t, connect(t, g, api), request("POST /function/payer", "gateway:8080"), "", Denied)
		if r := c.Last(t); r.Reason != reason || r.FailMode != "deny" {
			t.Errorf("verdict %+v, want %s", r, reason)
		}
	}

	if asked != 1 {
		t.Errorf("the controller was asked %d times", asked)
	}
}

func TestAnAnswerThatContradictsItselfIsNoAnswerAndNoSilence(t *testing.T) {
	for _, answer := range []frame.Answer{
		{Allowed: true, Reason: "allowed"}, // without a token
		{Allowed: true, Reason: "allowed", Token: "short"},
		{Allowed: true, Reason: "allowed", Token: guardtest.Token[:31] + "\n"},
		{Allowed: true, Reason: "allowed", Token: guardtest.Token, Callback: guardtest.Token}, // which nobody asked for
		{Allowed: true, Reason: "bad_token", Token: guardtest.Token},
		{Allowed: true, Reason: "controller_unavailable", Token: guardtest.Token},
		{Allowed: false, Reason: "allowed", Token: guardtest.Token},
		{Allowed: false, Reason: "because"},
		{},
	} {
		for _, mode := range []string{"deny", "allow", "last_known"} {
			g, c := edited(t, "enforce", failDeny, failing(mode))
			request1(t, g)
			g.live.cursor = atState(g, 2)
			c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { return &answer, nil }

			for _, reason := range []string{"malformed", "unknown_state"} {
				expect(t, connect(t, g, api), request("POST /function/payer", "gateway:8080"), "", Denied)

				if r := c.Last(t); r.Reason != reason || r.FailMode != "" {
					t.Errorf("%+v in %s: verdict %+v", answer, mode, r)
				}
			}
		}
	}
}

func TestTheGatewayIsReachedInOneSpelling(t *testing.T) {
	for _, m := range []string{
		request("GET /function/payer", "gateway:8080"),
		request("POST /function/payer/sub", "gateway:8080"),
		request("POST /function/payer?x=1", "gateway:8080"),
		request("POST /function/", "gateway:8080"),
		request("GET /async-function/payer", "gateway:8080"),
		request("POST /async-function/payer/", "gateway:8080"),
		request("POST /async-function/payer?x=1", "gateway:8080"),
		request("POST /async-function/", "gateway:8080"),
		request("POST /async-function", "gateway:8080"),
		request("POST /function/payer.openfaas-fn", "gateway:8080"),
		request("POST /async-function/payer.other", "gateway:8080"),
		request("POST /function/Payer", "gateway:8080"),
		request("POST /function/payer-", "gateway:8080"),
		request("POST /function/pay_er", "gateway:8080"),
		request("POST /function/payer/", "gateway:8080"),
		request("POST /Function/payer", "gateway:8080"),
		request("POST /function/"+strings.Repeat("p", 64), "gateway:8080"),
		request("GET /system/functions", "gateway:8080"),
		request("POST /system/functions", "gateway:8080"),
		request("POST /system/function/payer", "gateway:8080"),
		request("POST /", "gateway:8080"),
		request("GET /healthz", "gateway:8080"),
		request("POST /function/payer", "gateway:8080", "X-Callback-Url: http://elsewhere/\r\n"),
		request("POST /function/payer", "gateway:8080", "x-callback-url: http://elsewhere/\r\n"),
	} {
		g, c, _ := invoked(t, "enforce")
		g.live.cursor = atState(g, 2)

		expect(t, connect(t, g, api), m, "", Denied)

		if r := c.Last(t); r.Reason != "gateway_rule" || r.Kind != "invoke" {
			t.Errorf("%q: verdict %+v", m, r)
		}
	}
}

func TestASecondSpellingOfAPathIsNoRequest(t *testing.T) {
	for _, target := range []string{
		"/function/%70ayer", "/function/payer?", "/function/payer%2f", "/function/./payer", "/function/../system/functions", "//function/payer",
		"/function//payer", "/function/payer/..", "/x/../function/payer", "/function/payer;x", "http://gateway:8080/function/payer", "/function/payer#x", "*", "gateway:8080",
	} {
		g, c, _ := invoked(t, "enforce")
		g.live.cursor = atState(g, 2)

		expect(t, connect(t, g, api), request("POST "+target, "gateway:8080"), "", Denied)

		if r := c.Last(t); r.Reason != "malformed" && r.Reason != "unsupported" {
			t.Errorf("%s: verdict %+v", target, r)
		}
	}
}

func TestConnectionsGoToListedPeersOnly(t *testing.T) {
	g, c := newGuard(t, "enforce")
	for _, to := range []string{"10.137.0.1:9998", "10.137.0.2:8080", "10.137.0.1:53", "[2001:db8::1]:8080", "93.184.216.34:443"} {
		if _, outcome := g.Connect(netip.MustParseAddrPort(to)); outcome != Denied {
			t.Errorf("connect %s was not denied", to)
		}
		if r := c.Last(t); r.Kind != "connect" || r.Reason != "unknown_peer" || r.Message != "connect "+to {
			t.Errorf("verdict %+v", r)
		}
	}
	before := len(c.Verdicts())

	connect(t, g, "[::ffff:10.137.0.1]:8080")

	if len(c.Verdicts()) != before {
		t.Error("an allowed connect was logged")
	}
}

func TestDatagramsGoNowhere(t *testing.T) {
	g, c := newGuard(t, "enforce")

	listed, unknown := g.Datagram(netip.MustParseAddrPort(api)), g.Datagram(netip.MustParseAddrPort("1.2.3.4:5"))

	if listed != Denied || unknown != Denied || c.Verdicts()[0].Reason != "unknown_protocol" || c.Verdicts()[1].Reason != "unknown_peer" {
		t.Errorf("verdicts %+v", c.Verdicts())
	}
	if g.Associate(netip.MustParseAddrPort("10.137.0.1:65535")) != Allowed || g.Associate(netip.MustParseAddrPort("1.2.3.4:5")) != Denied {
		t.Error("a resolver's connect to an address is not judged by the address")
	}
}

func TestStatementsAreJudgedByVerbAndTables(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	g.live.cursor = atState(g, 1)
	out := connect(t, g, database)
	before := len(c.Verdicts())
	expect(t, out, guardtest.LoginPacket("shop"), guardtest.LoginPacket("shop"), Allowed)
	ping := guardtest.Packet(0, "\x0e")
	expect(t, out, ping, ping, Allowed)
	if len(c.Verdicts()) != before {
		t.Error("support traffic was logged")
	}
	query := guardtest.Packet(0, "\x03SELECT name FROM items WHERE id = 5")
	expect(t, out, query[:9], "", Allowed)
	expect(t, out, query[9:], query, Allowed)
	if r := c.Last(t); r.Kind != "mysql" || r.Message != "mysql select read items" || r.Peer != "database" {
		t.Errorf("verdict %+v", r)
	}

	expect(t, out, guardtest.Packet(0, "\x03DELETE FROM items"), "", Denied)

	if r := c.Last(t); r.Reason != "not_in_policy" {
		t.Errorf("verdict %+v", r)
	}
}

func TestALoginToAnotherSchemaIsDenied(t *testing.T) {
	g, _, _ := invoked(t, "enforce")

	expect(t, connect(t, g, database), guardtest.LoginPacket("mysql"), "", Denied)
}

func TestABodyEndsWithItsInvocationAndWithTheLease(t *testing.T) {
	head := request("POST /b", "api.test:8080", "Content-Length: 10\r\n")
	for what, finish := range map[string]func(*Guard, *Incoming){
		"no_invocation": func(_ *Guard, in *Incoming) { in.Answer([]byte("HTTP/1.1 204 No Content\r\n\r\n")) },
		"lease_expired": func(g *Guard, _ *Incoming) { g.Renew(0) },
	} {
		g, c, in := invoked(t, "enforce")
		g.live.cursor = atState(g, 3)
		out := connect(t, g, api)
		expect(t, out, head+"01234", head+"01234", Allowed)

		finish(g, in)

		expect(t, out, "56789", "", Denied)
		if r := c.Last(t); r.Reason != what {
			t.Errorf("verdict %+v, want %s", r, what)
		}
	}
}

func TestHeldBytesThatWaitTooLongAreDenied(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	out := connect(t, g, api)
	expect(t, out, "GET /a HT", "", Allowed)

	if send, outcome := out.Expire(false); len(send) != 0 || outcome != Denied {
		t.Errorf("sent %q, outcome %d", send, outcome)
	}

	if r := c.Last(t); r.Reason != "held_too_long" {
		t.Errorf("verdict %+v", r)
	}
}

func TestHeldBytesAreBounded(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	out := connect(t, g, api)
	head := "GET /a HTTP/1.1\r\nHost: api.test:8080\r\n"
	expect(t, out, head, "", Allowed)

	_, outcome := out.Write([]byte("X-Long: " + strings.Repeat("x", 70<<10)))

	if r := c.Last(t); outcome != Denied || r.Reason != "too_large" {
		t.Errorf("outcome %d, verdict %+v", outcome, r)
	}
}

func TestAuditPassesWhatEnforceRefusesAndStopsJudgingThere(t *testing.T) {
	g, c, _ := invoked(t, "audit")
	out := connect(t, g, api)
	bad := request("POST /b", "api.test:8080")

	expect(t, out, bad, bad, Allowed)

	r := c.Last(t)
	if !r.Allowed || !r.WouldDeny || r.Reason != "out_of_order" || r.Mode != "audit" {
		t.Errorf("verdict %+v", r)
	}
	before := len(c.Verdicts())
	expect(t, out, "anything", "anything", Allowed)
	if len(c.Verdicts()) != before {
		t.Error("a marked connection was judged again")
	}
	if states := g.live.cursor.States(); len(states) != 1 || states[0] != 0 {
		t.Errorf("the cursor moved to %v", states)
	}
	stranger := connect(t, g, "10.9.9.9:9")
	expect(t, stranger, "x", "x", Allowed)
}

func TestAMarkedConnectionEndsWhenAuditBecomesEnforce(t *testing.T) {
	g, c := newGuard(t, "audit")
	stranger := connect(t, g, "10.9.9.9:9")
	in, _ := g.Accept(9000, client)
	expect(t, stranger, "x", "x", Allowed)
	answer(t, in, "x", 1, Allowed)

	if err := g.SetPolicy("shop", guardtest.Signed(t, "enforce", "4")); err != nil {
		t.Fatal(err)
	}

	expect(t, stranger, "x", "", Denied)
	if r := c.Last(t); r.Reason != "connection_dead" {
		t.Errorf("verdict %+v", r)
	}
	answer(t, in, "x", 0, Denied)
}

func TestAuditPassesNoTokenOfTheFunctions(t *testing.T) {
	g, _, _ := invoked(t, "audit")
	out := connect(t, g, api)

	send, outcome := out.Write([]byte(request("POST /function/payer", "gateway:8080", "X-Kalium-Token: forged\r\nContent-Length: 2\r\n") + "{}"))

	if string(send) != request("POST /function/payer", "gateway:8080", "Content-Length: 2\r\n")+"{}" || outcome != Allowed {
		t.Errorf("sent %q, outcome %d", send, outcome)
	}
}

func TestAuditJudgesAsEnforceUpToTheFirstDenial(t *testing.T) {
	sequence := []struct{ to, bytes string }{
		{api, request("GET /a", "api.test:8080")},
		{database, guardtest.LoginPacket("shop") + guardtest.Packet(0, "\x03SELECT a FROM items")},
		{api, request("GET /a", "api.test:8080")},
		{api, request("POST /function/payer", "gateway:8080")},
		{api, request("GET /a", "unknown:8080")},
	}
	var reasons [2][]string
	for i, mode := range []string{"enforce", "audit"} {
		g, c, _ := invoked(t, mode)
		for _, step := range sequence {
			connect(t, g, step.to).Write([]byte(step.bytes))
		}
		for _, r := range c.Verdicts() {
			reasons[i] = append(reasons[i], r.Kind+" "+r.Reason)
		}
	}
	if a, b := strings.Join(reasons[0], ", "), strings.Join(reasons[1], ", "); a != b {
		t.Errorf("enforce: %s\naudit:   %s", a, b)
	}
}

func TestNothingIsDecidedAfterTheLease(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c, _ := invoked(t, mode)
		open := connect(t, g, api)
		now := time.Now().Add(time.Hour)
		g.now = func() time.Time { return now }

		if _, outcome := g.Connect(netip.MustParseAddrPort(api)); outcome != Denied {
			t.Errorf("%s: connect was not denied", mode)
		}
		expect(t, open, request("GET /a", "api.test:8080"), "", Denied)

		if r := c.Last(t); r.Reason != "lease_expired" {
			t.Errorf("%s: verdict %+v", mode, r)
		}
		g.Renew(1000)
		connect(t, g, api)
	}
}

func TestAVerdictThatCannotBeLoggedDenies(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	out := connect(t, g, api)
	c.Stick()

	expect(t, out, request("GET /a", "api.test:8080"), "", Denied)

	if states := g.live.cursor.States(); states[0] != 0 {
		t.Errorf("the cursor moved to %v", states)
	}
}

func TestANilGuardDeniesEverything(t *testing.T) {
	var g *Guard
	if _, outcome := g.Connect(netip.MustParseAddrPort(api)); outcome != Denied {
		t.Error("connect")
	}
	if _, outcome := g.Accept(8080, client); outcome != Denied {
		t.Error("accept")
	}
	to := netip.MustParseAddrPort(api)
	if g.Datagram(to) != Denied || g.DatagramFrom(to) != Denied || g.Associate(to) != Denied {
		t.Error("datagram")
	}
	if g.Resolve(nil) != nil {
		t.Error("resolve")
	}
}

// atState is buyer's cursor in one state, reached by a path of its own CFG.
func atState(g *Guard, state int) []uint64 { return []uint64{1 << state} }
