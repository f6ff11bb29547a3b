package tlshello

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/wire"
)

// follow gives data to Records in pieces of at most size bytes and returns what passed before an error.
func follow(name string, data []byte, size int) (passed int, err error) {
	r := NewRecords(&Hello{SNI: name})
	held := 0 // bytes behind passed that were shown before
	for passed < len(data) {
		held = min(held+size, len(data)-passed)
		n, err := r.Next(data[passed : passed+held])
		if err == wire.ErrShort && passed+held < len(data) {
			continue
		}
		if err != nil {
			return passed, err
		}
		passed, held = passed+n, held-n
	}
	return passed, nil
}

// tap keeps what a client sends.
type tap struct {
	net.Conn
	mu   sync.Mutex
	sent []byte
}

func (c *tap) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.sent = append(c.sent, b...)
	c.mu.Unlock()
	return c.Conn.Write(b)
}

func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"images.test"}, NotAfter: time.Now().Add(time.Hour)}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}
}

// exchange is what Go's client sends in one connection to Go's server, with some bytes of application data each way.
func exchange(t *testing.T, client, server *tls.Config) []byte {
	t.Helper()
	// Both sides may write at once, which a net.Pipe does not let them.
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	near, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	tapped := &tap{Conn: near}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(far, server)
		err := conn.HandshakeContext(ctx)
		if err == nil {
			_, err = io.CopyN(conn, conn, 20_000)
		}
		if err == nil {
			_, err = io.Copy(io.Discard, conn) // to the client's end
		}
		done <- err
	}()
	conn := tls.Client(tapped, client)
	if err := conn.HandshakeContext(ctx); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = conn.Write(make([]byte, 20_000)) }() // a failure shows in what comes back
	if _, err := io.CopyN(io.Discard, conn, 20_000); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	tapped.mu.Lock()
	defer tapped.mu.Unlock()
	return tapped.sent
}

func TestTheRecordsOfRealClientsPass(t *testing.T) {
	pair := []tls.Certificate{certificate(t)}
	server12 := &tls.Config{Certificates: pair, MaxVersion: tls.VersionTLS12}
	server13 := &tls.Config{Certificates: pair}
	asking := &tls.Config{Certificates: pair, MaxVersion: tls.VersionTLS12, ClientAuth: tls.RequireAnyClientCert}
	retrying := &tls.Config{Certificates: pair, CurvePreferences: []tls.CurveID{tls.CurveP384}}
	client := func(change func(*tls.Config)) *tls.Config {
		c := &tls.Config{ServerName: "images.test", InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(4)}
		change(c)
		return c
	}
	plain, resumed12, resumed13 := client(func(*tls.Config) {}), client(func(*tls.Config) {}), client(func(*tls.Config) {})
	exchange(t, resumed12, server12)
	exchange(t, resumed13, server13)
	hellos := map[string]int{"a retry": 2}
	for name, data := range map[string][]byte{
		"TLS 1.2":                    exchange(t, plain, server12),
		"TLS 1.2 resumed":            exchange(t, resumed12, server12),
		"TLS 1.2 with a certificate": exchange(t, client(func(c *tls.Config) { c.Certificates = pair }), asking),
		"TLS 1.3":                    exchange(t, client(func(*tls.Config) {}), server13),
		"TLS 1.3 resumed":            exchange(t, resumed13, server13),
		"a retry":                    exchange(t, client(func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP384} }), retrying),
	} {
		_, n, err := Parse(data)
		if err != nil {
			t.Fatal(name, err)
		}
		rest := data[n:]
		count := 1
		for i := 0; i+5 < len(rest); i += 5 + int(rest[i+3])<<8 + int(rest[i+4]) {
			if rest[i] == recordHandshake && rest[i+5] == messageClientHello && rest[i+9] == 3 {
				count++
			}
		}
		if want := max(hellos[name], 1); count != want {
			t.Errorf("%s: %d hellos, want %d", name, count, want)
		}
		for _, size := range []int{1, 7, len(rest)} {
			if passed, err := follow("images.test", rest, size); err != nil || passed != len(rest) {
				t.Errorf("%s in pieces of %d: %d of %d bytes, %v", name, size, passed, len(rest), err)
			}
		}
	}
}

func typed(kind byte, fragment []byte) []byte {
	r := record(fragment)
	r[0], r[2] = kind, 3
	return r
}

