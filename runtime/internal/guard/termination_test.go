package guard

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

const terminate = `"tls":"terminate"`

// ended is a TLS connection of a program that the guard ends: a real client in front of it, a real server behind it.
type ended struct {
	t   testing.TB
	g   *Guard
	c   *guardtest.Controller
	in  *Incoming
	out *Outgoing

	program net.Conn  // what the client of TLS reads and writes
	client  *tls.Conn // of the program
	roots   *x509.CertPool
	news    chan struct{}

	mu     sync.Mutex
	plain  strings.Builder // what the server has read
	server *tls.Conn
	failed error // of the server's connection
	done   chan struct{}
}

// socket is the program's side of the connection, as a guarded endpoint makes it.
type socket struct {
	net.Conn // to the server
	e        *ended
	reset    bool
	started  *Termination
}

func (s *socket) Write(b []byte) (int, error) {
	if s.reset {
		return 0, errDenied
	}
	if s.started != nil {
		for !s.started.HasRoom() {
			<-s.e.news
		}
	}
	send, outcome := s.e.out.Write(bytes.Clone(b))
	if len(send) > 0 {
		s.Conn.Write(send)
	}
	s.e.out.Sent()
	if outcome == Denied {
		s.Conn.Close()
		return 0, errDenied
	}
	if termination := s.e.out.Termination(); termination != nil && s.started == nil {
		wake := func() {
			select {
			case s.e.news <- struct{}{}:
			default:
			}
		}
		termination.Prepare(&testLine{s.Conn, s}, wake, wake)
		s.started = termination
		go termination.Run()
	}
	return len(b), nil
}

func (s *socket) Read(b []byte) (int, error) {
	if s.started == nil {
		return s.Conn.Read(b)
	}
	deadline := time.After(10 * time.Second)
	for {
		n, _, end := s.started.Read(sliceWriter{b}, false)
		if n > 0 || end != nil {
			return n, end
		}
		select {
		case <-s.e.news:
		case <-time.After(time.Millisecond):
		case <-deadline:
			return 0, errors.New("nothing came")
		}
	}
}

func (s *socket) Close() error {
	if s.started != nil {
		s.started.Close()
		return nil
	}
	return s.Conn.Close()
}

// SetWriteDeadline is what crypto/tls calls when it closes its side: the connection to the server is not meant.
func (*socket) SetWriteDeadline(time.Time) error { return nil }

type sliceWriter struct{ b []byte }

func (w sliceWriter) Write(b []byte) (int, error) { return copy(w.b, b), nil }

type testLine struct {
	net.Conn
	s *socket
}

func (l *testLine) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	if err != nil && err != io.EOF {
		err = ErrReset
	}
	return n, err
}
func (l *testLine) CloseWrite() { l.Conn.(*net.TCPConn).CloseWrite() }
func (l *testLine) Abort(bool) {
	l.Conn.(*net.TCPConn).SetLinger(0)
	l.Conn.Close()
}

// trusting is a guard that ends TLS, in the middle of an invocation, whose agent trusts the server's certificate.
func trusting(t testing.TB, mode string, server tls.Certificate, annotated bool) (*Guard, *guardtest.Controller, *Incoming) {
	t.Helper()
	c := guardtest.NewController()
	welcome := guardtest.WelcomeEdited(t, mode, `"tls":"open"`, terminate)
	if server.Certificate != nil {
		welcome.Roots = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate[0]})
	}
	identity := testIdentity
	identity.Trusting = annotated
	g, err := New(identity, guardtest.PublicKey, welcome, c)
	if err != nil {
		t.Fatal(err)
	}
	in, _ := g.Accept(8080, client)
	if a := in.Admit([]byte(postRequest), nil); a.Release == nil {
		t.Fatalf("the request was not released: %+v", a)
	}
	return g, c, in
}

