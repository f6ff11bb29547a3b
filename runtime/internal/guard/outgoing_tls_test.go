package guard

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// secured is a TLS connection of a program through the guard: real clients and servers at both ends, and the receiver's
// own evidence of what arrived.
type secured struct {
	*tls.Conn // of the program
	out       *Outgoing
	denied    error
	kept      *[][]byte // what is written goes here instead

	mu    sync.Mutex
	plain strings.Builder // what the server has read
	end   error           // of the server's connection
	done  chan struct{}
}

// through is the program's socket: what it writes is judged, and what it reads was shown before.
type through struct {
	net.Conn
	s *secured
}

var errDenied = errors.New("EPERM")

func (c *through) Write(b []byte) (int, error) {
	if c.s.denied != nil {
		return 0, c.s.denied
	}
	if c.s.kept != nil {
		*c.s.kept = append(*c.s.kept, bytes.Clone(b))
		return len(b), nil
	}
	send, outcome := c.s.out.Write(bytes.Clone(b))
	if len(send) > 0 {
		if _, err := c.Conn.Write(send); err != nil {
			return 0, err
		}
	}
	c.s.out.Sent()
	if outcome == Denied {
		c.s.denied = errDenied
		c.Conn.Close()
		return 0, errDenied
	}
	return len(b), nil
}

func (c *through) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.s.out.Watches() {
		c.s.out.Inbound(b[:n])
	}
	return n, err
}

// dialTLS connects to a TLS server behind the guard. The handshake comes with the first write.
func dialTLS(t testing.TB, g *Guard, to string, client, server *tls.Config) *secured {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &secured{out: connect(t, g, to), done: make(chan struct{})}
	if server.Certificates == nil {
		server.Certificates = []tls.Certificate{guardtest.Certificate(t, "images.test")}
	}
	go func() {
		defer close(s.done)
		conn, err := listener.Accept()
		listener.Close()
		if err != nil {
			s.end = err
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		inside := tls.Server(conn, server)
		buffer := make([]byte, 64<<10)
		for {
			n, err := inside.Read(buffer)
			s.mu.Lock()
			s.plain.Write(buffer[:n])
			s.mu.Unlock()
			if err != nil {
				s.end = err
				return
			}
		}
	}()
	conn, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); s.out.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	client.InsecureSkipVerify = true
	s.Conn = tls.Client(&through{conn, s}, client)
	return s
}

// arrived ends the connection and returns what the server has read.
func (s *secured) arrived() string {
	s.Conn.Close()
	s.Conn.NetConn().Close()
	<-s.done
	return s.plain.String()
}

func logged(g *Guard, c *tls.Config) *tls.Config {
	c.KeyLogWriter = g.Keys().Writer()
	return c
}

const getI = "GET /i HTTP/1.1\r\nHost: images.test:4443\r\n\r\n"

var versions = map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13}

func TestARequestUnderTLSIsJudgedAndArrivesAsItWas(t *testing.T) {
	for name, version := range versions {
		g, c, _ := invoked(t, "enforce")
		s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test", MaxVersion: version}), &tls.Config{})

		for range 3 {
			if _, err := io.WriteString(s, getI); err != nil {
				t.Fatalf("%s: %v, %+v", name, err, c.Verdicts())
			}
		}

		if got := s.arrived(); got != strings.Repeat(getI, 3) || s.end != io.EOF {
			t.Errorf("%s: %q arrived, and the connection ended with %v", name, got, s.end)
		}
		r := c.Last(t)
		if r.Kind != "https" || r.Message != "https GET images /i" || r.Peer != "images" || r.Judging != "" || !r.Allowed || r.Line != 4 {
			t.Errorf("%s: verdict %+v", name, r)
		}
	}
}

