package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// patience bounds every wait of these tests. A test that passes never needs it.
const patience = 10 * time.Second

// site is a node: keys, configuration, a fake controller and, after start, an agent.
type site struct {
	t        *testing.T
	dir      string
	config   *Config
	operator ed25519.PrivateKey
	ca       *authority
	log      *syncBuffer
	resolve  lookup
	reopen   chan os.Signal
	stop     func() error // ends the agent and returns what it returned

	controller *fakeController // the first one
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// newSite makes everything but starts neither controller nor agent.
func newSite(t *testing.T) *site {
	t.Helper()
	dir := must(os.MkdirTemp("", "kalium")) // t.TempDir is too long for a socket's path
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, dir: dir, operator: private, ca: newAuthority(t), log: &syncBuffer{}, reopen: make(chan os.Signal, 1)}
	s.resolve = func(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("no resolver here") }
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the agent's log:\n%s", s.log)
		}
	})
	s.write("operator.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: must(x509.MarshalPKIXPublicKey(public))}))
	s.write("ca.crt", s.ca.pem())
	cert, key := s.ca.issue(roleAgent, "node-0")
	s.write("agent.crt", cert)
	s.write("agent.key", key)
	s.controller = newFakeController(t, s.ca, "controller")
	s.config = &Config{
		Node: "node-0", GuardSocket: dir + "/guard.sock", RegisterSocket: dir + "/register.sock",
		Controllers: []Controller{{Address: s.controller.address, Name: "controller"}},
		TLS:         TLS{CA: dir + "/ca.crt", Cert: dir + "/agent.crt", Key: dir + "/agent.key"},
		OperatorKey: dir + "/operator.pub", StateDir: dir + "/state", VerdictLog: dir + "/verdicts.jsonl",
		TimingLog: dir + "/timings.jsonl",
		Names:     map[string][]string{"gateway": {"10.137.0.1"}},
		Incoming:  Incoming{Port: 8080, Sources: []string{"10.137.0.1/32"}, HealthPath: "/_/health"},
		LeaseMS:   60000, peerUID: uint32(os.Getuid()),
	}
	return s
}

// another adds a controller to the configuration, with what the first one offers.
func (s *site) another() *fakeController {
	s.t.Helper()
	c := newFakeController(s.t, s.ca, "controller")
	s.config.Controllers = append(s.config.Controllers, Controller{Address: c.address, Name: "controller"})
	return c
}

func (s *site) write(name string, data []byte) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), data, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// start runs the agent and waits until its sockets are there.
func (s *site) start() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, s.config, newLogger(s.log), s.reopen, s.resolve) }()
	var once sync.Once
	var result error
	s.stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case result = <-ended:
			case <-time.After(patience):
				result = errors.New("the agent does not end")
			}
		})
		return result
	}
	s.t.Cleanup(func() {
		if err := s.stop(); err != nil {
			s.t.Errorf("the agent ended with %v", err)
		}
	})
	s.until("the sockets are there", func() bool {
		select {
		case err := <-ended:
			s.t.Fatalf("the agent ended at once: %v", err)
		default:
		}
		conn, err := net.Dial("unix", s.config.RegisterSocket)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
}

// startConnected starts the controller with a policy and the agent, and waits until they are connected.
func (s *site) startConnected() {
	s.t.Helper()
	s.controller.offer("shop", s.sign(compiled("shop", 1)))
	s.controller.start()
	s.start()
	s.untilConnected()
}

func (s *site) untilConnected() {
	s.t.Helper()
	s.until("the agent is connected", func() bool { return strings.Contains(s.ask(`{"op":"status"}`), `"controller":true`) })
}

// until polls a condition.
func (s *site) until(what string, holds func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			s.t.Fatalf("it does not come about that %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// ask sends one line to the register socket.
func (s *site) ask(line string) string {
	s.t.Helper()
	conn, err := net.Dial("unix", s.config.RegisterSocket)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		s.t.Fatal(err)
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		s.t.Fatalf("%s: %v", line, err)
	}
	return strings.TrimSpace(answer)
}

func registerLine(container, app, function string) string {
	return fmt.Sprintf(`{"op":"register","container":%q,"app":%q,"function":%q,"image":"localhost/kalium/x:1"}`, container, app, function)
}

func (s *site) register(container, function string) {
	s.t.Helper()
	if answer := s.ask(registerLine(container, "shop", function)); answer != `{"ok":true}` {
		s.t.Fatalf("registering %s: %s", container, answer)
	}
}

// verdictLines are the whole lines of the verdict log. A reader may see a part of a write that is under way: a line that is
// cut is one only if it stays so.
func (s *site) verdictLines() []map[string]any {
	s.t.Helper()
	return parseLines(s.t, wholeLines(s.t, s.config.VerdictLog))
}

func wholeLines(t *testing.T, path string) []byte {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) == 0 || data[len(data)-1] == '\n' || time.Now().After(deadline) {
			return data
		}
	}
}