// end makes a terminated connection to a server that answers each request with 204 by HTTP/1.1, and by HTTP/2 where both
// speak it. trusts are the programs' roots in PEM; nil: what the guard offers.
func end(t testing.TB, mode string, certificate tls.Certificate, roots tls.Certificate, config *tls.Config, trusts []byte, protocols ...string) *ended {
	t.Helper()
	e := &ended{t: t, news: make(chan struct{}, 1), done: make(chan struct{})}
	e.g, e.c, e.in = trusting(t, mode, roots, trusts == nil)
	e.out = connect(t, e.g, images)
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go e.serve(listener, &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: protocols, MaxVersion: config.MaxVersion})
	raw, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close(); e.out.Close() })
	raw.SetDeadline(time.Now().Add(2 * HoldMax))
	if trusts == nil {
		trusts = e.g.Trust()
	}
	config.RootCAs = x509.NewCertPool()
	config.RootCAs.AppendCertsFromPEM(trusts)
	e.roots = config.RootCAs
	config.ServerName = "images.test"
	e.program = &socket{Conn: raw, e: e}
	e.client = tls.Client(e.program, config)
	return e
}

func (e *ended) serve(listener net.Listener, config *tls.Config) {
	defer close(e.done)
	conn, err := listener.Accept()
	listener.Close()
	if err != nil {
		e.failed = err
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * HoldMax))
	e.server = tls.Server(conn, config)
	buffer := make([]byte, 64<<10)
	for {
		n, err := e.server.Read(buffer)
		e.mu.Lock()
		e.plain.Write(buffer[:n])
		e.mu.Unlock()
		if n > 0 && strings.HasSuffix(string(buffer[:n]), "\r\n\r\n") {
			io.WriteString(e.server, noContentAnswer)
		}
		if err != nil {
			e.failed = err
			return
		}
	}
}

// until waits for what the server reads.
func (e *ended) until(claim func() bool) {
	e.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		e.mu.Lock()
		holds := claim()
		e.mu.Unlock()
		if holds {
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("the server has read %q", e.plain.String())
		}
	}
}

func (e *ended) arrived() string {
	e.program.Close()
	<-e.done
	return e.plain.String()
}

// answered sends a request and reads its answer.
func (e *ended) answered(request string) error {
	if _, err := io.WriteString(e.client, request); err != nil {
		return err
	}
	answer, err := http.ReadResponse(bufio.NewReader(e.client), nil)
	if err == nil && answer.StatusCode != http.StatusNoContent {
		err = errors.New(answer.Status)
	}
	return err
}

func TestARequestOfAProgramThatLogsNoKeysIsJudgedWhereItsTLSEnds(t *testing.T) {
	for name, version := range versions {
		server := guardtest.Certificate(t, "images.test")
		e := end(t, "enforce", server, server, &tls.Config{MaxVersion: version}, nil)

		for range 3 {
			if err := e.answered(getI); err != nil {
				t.Fatalf("%s: %v, %+v", name, err, e.c.Verdicts())
			}
		}

		if got := e.arrived(); got != strings.Repeat(getI, 3) || e.failed != io.EOF {
			t.Errorf("%s: %q arrived, and the connection ended with %v", name, got, e.failed)
		}
		r := e.c.Last(t)
		if r.Kind != "https" || r.Message != "https GET images /i" || r.Peer != "images" || !r.Allowed || r.Line != 4 {
			t.Errorf("%s: verdict %+v", name, r)
		}
		if issuer := e.client.ConnectionState().PeerCertificates[0].Issuer.CommonName; !strings.HasPrefix(issuer, "Kalium sandbox ") {
			t.Errorf("the program saw a certificate of %s", issuer)
		}
	}
}

func TestADeniedRequestWhereTLSEndsLeavesNoByte(t *testing.T) {
	for bad, reason := range map[string]string{
		"GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n": "not_in_policy",
		"GET /i HTTP/1.1\r\nHost: images.other:4443\r\n\r\n":     "unknown_peer",
		"\x00\x01": "malformed",
	} {
		server := guardtest.Certificate(t, "images.test")
		e := end(t, "enforce", server, server, &tls.Config{}, nil)

		err := e.answered(bad)

		if !errors.Is(err, ErrReset) {
			t.Errorf("%q: %v", bad, err)
		}
		if r := e.c.Last(t); r.Reason != reason || r.Kind != "https" {
			t.Errorf("%q: verdict %+v", bad, r)
		}
		if got := e.arrived(); got != "" {
			t.Errorf("%q arrived", got)
		}
	}
}