func TestADeniedRequestUnderTLSLeavesNoByte(t *testing.T) {
	for name, version := range versions {
		for bad, reason := range map[string]string{
			"GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n": "not_in_policy",
			"GET /i HTTP/1.1\r\nHost: images.other:4443\r\n\r\n":     "unknown_peer",
			"GET /i HTTP/1.1\r\nHost: images.test\r\n\r\n":           "unknown_peer",
			"\x00\x01":                         "malformed",
			"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": "unsupported",
		} {
			g, c, _ := invoked(t, "enforce")
			s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test", MaxVersion: version}), &tls.Config{})

			_, err := io.WriteString(s, bad)

			if !errors.Is(err, errDenied) {
				t.Errorf("%s, %q: %v", name, bad, err)
			}
			if got := s.arrived(); got != "" {
				t.Errorf("%s: %q arrived", name, got)
			}
			if r := c.Last(t); r.Reason != reason || r.Kind != "https" {
				t.Errorf("%s, %q: verdict %+v", name, bad, r)
			}
		}
	}
}

func TestOnlyWhatComesBeforeADeniedRequestUnderTLSArrives(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test"}), &tls.Config{})

	_, err := io.WriteString(s, getI+"GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n")

	if got := s.arrived(); got != getI || !errors.Is(err, errDenied) {
		t.Errorf("%q arrived, %v", got, err)
	}
}

func TestARequestUnderTLSInPiecesIsHeld(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test"}), &tls.Config{})
	for i := range len(getI) - 1 {
		if _, err := io.WriteString(s, getI[i:i+1]); err != nil {
			t.Fatal(err)
		}
		if n, since := s.out.Held(); n != i+1 || since.IsZero() {
			t.Fatalf("%d bytes held since %v", n, since)
		}
	}
	if _, err := io.WriteString(s, getI[len(getI)-1:]); err != nil {
		t.Fatal(err)
	}

	if got := s.arrived(); got != getI {
		t.Errorf("%q arrived", got)
	}
}

func TestATLSConnectionWhoseKeysAreNotSaidIsDenied(t *testing.T) {
	for name, version := range versions {
		for _, mode := range []string{"enforce", "audit"} {
			g, c, _ := invoked(t, mode)
			s := dialTLS(t, g, images, &tls.Config{ServerName: "images.test", MaxVersion: version}, &tls.Config{})

			_, err := io.WriteString(s, getI)

			if r := c.Last(t); r.Reason != "no_key" || r.WouldDeny != (mode == "audit") {
				t.Errorf("%s, %s: verdict %+v", name, mode, r)
			}
			want := map[string]string{"enforce": "", "audit": getI}[mode]
			if got := s.arrived(); got != want || (err == nil) != (mode == "audit") {
				t.Errorf("%s, %s: %q arrived, %v", name, mode, got, err)
			}
		}
	}
}

func TestAHelloThatIsNotForThePeerIsDenied(t *testing.T) {
	for hello, reason := range map[string]string{
		guardtest.ClientHello("elsewhere.test"):                                        "sni_mismatch",
		guardtest.ClientHello("images.test", "\xfe\x0d\x00\x01\x00"):                   "unsupported",
		guardtest.ClientHello("images.test", "\x00\x2a\x00\x00"):                       "unsupported",
		guardtest.ClientHello("images.test", "\x00\x10\x00\x06\x00\x04\x03ftp"):        "unsupported",
		guardtest.ClientHello("images.test") + "GET / HTTP/1.1\r\n":                    "malformed",
		guardtest.ClientHello("images.test") + "\x17\x03\x03\x00\x05data.":             "malformed",
		guardtest.ClientHello("images.test") + guardtest.ClientHello("elsewhere.test"): "malformed",
	} {
		g, c, _ := invoked(t, "enforce")
		out := connect(t, g, images)

		send, outcome := out.Write([]byte(hello))

		r := c.Last(t)
		if outcome != Denied || r.Reason != reason || strings.HasPrefix(r.Message, "https hello") {
			t.Errorf("%q: outcome %d, verdict %+v", hello, outcome, r)
		}
		if string(send) != "" && string(send) != guardtest.ClientHello("images.test") {
			t.Errorf("%q left", send)
		}
	}
}

func TestAHelloWithoutANameIsDenied(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	s := dialTLS(t, g, images, logged(g, &tls.Config{}), &tls.Config{})

	_, err := io.WriteString(s, getI)

	if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != "sni_mismatch" {
		t.Errorf("%v, verdict %+v", err, r)
	}
}