func parseLines(t *testing.T, data []byte) []map[string]any {
	t.Helper()
	if len(data) > 0 && data[len(data)-1] != '\n' {
		t.Fatalf("the verdict log ends inside a line: %q", data[max(0, len(data)-80):])
	}
	var lines []map[string]any
	for line := range bytes.Lines(data) {
		var fields map[string]any
		if err := json.Unmarshal(line, &fields); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		lines = append(lines, fields)
	}
	return lines
}

// compiled is a policy with the functions pay and ship and one peer beside the gateway.
func compiled(app string, version int) []byte {
	return compiledWith(app, version, "shop.example")
}

func compiledWith(app string, version int, host string) []byte {
	function := `{"accept":[0],"edges":[],"invocation_timeout_ms":1000,"max_body":10,"max_inflight":1,"mode":"enforce",` +
		`"quiet_ms":200,"retire_ms":30000,"reuse":"always","start":[0],"states":1,"symbols":[],"tail_ms":10000,"tls":"open"}`
	graph := `{"edges":[],"labels":[],"start":[0],"states":1}`
	return fmt.Appendf(nil, `{"app":%q,"app_cfg":{"pay":%s,"ship":%s},"entries":["pay"],"format":"kalium-compiled/v3",`+
		`"functions":{"pay":%s,"ship":%s},"mode":"enforce","on_unavailable":{"app_edge":"deny","deadline_ms":250},`+
		`"peers":{"gateway":{"host":"gateway","port":8080,"protocol":"http","role":"gateway"},"images":{"host":%q,"port":443,"protocol":"https"}},`+
		`"source_sha256":"","version":%d}`, app, graph, graph, function, function, host, version)
}

func (s *site) sign(compiled []byte) []byte { return signWith(s.operator, compiled) }

func signWith(key ed25519.PrivateKey, compiled []byte) []byte {
	signature := ed25519.Sign(key, append([]byte(policy.SignedFormat+"\n"), compiled...))
	return must(json.Marshal(map[string]string{
		"format": policy.SignedFormat, "key_id": policy.KeyID(key.Public().(ed25519.PublicKey)),
		"policy": base64.StdEncoding.EncodeToString(compiled), "signature": base64.StdEncoding.EncodeToString(signature),
	}))
}

// authority is a certificate authority of one test.
type authority struct {
	cert *x509.Certificate
	der  []byte
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	return &authority{cert: must(x509.ParseCertificate(der)), der: der, key: key}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.der})
}

// issue makes a pair for a role: who is its node or name, and a controller's is a name of the network too.
func (a *authority) issue(role, who string) (cert, key []byte) {
	return a.issueUntil(role, who, time.Now().Add(time.Hour))
}

func (a *authority) issueUntil(role, who string, expires time.Time) (cert, key []byte) {
	return a.issueFor(role, who, who, expires)
}

// issueFor has no URI without a role.
func (a *authority) issueFor(role, who, host string, expires time.Time) (cert, key []byte) {
	var uris []*url.URL
	if role != "" {
		uris = append(uris, must(url.Parse("kalium://"+role+"/"+who)))
	}
	private := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: must(rand.Int(rand.Reader, big.NewInt(1<<60))), Subject: pkix.Name{CommonName: who}, DNSNames: []string{host}, URIs: uris,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: expires, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, a.cert, &private.PublicKey, a.key))
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: must(x509.MarshalECPrivateKey(private))})
}