func TestAuditPassesWhereTLSEndsWhatEnforceWouldDeny(t *testing.T) {
	server := guardtest.Certificate(t, "images.test")
	e := end(t, "audit", server, server, &tls.Config{}, nil)
	secret := "GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n"

	if err := errors.Join(e.answered(getI), e.answered(secret)); err != nil {
		t.Fatal(err)
	}

	if r := e.c.Last(t); r.Reason != "not_in_policy" || !r.WouldDeny {
		t.Errorf("verdict %+v", r)
	}
	if got := e.arrived(); got != getI+secret {
		t.Errorf("%q arrived", got)
	}
}

func TestAServerThatDoesNotProveItsNameHearsNoRequest(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		right := guardtest.Certificate(t, "images.test")
		for name, try := range map[string]struct{ has, trusted tls.Certificate }{
			"nobody signed it":   {guardtest.Certificate(t, "images.test"), right},
			"another name's":     {guardtest.Certificate(t, "evil.test"), tls.Certificate{}},
			"no roots were told": {right, tls.Certificate{}},
		} {
			if name == "another name's" {
				try.trusted = try.has
			}
			e := end(t, mode, try.has, try.trusted, &tls.Config{}, nil)

			err := e.answered(getI)

			want := "unknown_peer"
			if try.trusted.Certificate == nil {
				want = "unsupported"
			}
			if r := e.c.Last(t); err == nil || r.Reason != want || r.Allowed {
				t.Errorf("%s, %s: %v, verdict %+v", mode, name, err, r)
			}
			if got := e.arrived(); got != "" {
				t.Errorf("%s, %s: %q arrived", mode, name, got)
			}
		}
	}
}

func TestAProgramThatDoesNotTrustTheGuardIsToldWhatIsMissing(t *testing.T) {
	server := guardtest.Certificate(t, "images.test")
	own := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate[0]})
	e := end(t, "enforce", server, server, &tls.Config{}, own)

	err := e.answered(getI)

	if err == nil {
		t.Error("the program accepted another authority")
	}
	if got := e.arrived(); got != "" {
		t.Errorf("%q arrived", got)
	}
	if r := e.c.Last(t); r.Reason != "policy_mismatch" || !strings.Contains(r.Message, "kalium.io/tls: terminate") {
		t.Errorf("verdict %+v", r)
	}
}

func TestTheServerChoosesTheProtocolOfBothSides(t *testing.T) {
	for _, try := range []struct {
		offered, spoken []string
		want            string
	}{
		{[]string{"h2", "http/1.1"}, []string{"h2", "http/1.1"}, "h2"},
		{[]string{"h2", "http/1.1"}, []string{"http/1.1"}, "http/1.1"},
		{[]string{"http/1.1"}, []string{"h2", "http/1.1"}, "http/1.1"},
		{[]string{"h2", "http/1.1"}, nil, ""},
		{nil, []string{"h2", "http/1.1"}, ""},
	} {
		server := guardtest.Certificate(t, "images.test")
		e := end(t, "enforce", server, server, &tls.Config{NextProtos: try.offered}, nil, try.spoken...)

		err := e.client.Handshake()

		if got := e.client.ConnectionState().NegotiatedProtocol; err != nil || got != try.want {
			t.Errorf("%q with %q: %q, %v", try.offered, try.spoken, got, err)
			continue
		}
		sent, bad := getI, "GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n"
		if try.want == "h2" {
			h := newH2()
			h.request(1, h2EndStream, pseudo("GET", "images.test:4443", "/i")...)
			sent = h.take()
			h.request(3, h2EndStream, pseudo("GET", "images.test:4443", "/secret")...)
			bad = h.take()
		}
		io.WriteString(e.client, sent)
		e.until(func() bool { return e.plain.String() == sent })
		io.WriteString(e.client, bad)
		io.Copy(io.Discard, e.client)
		if got := e.arrived(); got != sent {
			t.Errorf("%s: %q arrived", try.want, got)
		}
		if r := e.c.Last(t); r.Reason != "not_in_policy" {
			t.Errorf("%s: verdict %+v", try.want, r)
		}
	}
}