func TestABodyUnderTLSEndsWithItsInvocation(t *testing.T) {
	g, c, in := invoked(t, "enforce")
	s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test"}), &tls.Config{})
	if _, err := io.WriteString(s, getI); err != nil {
		t.Fatal(err)
	}
	in.Answer([]byte("HTTP/1.1 204 No Content\r\n\r\n"))

	_, err := io.WriteString(s, getI)

	if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != "no_invocation" {
		t.Errorf("%v, verdict %+v", err, r)
	}
	if got := s.arrived(); got != getI {
		t.Errorf("%q arrived", got)
	}
}

func TestAuditSealsWhatEnforceRefusesUnderTLS(t *testing.T) {
	for name, version := range versions {
		g, c, _ := invoked(t, "audit")
		s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test", MaxVersion: version}), &tls.Config{})
		bad := "GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n"
		for _, part := range []string{getI, bad[:7], bad[7:], "anything"} {
			if _, err := io.WriteString(s, part); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}

		if got := s.arrived(); got != getI+bad+"anything" || s.end != io.EOF {
			t.Errorf("%s: %q arrived, and the connection ended with %v", name, got, s.end)
		}
		if r := c.Last(t); r.Reason != "not_in_policy" || !r.WouldDeny {
			t.Errorf("%s: verdict %+v", name, r)
		}
	}
}

func TestAMarkedTLSConnectionEndsWhenAuditBecomesEnforce(t *testing.T) {
	g, c := newGuard(t, "audit")
	s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test"}), &tls.Config{})
	if _, err := io.WriteString(s, getI); err != nil { // outside of an invocation
		t.Fatal(err)
	}
	if err := g.SetPolicy("shop", guardtest.Signed(t, "enforce", "4")); err != nil {
		t.Fatal(err)
	}

	_, err := io.WriteString(s, getI)

	if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != "connection_dead" {
		t.Errorf("%v, verdict %+v", err, r)
	}
	if got := s.arrived(); got != getI {
		t.Errorf("%q arrived", got)
	}
}

func TestHeldBytesUnderTLSThatWaitTooLong(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c, _ := invoked(t, mode)
		s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test"}), &tls.Config{})
		if _, err := io.WriteString(s, getI[:20]); err != nil {
			t.Fatal(err)
		}

		send, outcome := s.out.Expire(false)

		if r := c.Last(t); r.Reason != "held_too_long" {
			t.Errorf("verdict %+v", r)
		}
		if mode == "enforce" {
			if len(send) != 0 || outcome != Denied {
				t.Errorf("sent %q, outcome %d", send, outcome)
			}
			continue
		}
		if _, err := s.NetConn().(*through).Conn.Write(send); err != nil {
			t.Fatal(err)
		}
		io.WriteString(s, getI[20:])
		if got := s.arrived(); got != getI || outcome == Denied {
			t.Errorf("%q arrived, outcome %d", got, outcome)
		}
	}
}

func TestTheServersBytesAreWatchedUntilTheyAreKnown(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	if connect(t, g, api).Watches() {
		t.Error("HTTP in clear is watched")
	}
	s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test"}), &tls.Config{})
	if !s.out.Watches() {
		t.Error("TLS is not watched from the beginning")
	}

	if err := s.Handshake(); err != nil {
		t.Fatal(err)
	}

	if s.out.Watches() {
		t.Error("TLS is watched behind the handshake")
	}
}

func TestALongBodyUnderTLSArrivesWhole(t *testing.T) {
	for name, version := range versions {
		g, _, _ := invoked(t, "audit")
		s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test", MaxVersion: version}), &tls.Config{})
		body := strings.Repeat("0123456789abcdef", 64<<10)
		head := fmt.Sprintf("POST /i HTTP/1.1\r\nHost: images.test:4443\r\nContent-Length: %d\r\n\r\n", len(body))
		if _, err := io.WriteString(s, head+body); err != nil {
			t.Fatal(err)
		}

		if got := s.arrived(); got != head+body {
			t.Errorf("%s: %d bytes arrived of %d, %v", name, len(got), len(head+body), s.end)
		}
	}
}