// fakeController speaks the controller's side over real TLS. It welcomes and acknowledges by itself; questions of
// guards come out of next.
type fakeController struct {
	t       *testing.T
	address string
	tls     *tls.Config

	mu       sync.Mutex
	policies map[string][]byte
	refuse   map[string]string // function -> reason
	silent   bool              // registrations stay without an answer
	mute     bool              // pings too
	pings    int
	no       string     // the reason of every welcome, which says no then
	store    *fakeStore // answers questions by itself; nil: they come out of received
	leaseMS  int
	listener net.Listener
	conns    []net.Conn
	running  sync.WaitGroup

	received chan received
}

type received struct {
	id   uint32
	m    frame.Message
	conn net.Conn
}

func newFakeController(t *testing.T, ca *authority, name string) *fakeController {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	cert, key := ca.issue(roleController, name)
	c := &fakeController{
		t: t, policies: map[string][]byte{}, refuse: map[string]string{}, leaseMS: 60000, received: make(chan received, 10000),
		tls: &tls.Config{Certificates: []tls.Certificate{must(tls.X509KeyPair(cert, key))}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool},
	}
	c.address = reserved(t)
	t.Cleanup(c.stop)
	return c
}

// reserved is an address whose port is the test's until its end: a socket is bound to it that does not listen. Connections
// are refused there, and who listens has to allow the address to be used again, as net.Listen does.
func reserved(t *testing.T) string {
	t.Helper()
	fd := must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	t.Cleanup(func() { _ = unix.Close(fd) })
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	if err != nil {
		t.Fatal(err)
	}
	bound := must(unix.Getsockname(fd)).(*unix.SockaddrInet4)
	return fmt.Sprintf("127.0.0.1:%d", bound.Port)
}

func (c *fakeController) offer(app string, envelope []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.policies[app] = envelope
}

func (c *fakeController) start() {
	c.t.Helper()
	raw, err := net.Listen("tcp", c.address)
	if err != nil {
		c.t.Fatal(err)
	}
	listener := tls.NewListener(raw, c.tls)
	c.mu.Lock()
	c.listener = listener
	c.mu.Unlock()
	c.running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			c.mu.Lock()
			c.conns = append(c.conns, conn)
			c.mu.Unlock()
			c.running.Go(func() { c.serve(conn) })
		}
	})
}

// stop ends the controller as a crash would.
func (c *fakeController) stop() {
	c.mu.Lock()
	if c.listener != nil {
		_ = c.listener.Close()
	}
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	c.listener, c.conns = nil, nil
	c.mu.Unlock()
	c.running.Wait()
}

func (c *fakeController) serve(conn net.Conn) {
	defer conn.Close()
	reader := &frameReader{conn: conn, buffer: make([]byte, 4096)}
	for {
		id, m, err := reader.next()
		if err != nil {
			return
		}
		c.mu.Lock()
		switch m := m.(type) {
		case *frame.AgentHello:
			c.received <- received{id, m, conn}
			if c.no != "" {
				c.send(conn, id, &frame.ControllerWelcome{Reason: c.no})
			} else {
				c.send(conn, id, &frame.ControllerWelcome{OK: true, Proto: 2, LeaseMS: c.leaseMS, Policies: c.policies})
			}
		case *frame.Ping:
			c.pings++
			if !c.mute {
				c.send(conn, id, &frame.Pong{})
			}
		case *frame.Register:
			reason, refused := c.refuse[m.Function]
			if !refused {
				reason = "allowed"
			}
			if c.store != nil {
				c.store.register(conn, m.Instance)
			}
			if !c.silent {
				c.send(conn, id, &frame.Answer{Allowed: !refused, Reason: reason, Expected: []string{}})
			}
			c.received <- received{id, m, conn}
		default:
			if c.store == nil || !c.store.take(c, conn, id, m) {
				c.received <- received{id, m, conn}
			}
		}
		c.mu.Unlock()
	}
}