func TestAHelloForAnotherNameReachesNobody(t *testing.T) {
	server := guardtest.Certificate(t, "images.test")
	e := end(t, "enforce", server, server, &tls.Config{}, nil)
	e.client = tls.Client(e.program, &tls.Config{ServerName: "evil.test", InsecureSkipVerify: true})

	err := e.client.Handshake()

	if r := e.c.Last(t); !errors.Is(err, errDenied) || r.Reason != "sni_mismatch" {
		t.Errorf("%v, verdict %+v", err, r)
	}
	if e.g.terminations.Load() != 0 {
		t.Error("it was terminated")
	}
}

func TestWhatWasTakenIsSentBehindACloseWhereTLSEnds(t *testing.T) {
	server := guardtest.Certificate(t, "images.test")
	e := end(t, "enforce", server, server, &tls.Config{}, nil)
	if err := e.client.Handshake(); err != nil {
		t.Fatal(err)
	}

	io.WriteString(e.client, strings.Repeat(getI, 500))
	e.client.Close()

	if got := e.arrived(); got != strings.Repeat(getI, 500) || e.failed != io.EOF {
		t.Errorf("%d bytes arrived, and the connection ended with %v", len(got), e.failed)
	}
	for deadline := time.Now().Add(patience); e.g.terminations.Load() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the termination goes on")
		}
	}
}

func TestAHeadThatIsCutWhereTLSEndsDoesNotLeave(t *testing.T) {
	server := guardtest.Certificate(t, "images.test")
	e := end(t, "enforce", server, server, &tls.Config{}, nil)

	io.WriteString(e.client, getI+"GET /i HTTP/1.1\r\nHost")
	e.client.CloseWrite()
	io.Copy(io.Discard, e.client)

	if got := e.arrived(); !strings.HasPrefix(getI, got) { // a reset may overtake what was judged before
		t.Errorf("%q arrived", got)
	}
	if r := e.c.Last(t); r.Reason != "malformed" {
		t.Errorf("verdict %+v", r)
	}
}

func TestALargeAnswerWaitsForAProgramThatReadsSlowly(t *testing.T) {
	server := guardtest.Certificate(t, "images.test")
	e := end(t, "enforce", server, server, &tls.Config{}, nil)
	if err := e.answered(getI); err != nil {
		t.Fatal(err)
	}
	const size = 4 << 20
	go e.server.Write(bytes.Repeat([]byte("x"), size))
	time.Sleep(50 * time.Millisecond)

	if n, _ := e.program.(*socket).started.Unread(); n > pipeBytes+(20<<10) {
		t.Errorf("%d bytes wait", n)
	}
	if n, err := io.CopyN(io.Discard, e.client, size); n != size || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestTerminatedConnectionsAreBounded(t *testing.T) {
	server := guardtest.Certificate(t, "images.test")
	e := end(t, "audit", server, server, &tls.Config{}, nil)
	e.g.terminations.Store(terminationsMax)

	err := e.client.Handshake()

	if r := e.c.Last(t); !errors.Is(err, errDenied) || r.Reason != "rate_bound" {
		t.Errorf("%v, verdict %+v", err, r)
	}
}

func TestTheAuthorityVouchesForOneHostAtATime(t *testing.T) {
	a, err := newAuthority("0123456789abcdef", nil)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	first, err := a.leaf("a.test")
	if err != nil {
		t.Fatal(err)
	}

	for host, valid := range map[string]bool{"a.test": true, "b.test": false} {
		if _, err := first.Leaf.Verify(x509.VerifyOptions{DNSName: host, Roots: pool}); (err == nil) != valid {
			t.Errorf("%s: %v", host, err)
		}
	}
	if again, _ := a.leaf("a.test"); again != first {
		t.Error("it is made for each connection")
	}
	first.Leaf.NotAfter = time.Now().Add(time.Hour)
	if again, _ := a.leaf("a.test"); again == first {
		t.Error("it is kept until it ends")
	}
	for i := range 2 * leavesMax {
		if _, err := a.leaf(fmt.Sprintf("h%d.test", i)); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(a.leaves); n > leavesMax {
		t.Errorf("%d certificates are kept", n)
	}
	if a.cert.MaxPathLen != 0 || !a.cert.MaxPathLenZero || a.cert.KeyUsage != x509.KeyUsageCertSign {
		t.Error("it may do more than sign leaves")
	}
}

func TestWithoutKeysTheWayOutIsNamed(t *testing.T) {
	for annotated, text := range map[bool]string{false: "opens it", true: "opens it; the bundle's annotation kalium.io/tls says so, and the policy does not"} {
		c := guardtest.NewController()
		identity := testIdentity
		identity.Trusting = annotated
		g, err := New(identity, guardtest.PublicKey, guardtest.Welcome(t, "enforce"), c)
		if err != nil {
			t.Fatal(err)
		}
		s := dialTLS(t, g, images, &tls.Config{ServerName: "images.test"}, &tls.Config{})

		_, err = io.WriteString(s, getI)

		r := c.Last(t)
		if !errors.Is(err, errDenied) || r.Reason != "no_key" || !strings.HasSuffix(r.Message, "the program logs no keys: `tls: terminate` for this function "+text) {
			t.Errorf("%v, verdict %+v", err, r)
		}
	}
}

// What does not become whole in time is refused: a request, and the program's part of the handshake.
func TestWhatComesSlowlyWhereTLSEndsIsRefusedInTime(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for HoldMax")
	}
	t.Parallel()
	server := guardtest.Certificate(t, "images.test")
	slow := end(t, "enforce", server, server, &tls.Config{}, nil)
	stuck := end(t, "enforce", server, server, &tls.Config{}, nil)
	began := time.Now()
	if _, err := io.WriteString(slow.client, getI[:len(getI)-1]); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stuck.program, guardtest.ClientHello("images.test", supportedVersions, keyShare, groups, signatures)); err != nil {
		t.Fatal(err)
	}

	for name, e := range map[string]*ended{"a head": slow, "a handshake": stuck} {
		for len(e.c.Verdicts()) < 2 && time.Since(began) < HoldMax+5*time.Second {
			time.Sleep(10 * time.Millisecond)
		}
		if r := e.c.Last(t); r.Reason != "held_too_long" || time.Since(began) < HoldMax-time.Second {
			t.Errorf("%s: after %v: %+v", name, time.Since(began), r)
		}
		if got := e.arrived(); got != "" {
			t.Errorf("%s: %q arrived", name, got)
		}
	}
}