func TestNoFurtherHelloNamesAnotherServer(t *testing.T) {
	change := typed(recordChangeCipherSpec, []byte{1})
	finished := typed(recordHandshake, make([]byte, 40))
	exchanged := typed(recordHandshake, []byte{messageClientKeyExchange, 0, 0, 1, 0})
	data := typed(recordApplicationData, make([]byte, 30))
	other := good(sni("elsewhere.test"))
	cut := func(at int) []byte {
		m := other.message()
		return slices.Concat(record(m[:at]), record(m[at:]))
	}
	old := other
	old.version = 0x0301
	for what, parts := range map[string][][]byte{
		"at once":                       {other.build()},
		"cut":                           {cut(1)},
		"behind a change":               {change, other.build()},
		"cut behind a change":           {change, cut(1)},
		"cut later behind a change":     {change, cut(20)},
		"of an old version":             {change, old.build()},
		"without a name":                {good(extension(43, []byte{2, 3, 4})).build()},
		"with another inside":           {good(sni("images.test"), extension(extensionECH, []byte{0})).build()},
		"with early data":               {good(sni("images.test"), extension(extensionEarlyData, nil)).build()},
		"a third one":                   {good(sni("images.test")).build(), good(sni("images.test")).build()},
		"behind the second":             {good(sni("images.test")).build(), change, other.build()},
		"behind data":                   {change, data, other.build()},
		"behind data without a change":  {data, other.build()},
		"a renegotiation":               {exchanged, change, finished, data, finished},
		"a renegotiation after a short": {change, finished, finished},
	} {
		whole := slices.Concat(parts...)
		last := len(whole) - len(parts[len(parts)-1])
		for _, size := range []int{1, len(whole)} {
			if passed, err := follow("images.test", whole, size); err == nil || err == wire.ErrShort || passed != last {
				t.Errorf("%s in pieces of %d: %d bytes passed, not %d, %v", what, size, passed, last, err)
			}
		}
	}
}

func TestWhatIsNoRecordIsRefused(t *testing.T) {
	for what, b := range map[string]string{
		"a request": "GET / HTTP/1.1\r\n\r\n", "SSL 2": "\x80\x2e\x01\x03\x01", "a heartbeat": "\x18\x03\x03\x00\x01\x01", "version 4": "\x17\x04",
		"version 3.4": "\x17\x03\x04", "no bytes": "\x17\x03\x03\x00\x00", "too many bytes": "\x17\x03\x03\xff\xff",
		"a change with a message": "\x14\x03\x03\x00\x02\x01\x01", "a change of another kind": "\x14\x03\x03\x00\x01\x02",
		"a long alert": "\x15\x03\x03\x10\x00", "a message of the server": "\x16\x03\x03\x00\x04\x02\x00\x00\x00",
		"data inside the handshake": string(typed(recordHandshake, []byte{messageCertificate, 0, 0, 1, 0})) + "\x17\x03\x03\x00\x01\x01",
	} {
		begin := strings.LastIndex(b, "\x17")
		if passed, err := follow("images.test", []byte(b), 1); err == nil || err == wire.ErrShort || passed > max(begin, 0) {
			t.Errorf("%s: %d bytes passed, %v", what, passed, err)
		}
	}
}

// FuzzRecords: the split changes nothing, and only the declared errors come out.
func FuzzRecords(f *testing.F) {
	f.Add(slices.Concat(typed(20, []byte{1}), good(sni("images.test")).build(), typed(23, make([]byte, 30))), 3)
	f.Add(slices.Concat(typed(22, []byte{16, 0, 0, 0}), typed(20, []byte{1}), typed(22, make([]byte, 40)), typed(21, []byte{1, 0})), 1)
	f.Fuzz(func(t *testing.T, data []byte, size int) {
		if len(data) == 0 || size < 1 {
			return
		}
		pieces, one := follow("images.test", data, size)
		whole, other := follow("images.test", data, len(data))
		_, refused := one.(*wire.Error)
		if one != nil && one != wire.ErrShort && !refused {
			t.Fatalf("error of another kind: %v", one)
		}
		if (one == nil) != (other == nil) || pieces != whole {
			t.Fatalf("%d bytes and %v in pieces of %d, %d and %v at once", pieces, one, size, whole, other)
		}
	})
}
