package guard

import (
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// Protocols that begin in clear and change: to TLS, or to frames that are not looked into.

const (
	mail     = guardtest.HostAddress + ":25"
	mailPeer = `"mail":{"host":"images.other","port":25,"protocol":"smtp"}`
	namesOf  = `"names":{"host":"images.other","port":4443,"protocol":"https"}`
	postLine = `{"kind":"http","line":5,"method":"POST","path":"/b","peer":"api","grpc":false,"query":[],"retries":0,"tail":false,` +
		`"text":"http POST api /b","upgrade":false}`
	mailLine = `{"from":"","kind":"smtp","line":5,"peer":"mail","tail":false,"text":"smtp mail mail to a@shop.test","to":["a@shop.test"]}`
)

// mailing is a guard with a released request that may send one mail.
func mailing(t *testing.T, mode string) (*Guard, *guardtest.Controller, *Incoming) {
	t.Helper()
	g, c := edited(t, mode, namesOf, mailPeer, postLine, mailLine)
	in := request1(t, g)
	g.live.cursor = atState(g, 3)
	return g, c, in
}

// dialogue writes what the client says and shows what the server answers, in turn; all of the client's part has to leave.
func dialogue(t *testing.T, out *Outgoing, lines ...string) {
	t.Helper()
	for i, line := range lines {
		if i%2 == 0 {
			if !out.Watches() {
				t.Fatalf("nobody looks at %q", line)
			}
			out.Inbound([]byte(line))
		} else {
			expect(t, out, line, line, Allowed)
		}
	}
}

func TestAMailIsJudgedByItsEnvelope(t *testing.T) {
	g, c, _ := mailing(t, "enforce")
	out := connect(t, g, mail)
	dialogue(t, out, "220 mail\r\n", "EHLO f\r\n", "250 mail\r\n", "MAIL FROM:<f@shop.test>\r\n", "250 ok\r\n", "RCPT TO:<a@shop.test>\r\n",
		"250 ok\r\n", "DATA\r\n", "354 go\r\n", "Subject: x\r\n\r\ntext\r\n.\r\n", "250 ok\r\n")

	if r := c.Last(t); r.Kind != "smtp" || !r.Allowed || r.Line != 5 || r.Peer != "mail" {
		t.Errorf("verdict %+v", r)
	}
	expect(t, out, "MAIL FROM:<f@shop.test>\r\n", "", Denied)
	if r := c.Last(t); r.Reason != "out_of_order" {
		t.Errorf("verdict %+v", r)
	}
}

func TestARecipientThatIsNotListedIsDeniedBeforeItLeaves(t *testing.T) {
	g, c, _ := mailing(t, "enforce")
	out := connect(t, g, mail)
	dialogue(t, out, "220 mail\r\n", "HELO f\r\n", "250 mail\r\n", "MAIL FROM:<f@shop.test>\r\n", "250 ok\r\n")

	expect(t, out, "RCPT TO:<secret@evil.test>\r\n", "", Denied)

	if r := c.Last(t); r.Reason != "not_in_policy" || r.Kind != "smtp" {
		t.Errorf("verdict %+v", r)
	}
}

func TestTheTextOfAMailIsBoundedAndEndsWithItsInvocation(t *testing.T) {
	for _, reason := range []string{"too_large", "no_invocation"} {
		g, c, in := mailing(t, "enforce")
		out := connect(t, g, mail)
		dialogue(t, out, "220 mail\r\n", "HELO f\r\n", "250 mail\r\n", "MAIL FROM:<f@shop.test>\r\n", "250 ok\r\n", "RCPT TO:<a@shop.test>\r\n",
			"250 ok\r\n", "DATA\r\n", "354 go\r\n", "line\r\n")
		if reason == "no_invocation" {
			in.Answer([]byte(noContentAnswer))
		}

		expect(t, out, strings.Repeat("x", 98)+"\r\n", "", Denied)

		if r := c.Last(t); r.Reason != reason {
			t.Errorf("verdict %+v, want %s", r, reason)
		}
	}
}

func TestAMailUnderSTARTTLS(t *testing.T) {
	for _, name := range []string{"", "images.other"} {
		g, c, _ := mailing(t, "enforce")
		s := dialTLS(t, g, mail, logged(g, &tls.Config{ServerName: name}), &tls.Config{})
		dialogue(t, s.out, "220 mail\r\n", "EHLO f\r\n", "250-mail\r\n250 STARTTLS\r\n", "STARTTLS\r\n", "220 go\r\n")
		said := "EHLO f\r\nMAIL FROM:<f@shop.test>\r\nRCPT TO:<a@shop.test>\r\nDATA\r\nSubject: x\r\n\r\ntext\r\n.\r\n"

		if _, err := io.WriteString(s, said); err != nil {
			t.Fatalf("%v, verdict %+v", err, c.Last(t))
		}

		if r := c.Last(t); r.Kind != "smtp" || !r.Allowed {
			t.Errorf("verdict %+v", r)
		}
		if got := s.arrived(); got != said {
			t.Errorf("%q arrived", got)
		}
	}
}

func TestAMailUnderSTARTTLSToAnotherIsDenied(t *testing.T) {
	g, c, _ := mailing(t, "enforce")
	s := dialTLS(t, g, mail, logged(g, &tls.Config{}), &tls.Config{})
	dialogue(t, s.out, "220 mail\r\n", "EHLO f\r\n", "250-mail\r\n250 STARTTLS\r\n", "STARTTLS\r\n", "220 go\r\n")

	_, err := io.WriteString(s, "EHLO f\r\nMAIL FROM:<f@shop.test>\r\nRCPT TO:<secret@evil.test>\r\n")

	if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != "not_in_policy" {
		t.Errorf("%v, verdict %+v", err, r)
	}
	if got := s.arrived(); got != "EHLO f\r\nMAIL FROM:<f@shop.test>\r\n" {
		t.Errorf("%q arrived", got)
	}
}

func TestSTARTTLSForAnotherNameIsDenied(t *testing.T) {
	g, c, _ := mailing(t, "enforce")
	s := dialTLS(t, g, mail, logged(g, &tls.Config{ServerName: "evil.test"}), &tls.Config{})
	dialogue(t, s.out, "220 mail\r\n", "EHLO f\r\n", "250-mail\r\n250 STARTTLS\r\n", "STARTTLS\r\n", "220 go\r\n")

	_, err := io.WriteString(s, "EHLO f\r\n")

	if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != "sni_mismatch" {
		t.Errorf("%v, verdict %+v", err, r)
	}
}

// greetingPacket is a server's, version 10 (page "Protocol::HandshakeV10").
var greetingPacket = guardtest.Packet(0, "\x0a8.0.0\x00\x01\x00\x00\x00abcdefgh\x00\xff\xff\x2d\x02\x00\xff\xff\x15"+strings.Repeat("\x00", 10)+
	"abcdefghijkl\x00mysql_native_password\x00")

func TestStatementsUnderTLS(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	g.live.cursor = atState(g, 1)
	s := dialTLS(t, g, database, logged(g, &tls.Config{}), &tls.Config{})
	s.out.Inbound([]byte(greetingPacket))
	login := guardtest.LoginPacket("shop")
	flags := []byte(login[4:8])
	flags[1] |= 0x08 // CLIENT_SSL
	request := guardtest.Packet(1, string(flags)+login[8:36])
	if send, outcome := s.out.Write([]byte(request)); outcome != Allowed || len(send) != len(request) {
		t.Fatalf("outcome %d, verdict %+v", outcome, c.Last(t))
	}
	inside := guardtest.Packet(2, string(flags)+login[8:])
	query := guardtest.Packet(0, "\x03SELECT name FROM items")
	for _, packet := range []string{inside, query} {
		if _, err := io.WriteString(s, packet); err != nil {
			t.Fatalf("%v, verdict %+v", err, c.Last(t))
		}
	}
	if r := c.Last(t); r.Kind != "mysql" || !r.Allowed || r.Message != "mysql select read items" {
		t.Errorf("verdict %+v", r)
	}

	_, err := io.WriteString(s, guardtest.Packet(0, "\x03SELECT id FROM secrets"))

	if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != "not_in_policy" {
		t.Errorf("%v, verdict %+v", err, r)
	}
	if got := s.arrived(); !strings.HasSuffix(got, query) {
		t.Errorf("%q arrived", got)
	}
}

func TestAStatementThatTheFunctionNeverExecutesIsNotPrepared(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	out := connect(t, g, database)
	expect(t, out, guardtest.LoginPacket("shop"), guardtest.LoginPacket("shop"), Allowed)
	prepare := guardtest.Packet(0, "\x16SELECT name FROM items WHERE id = ?")
	before := len(c.Verdicts())
	expect(t, out, prepare, prepare, Allowed) // it is executed later in the CFG
	if len(c.Verdicts()) != before {
		t.Error("a preparation was logged")
	}

	out = connect(t, g, database)
	expect(t, out, guardtest.LoginPacket("shop"), guardtest.LoginPacket("shop"), Allowed)
	expect(t, out, guardtest.Packet(0, "\x16SELECT id FROM secrets"), "", Denied)

	if r := c.Last(t); r.Reason != "not_in_policy" {
		t.Errorf("verdict %+v", r)
	}
}

const upgradeW = "GET /w HTTP/1.1\r\nHost: api.test:8080\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

func TestAWebSocketPassesUntilItsInvocationEnds(t *testing.T) {
	g, c, in := invoked(t, "enforce")
	g.live.cursor = atState(g, 3)
	out := connect(t, g, api)
	expect(t, out, upgradeW, upgradeW, Allowed)
	long := "\x82\xfe\x01\x00maskGET /secret HTTP/1.1" + strings.Repeat("x", 256-20)
	for _, frame := range []string{"\x81\x85mask", "hello", "\x89\x80mask" + "\xc1\x81maskz", long} {
		expect(t, out, frame, frame, Allowed)
	}

	in.Answer([]byte(noContentAnswer))

	expect(t, out, "\x81\x81maskx", "", Denied)
	if r := c.Last(t); r.Reason != "no_invocation" {
		t.Errorf("verdict %+v", r)
	}
}

func TestWhatIsNoFrameOfAClientIsDenied(t *testing.T) {
	for name, frame := range map[string]string{
		"a request":         "GET /secret HTTP/1.1\r\nHost: api.test:8080\r\n\r\n",
		"another request":   "A /secret HTTP/1.1\r\n\r\n",
		"no mask":           "\x81\x05hello",
		"an opcode":         "\x83\x80mask",
		"a long ping":       "\x89\xfe\x01\x00mask",
		"a ping in parts":   "\x09\x80mask",
		"a reserved bit":    "\xa1\x80mask",
		"a longer spelling": "\x81\xfe\x00\x05mask",
		"64 bits for 16":    "\x81\xff\x00\x00\x00\x00\x00\x00\x01\x00mask",
	} {
		g, c, _ := invoked(t, "enforce")
		g.live.cursor = atState(g, 3)
		out := connect(t, g, api)
		expect(t, out, upgradeW, upgradeW, Allowed)

		expect(t, out, frame, "", Denied)

		if r := c.Last(t); r.Reason != "malformed" {
			t.Errorf("%s: verdict %+v", name, r)
		}
	}
}

func TestAnUpgradeThatNoLineNamesIsDenied(t *testing.T) {
	g, c, _ := invoked(t, "enforce")

	expect(t, connect(t, g, api), strings.Replace(upgradeW, "/w", "/a", 1), "", Denied)

	if r := c.Last(t); r.Reason != "not_in_policy" {
		t.Errorf("verdict %+v", r)
	}
}

func TestACallOfGRPCNeedsALineOfItsOwn(t *testing.T) {
	for _, kind := range []string{"application/grpc", "application/json"} {
		g, c, _ := invoked(t, "enforce")
		g.live.cursor = atState(g, 3)
		s := dialH2(t, g)
		h := newH2()
		h.request(1, 0, append(pseudo("POST", "images.test:4443", "/g"), "content-type", kind, "te", "trailers")...)
		said := h.take()

		_, err := io.WriteString(s, said)

		if r := c.Last(t); r.Allowed != (kind == "application/grpc") || r.Allowed != (err == nil) {
			t.Errorf("%s: %v, verdict %+v", kind, err, r)
		}
	}
}

func TestARequestWithoutAnAnswerMayBeSentAgainOnAnotherConnection(t *testing.T) {
	m := request("GET /a", "api.test:8080")
	for name, try := range map[string]struct {
		end  func(*Outgoing)
		want Outcome
	}{
		"closed":                {(*Outgoing).Close, Allowed},
		"ended by the peer":     {(*Outgoing).Ended, Allowed},
		"still open":            {func(*Outgoing) {}, Denied},
		"answered":              {func(o *Outgoing) { o.Answered(1); o.Close() }, Denied},
		"pipelined behind it":   {func(o *Outgoing) { o.Write([]byte("GET ")); o.Close() }, Denied},
		"closed and told again": {func(o *Outgoing) { o.Ended(); o.Close() }, Allowed},
	} {
		g, c := edited(t, "enforce", guardtest.RetriesOfGet, retryOnce)
		request1(t, g)
		first := connect(t, g, api)
		expect(t, first, m, m, Allowed)
		try.end(first)

		_, outcome := connect(t, g, api).Write([]byte(m))

		if r := c.Last(t); outcome != try.want || (outcome == Allowed) != (r.Judging == "retry") {
			t.Errorf("%s: outcome %d, verdict %+v", name, outcome, r)
		}
	}
}

func TestSupportTrafficIsBounded(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	now := g.now()
	g.now = func() time.Time { return now }
	out := connect(t, g, database)
	expect(t, out, guardtest.LoginPacket("shop"), guardtest.LoginPacket("shop"), Allowed)
	ping := guardtest.Packet(0, "\x0e")
	for range supportBurst - 1 {
		expect(t, out, ping, ping, Allowed)
	}
	now = now.Add(time.Second)
	for range supportPerSecond {
		expect(t, out, ping, ping, Allowed)
	}

	expect(t, out, ping, "", Denied)

	if r := c.Last(t); r.Reason != "rate_bound" || r.Kind != "mysql" {
		t.Errorf("verdict %+v", r)
	}
}

// An envelope moves no cursor and is not logged: without a bound, addresses that lead to no mail would carry what they like.
func TestEnvelopesAreBounded(t *testing.T) {
	g, c, _ := mailing(t, "enforce")
	now := g.now()
	g.now = func() time.Time { return now }
	out := connect(t, g, mail)
	dialogue(t, out, "220 mail\r\n", "EHLO f\r\n", "250 mail\r\n", "MAIL FROM:<f@shop.test>\r\n", "250 ok\r\n")
	recipient := "RCPT TO:<a@shop.test>\r\n"
	for range supportBurst - 2 {
		dialogue(t, out, "", recipient, "250 ok\r\n")
	}

	expect(t, out, recipient, "", Denied)

	if r := c.Last(t); r.Reason != "rate_bound" || r.Kind != "smtp" {
		t.Errorf("verdict %+v", r)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	now := g.now()
	g.now = func() time.Time { return now }
	for range sandboxBurst {
		connect(t, g, api)
		g.Leave()
	}

	_, outcome := g.Connect(client)
	lastReason(t, c, "unknown_peer")
	if outcome != Denied {
		t.Error("a stranger was reached")
	}
	if _, outcome = g.Connect(netip.MustParseAddrPort(api)); outcome != Denied {
		t.Error("one more connection was allowed")
	}
	lastReason(t, c, "rate_bound")
}

func TestForeignProtocolsAreCalledByTheirNames(t *testing.T) {
	for bytes, name := range map[string]string{
		"\x00\x00\x00\x08\x04\xd2\x16\x2f": "PostgreSQL",
		"*1\r\n$4\r\nPING\r\n":             "Redis",
		"SSH-2.0-x\r\n":                    "SSH",
	} {
		g, c, _ := invoked(t, "enforce")

		expect(t, connect(t, g, api), bytes, "", Denied)

		if r := c.Last(t); !strings.Contains(r.Message, name) {
			t.Errorf("verdict %+v, want %s", r, name)
		}
	}
}
