package tlsopen

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/wire"
)

const serverName = "peer.test"

// patience is for a machine that does much else; nothing waits so long otherwise.
const patience = time.Minute

// certificates are one for each kind of key: the suites of TLS 1.2 differ by it.
var certificates = sync.OnceValue(func() []tls.Certificate {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	modulus, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return []tls.Certificate{certificate(&ec.PublicKey, ec), certificate(&modulus.PublicKey, modulus)}
})

func certificate(public, private any) tls.Certificate {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: serverName}, DNSNames: []string{serverName},
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}
}

// guarded is a client's connection with the guard in it.
type guarded struct {
	net.Conn
	client *Client
	cuts   *mathrand.Rand // nil: each write and read as it comes
	reseal bool           // false: opened, and then sent as it came

	onHello   func(*Hello)
	onControl func()

	held    []byte
	plain   bytes.Buffer
	kinds   []UnitKind
	hellos  []*Hello
	refused error
}

func (g *guarded) piece(n int) int {
	if g.cuts == nil || n < 2 {
		return n
	}
	if g.cuts.IntN(3) == 0 {
		return 1 + g.cuts.IntN(min(n, 30))
	}
	return 1 + g.cuts.IntN(n)
}

func (g *guarded) Write(b []byte) (int, error) {
	for at := 0; at < len(b); {
		n := g.piece(len(b) - at)
		g.held = append(g.held, b[at:at+n]...)
		at += n
		out, err := g.judge()
		if len(out) > 0 {
			if _, err := g.Conn.Write(out); err != nil {
				return 0, err
			}
		}
		if err != nil {
			g.refused = err
			_ = g.Conn.Close()
			return 0, err
		}
	}
	return len(b), nil
}

// judge takes all whole units from held and returns what leaves.
func (g *guarded) judge() (out []byte, err error) {
	for {
		raw := bytes.Clone(g.held)
		records := 0
		g.client.OnRecord = func() { records++ }
		n, u, err := g.client.Next(g.held)
		if err == wire.ErrShort {
			if !bytes.Equal(raw, g.held) {
				return out, errors.New("bytes of a short record were changed")
			}
			return out, nil
		}
		if err != nil {
			if !g.client.Opened() && !bytes.Equal(raw, g.held) {
				return out, errors.New("bytes of a refused record were changed")
			}
			return out, err
		}
		g.kinds = append(g.kinds, u.Kind)
		if wanted := u.Kind != KindHello; wanted != (records == 1) {
			return out, fmt.Errorf("%d records were announced for a unit of kind %d", records, u.Kind)
		}
		switch u.Kind {
		case KindHello:
			g.hellos = append(g.hellos, u.Hello)
			if g.onHello != nil {
				g.onHello(u.Hello)
			}
			out = append(out, g.held[:n]...)
		case KindPass:
			out = append(out, g.held[:n]...)
		case KindData:
			g.plain.Write(u.Data)
			if g.reseal {
				out = g.client.Seal(out, u.Data)
			} else {
				out = append(out, raw[:n]...)
			}
		case KindControl:
			if g.onControl != nil {
				g.onControl()
			}
			if g.reseal {
				out = g.client.SealControl(out)
			} else {
				out = append(out, raw[:n]...)
			}
		default:
			return out, fmt.Errorf("a unit of kind %d", u.Kind)
		}
		g.held = g.held[n:]
	}
}

func (g *guarded) Read(b []byte) (int, error) {
	n, err := g.Conn.Read(b[:g.piece(len(b))])
	if !g.client.InboundDone() {
		g.client.Inbound(b[:n])
	}
	return n, err
}

// echo is a server that returns what it reads, in records as it likes, and tells in seen what it read.
type echo struct {
	address string
	mu      sync.Mutex
	seen    bytes.Buffer
	err     error
	ended   chan struct{} // one for each connection
}

func startEcho(t testing.TB, config *tls.Config) *echo {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	e := &echo{address: listener.Addr().String(), ended: make(chan struct{}, 16)}
	config.Certificates = certificates()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go e.serve(tls.Server(conn, config))
		}
	}()
	return e
}

func (e *echo) serve(conn *tls.Conn) {
	defer func() { e.ended <- struct{}{} }()
	defer func() { _ = conn.Close() }()
	b := make([]byte, 64<<10)
	for {
		n, err := conn.Read(b)
		e.mu.Lock()
		e.seen.Write(b[:n])
		if err != nil && err != io.EOF {
			e.err = err
		}
		e.mu.Unlock()
		if err != nil {
			return
		}
		if _, err := conn.Write(b[:n]); err != nil {
			return
		}
	}
}