// with changes the controller's behaviour while it runs.
func (c *fakeController) with(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

func (c *fakeController) send(conn net.Conn, id uint32, m frame.Message) {
	if _, err := conn.Write(must(frame.Append(nil, id, m))); err != nil && !errors.Is(err, net.ErrClosed) {
		slog.Debug("the agent is gone", "error", err)
	}
}

// push sends to the newest connection.
func (c *fakeController) push(m frame.Message) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.send(c.conns[len(c.conns)-1], 0, m)
}

// expect returns the next frame of type T and drops others before it.
func expect[T frame.Message](c *fakeController) (received, T) {
	c.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case r := <-c.received:
			if m, ok := r.m.(T); ok {
				return r, m
			}
		case <-deadline:
			var none T
			c.t.Fatalf("the controller got no %T", none)
			return received{}, none
		}
	}
}

// fakeGuard speaks a guard's side of the guard socket.
type fakeGuard struct {
	t      *testing.T
	conn   *net.UnixConn
	reader *frameReader
}

func (s *site) dialGuard() *fakeGuard {
	s.t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.config.GuardSocket, Net: "unix"})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return &fakeGuard{t: s.t, conn: conn, reader: &frameReader{conn: conn, buffer: make([]byte, 4096)}}
}

func (s *site) hello(container, app, function string) (*fakeGuard, *frame.Welcome) {
	s.t.Helper()
	g := s.dialGuard()
	g.send(1, &frame.Hello{Protos: frame.Protos(), Container: container, App: app, Function: function})
	id, m := g.receive()
	welcome, ok := m.(*frame.Welcome)
	if !ok || id != 1 {
		s.t.Fatalf("id %d, %#v in place of a welcome", id, m)
	}
	return g, welcome
}

// guard registers an instance and connects its guard.
func (s *site) guard(container, function string) *fakeGuard {
	s.t.Helper()
	s.register(container, function)
	g, welcome := s.hello(container, "shop", function)
	if !welcome.OK {
		s.t.Fatalf("the guard of %s is refused: %s", container, welcome.Reason)
	}
	return g
}

func (g *fakeGuard) send(id uint32, m frame.Message) {
	g.t.Helper()
	if _, err := g.conn.Write(must(frame.Append(nil, id, m))); err != nil {
		g.t.Fatal(err)
	}
}

func (g *fakeGuard) receive() (uint32, frame.Message) {
	g.t.Helper()
	_ = g.conn.SetReadDeadline(time.Now().Add(patience))
	id, m, err := g.reader.next()
	if err != nil {
		g.t.Fatalf("the guard reads: %v", err)
	}
	return id, m
}

// answer returns the next answer and drops what was pushed before it.
func (g *fakeGuard) answer() (uint32, *frame.Answer) {
	g.t.Helper()
	for {
		id, m := g.receive()
		if answer, ok := m.(*frame.Answer); ok {
			return id, answer
		}
	}
}

// expectClosed reads to the end of the connection.
func (g *fakeGuard) expectClosed() { g.lastWord() }

// expectDismissed reads to the end of the connection, and finds that the guard may decide nothing then.
func (g *fakeGuard) expectDismissed() {
	g.t.Helper()
	if lease, ok := g.lastWord().(*frame.Lease); !ok || lease.LeaseMS != 0 {
		g.t.Errorf("the connection ended without the end of the lease")
	}
}

// lastWord is the last frame before the end of the connection.
func (g *fakeGuard) lastWord() (last frame.Message) {
	g.t.Helper()
	_ = g.conn.SetReadDeadline(time.Now().Add(patience))
	for {
		_, m, err := g.reader.next()
		switch {
		case err == nil:
			last = m
		case errors.Is(err, os.ErrDeadlineExceeded):
			g.t.Fatal("the connection stays open")
		default:
			return last
		}
	}
}

const step = "0123456789abcdef"

func record(message string) *frame.Verdict {
	return &frame.Verdict{Record: frame.VerdictRecord{
		Event: frame.EventVerdict, Mode: "enforce", PolicyVersion: 1, Kind: "https", Message: message, Peer: "images", Reason: "out_of_order",
		Expected: []string{"https GET images / @line 3"}, Line: 4, States: []int{0}, LatencyUS: 7,
	}}
}