// What a hello of TLS 1.3 needs for a server to answer it, in the wire's form; the key is X25519's base point.
const (
	supportedVersions = "\x00\x2b\x00\x03\x02\x03\x04"
	keyShare          = "\x00\x33\x00\x26\x00\x24\x00\x1d\x00\x20\x09" + "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
		"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	groups     = "\x00\x0a\x00\x04\x00\x02\x00\x1d"
	signatures = "\x00\x0d\x00\x04\x00\x02\x04\x03"
)

// BenchmarkConnection is a connection with one request, with the client and the server in it: ended in the guard, and
// without a guard in between.
func BenchmarkConnection(b *testing.B) {
	server := guardtest.Certificate(b, "images.test")
	b.Run("terminated", func(b *testing.B) {
		for b.Loop() {
			e := end(b, "audit", server, server, &tls.Config{}, nil)
			if err := e.answered(getI); err != nil {
				b.Fatal(err)
			}
			e.arrived()
		}
	})
	b.Run("direct", func(b *testing.B) {
		for b.Loop() {
			e := end(b, "audit", server, server, &tls.Config{}, nil)
			e.program = e.program.(*socket).Conn
			e.client = tls.Client(e.program, &tls.Config{ServerName: "images.test", RootCAs: e.roots})
			if err := e.answered(getI); err != nil {
				b.Fatal(err)
			}
			e.arrived()
		}
	})
}

// A shutdown that began before the hello came may ask, too, what becomes of what is held.
func TestWhatIsHeldWhereTLSEndsNeverLeavesInClear(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		certificate := guardtest.Certificate(t, "images.test")
		e := end(t, mode, certificate, certificate, &tls.Config{}, nil)
		if _, err := io.WriteString(e.client, getI+getI[:20]); err != nil {
			t.Fatal(err)
		}
		e.until(func() bool { return e.plain.String() == getI })

		send, outcome := e.out.Expire(true)

		if len(send) != 0 || outcome != Allowed {
			t.Errorf("%s: %q left in clear, outcome %d", mode, send, outcome)
		}
		if _, err := io.WriteString(e.client, getI[20:]); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
		e.until(func() bool { return e.plain.String() == getI+getI })
	}
}