// TestTheSplitOfTLSRecordsChangesNothing cuts the bytes of a connection anywhere, as writes that find no room do.
func TestTheSplitOfTLSRecordsChangesNothing(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 2))
	const bad = "GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n"
	for i := range 30 {
		version := []uint16{tls.VersionTLS12, tls.VersionTLS13}[random.IntN(2)]
		g, c, _ := invoked(t, "enforce")
		s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test", MaxVersion: version}), &tls.Config{})
		if err := s.Handshake(); err != nil {
			t.Fatal(err)
		}
		good := 1 + random.IntN(4)
		said := strings.Repeat(getI, good) + bad + getI
		var kept [][]byte
		s.kept = &kept
		for len(said) > 0 {
			n := 1 + random.IntN(len(said))
			if _, err := io.WriteString(s, said[:n]); err != nil {
				t.Fatal(err)
			}
			said = said[n:]
		}
		s.kept = nil
		raw := bytes.Join(kept, nil)
		var err error
		for len(raw) > 0 && err == nil {
			n := 1 + random.IntN(min(len(raw), 1+random.IntN(200)))
			_, err = s.NetConn().Write(raw[:n])
			raw = raw[n:]
		}

		if got := s.arrived(); got != strings.Repeat(getI, good) || !errors.Is(err, errDenied) {
			t.Fatalf("seed %d, connection %d: %q arrived, %v", seed, i, got, err)
		}
		if r := c.Last(t); r.Reason != "not_in_policy" || r.Message != "https GET images /secret" {
			t.Fatalf("seed %d, connection %d: verdict %+v", seed, i, r)
		}
	}
}

// Once our own records have taken the place of the program's, one of its own would use a nonce again.
func TestNoRecordOfTheProgramsLeavesBehindOurs(t *testing.T) {
	for name, version := range versions {
		for _, mode := range []string{"enforce", "audit"} {
			g, c, _ := invoked(t, mode)
			s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test", MaxVersion: version}), &tls.Config{})
			if _, err := io.WriteString(s, getI); err != nil {
				t.Fatal(err)
			}
			record := "\x17\x03\x03\x00\x40" + strings.Repeat("r", 64)

			send, outcome := s.out.Write([]byte(record + record))

			if len(send) != 0 || outcome != Denied {
				t.Errorf("%s, %s: %d bytes left, outcome %d", name, mode, len(send), outcome)
			}
			if r := c.Last(t); r.Reason != "no_key" || r.WouldDeny {
				t.Errorf("%s, %s: verdict %+v", name, mode, r)
			}
			if send, outcome := s.out.Write([]byte(record)); len(send) != 0 || outcome != Denied {
				t.Errorf("%s, %s: %d more bytes left, outcome %d", name, mode, len(send), outcome)
			}
		}
	}
}

// An upkeep record beyond the bound is marked in audit, and what follows is read and sealed as before.
func TestUpkeepBeyondItsBoundLetsNoRecordOfTheProgramsLeave(t *testing.T) {
	g, c, _ := invoked(t, "audit")
	s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test"}), &tls.Config{})
	if _, err := io.WriteString(s, getI); err != nil {
		t.Fatal(err)
	}
	now := g.now()
	g.now = func() time.Time { return now }
	s.out.rate = bucket{used: supportBurst, filled: now}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if r := c.Last(t); r.Reason != "rate_bound" || !r.WouldDeny {
		t.Errorf("verdict %+v", r)
	}

	send, outcome := s.out.Write([]byte("\x17\x03\x03\x00\x40" + strings.Repeat("r", 64)))

	if len(send) != 0 || outcome != Denied {
		t.Errorf("%d bytes left, outcome %d", len(send), outcome)
	}
	if got := s.arrived(); got != getI || s.end != io.EOF {
		t.Errorf("%q arrived, and the connection ended with %v", got, s.end)
	}
}