func (e *echo) wait(t testing.TB) (seen string, err error) {
	t.Helper()
	select {
	case <-e.ended:
	case <-time.After(patience):
		t.Fatal("the server does not end")
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.seen.String(), e.err
}

func dial(t testing.TB, address string, keys *Keys, cuts *mathrand.Rand) *guarded {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	g := &guarded{Conn: conn, client: NewClient(keys), cuts: cuts, reseal: true}
	t.Cleanup(func() { _ = conn.Close(); g.client.Close() })
	return g
}

func clientConfig(keys io.Writer) *tls.Config {
	return &tls.Config{ServerName: serverName, InsecureSkipVerify: true, KeyLogWriter: keys} // the certificate is not the point
}

// exchange sends parts, each in a record of its own or in several, and reads each back.
func exchange(t testing.TB, conn *tls.Conn, parts ...[]byte) {
	t.Helper()
	for _, part := range parts {
		if _, err := conn.Write(part); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(part))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, part) {
			t.Fatalf("%d bytes come back otherwise: %v", len(part), err)
		}
	}
}

func parts() [][]byte {
	var all [][]byte
	for i, n := range []int{200, 1, 1000, 16384, 40000, 3} {
		all = append(all, bytes.Repeat([]byte{byte('a' + i)}, n))
	}
	return all
}

func TestRealHandshakes(t *testing.T) {
	type variant struct {
		name   string
		client func(*tls.Config)
		server func(*tls.Config)
		hellos int
	}
	variants := []variant{
		{name: "TLS 1.3", hellos: 1},
		{name: "TLS 1.3, HelloRetryRequest", hellos: 2,
			client: func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP384} },
			server: func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }},
		{name: "TLS 1.3, client certificate", hellos: 1,
			client: func(c *tls.Config) { c.Certificates = certificates()[1:] },
			server: func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }},
		{name: "TLS 1.3, empty client certificate", hellos: 1,
			server: func(c *tls.Config) { c.ClientAuth = tls.RequestClientCert }},
		{name: "TLS 1.2, client certificate", hellos: 1,
			client: func(c *tls.Config) { c.MaxVersion, c.Certificates = tls.VersionTLS12, certificates()[1:] },
			server: func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }},
	}
	for number, suite := range suites {
		if name := tls.CipherSuiteName(number); !suite.tls13 && name[:2] != "0x" {
			variants = append(variants, variant{name: name, hellos: 1, client: func(c *tls.Config) {
				c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{number}
			}, server: func(c *tls.Config) { c.CipherSuites = []uint16{number} }})
		}
	}
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			for seed := range uint64(6) {
				serverConfig := &tls.Config{}
				if v.server != nil {
					v.server(serverConfig)
				}
				server := startEcho(t, serverConfig)
				keys := NewKeys()
				config := clientConfig(keys.Writer())
				if v.client != nil {
					v.client(config)
				}
				var cuts *mathrand.Rand
				if seed > 0 {
					cuts = mathrand.New(mathrand.NewPCG(seed, 1))
				}
				g := dial(t, server.address, keys, cuts)
				conn := tls.Client(g, config)
				exchange(t, conn, parts()...)
				if err := conn.Close(); err != nil {
					t.Fatal(err)
				}
				want := string(bytes.Join(parts(), nil))
				if seen, err := server.wait(t); err != nil || seen != want || g.plain.String() != want {
					t.Fatalf("the server saw %d bytes and the guard %d of %d: %v", len(seen), g.plain.Len(), len(want), err)
				}
				if len(g.hellos) != v.hellos || g.hellos[0].SNI != serverName || len(g.held) != 0 {
					t.Fatalf("%d hellos, %d bytes held", len(g.hellos), len(g.held))
				}
				if g.kinds[len(g.kinds)-1] != KindControl {
					t.Fatal("the close_notify is missing")
				}
				if len(keys.entries) != 0 {
					t.Fatal("keys stay behind")
				}
			}
		})
	}
}

type writerFunc func(line string)

func (f writerFunc) Write(p []byte) (int, error) {
	f(string(p))
	return len(p), nil
}

func TestResumption(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			server := startEcho(t, &tls.Config{MaxVersion: version})
			keys := NewKeys()
			log := keys.Writer()
			var master string
			config := clientConfig(writerFunc(func(line string) {
				if fields := strings.Fields(line); fields[0] == "CLIENT_RANDOM" {
					master = fields[2]
				}
				_, _ = io.WriteString(log, line)
			}))
			config.ClientSessionCache = tls.NewLRUClientSessionCache(4)
			for i := range 3 {
				g := dial(t, server.address, keys, mathrand.New(mathrand.NewPCG(uint64(i), 2)))
				if version == tls.VersionTLS12 && i > 0 {
					// OpenSSL logs the master secret of a resumed session, Go does not.
					g.onHello = func(hello *Hello) { _, _ = fmt.Fprintf(log, "CLIENT_RANDOM %x %s\n", hello.Random, master) }
				}
				conn := tls.Client(g, config)
				exchange(t, conn, parts()...)
				if conn.ConnectionState().DidResume != (i > 0) {
					t.Fatalf("connection %d: resumed is %v", i, i == 0)
				}
				if err := conn.Close(); err != nil {
					t.Fatal(err)
				}
				if _, err := server.wait(t); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
