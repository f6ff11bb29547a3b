package tlsopen

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// OpenSSL is what most programs use, and what sends and asks for what crypto/tls does not: KeyUpdates, renegotiation,
// finite-field Diffie-Hellman, early data, the other suites of TLS 1.3. It is on every machine that trusts certificates
// (Debian: ca-certificates needs it), so a machine without it fails here.

// transcript is what was printed so far.
type transcript struct {
	t *testing.T

	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (p *transcript) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(b)
}

func (p *transcript) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

// await waits until want has been printed and returns what its groups are.
func (p *transcript) await(want string) []string {
	p.t.Helper()
	pattern := regexp.MustCompile(want)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if groups := pattern.FindStringSubmatch(p.String()); groups != nil {
			return groups
		}
	}
	p.t.Fatalf("%q does not come", want)
	return nil
}

// tool is an openssl program that runs.
type tool struct {
	transcript
	stdin io.WriteCloser
}

func openssl(t *testing.T, args ...string) *tool {
	t.Helper()
	o := &tool{transcript: transcript{t: t}}
	command := exec.CommandContext(t.Context(), "openssl", args...)
	command.Stdout, command.Stderr = o, o
	var err error
	if o.stdin, err = command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatalf("openssl is needed: %v", err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill()
		_ = command.Wait()
		if t.Failed() {
			t.Logf("openssl %s:\n%s", strings.Join(args, " "), o)
		}
	})
	return o
}

func (o *tool) say(line string) {
	o.t.Helper()
	if _, err := io.WriteString(o.stdin, line); err != nil {
		o.t.Fatal(err)
	}
}

// opensslServer starts s_server and returns its address.
func opensslServer(t *testing.T, args ...string) (*tool, string) {
	t.Helper()
	pair := certificates()[1]
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "server.pem")
	content := append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})...)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	o := openssl(t, append([]string{"s_server", "-accept", "127.0.0.1:0", "-cert", file, "-key", file}, args...)...)
	return o, o.await(`ACCEPT (\S+:\d+)`)[1]
}

func TestTLS13SuitesAgainstOpenSSL(t *testing.T) {
	for _, suite := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"} {
		t.Run(suite, func(t *testing.T) {
			server, address := opensslServer(t, "-tls1_3", "-ciphersuites", suite)
			keys := NewKeys()
			g := dial(t, address, keys, nil)
			updated := make(chan struct{}, 1)
			g.onControl = func() { updated <- struct{}{} }
			conn := tls.Client(g, clientConfig(keys.Writer()))
			if err := conn.Handshake(); err != nil {
				t.Fatal(err)
			}
			heard := &transcript{t: t}
			go func() { _, _ = io.Copy(heard, conn) }()
			say := func(line string) {
				t.Helper()
				if _, err := io.WriteString(conn, line+"\n"); err != nil {
					t.Fatal(err)
				}
				server.await(line)
			}
			say("GET /first")
			for i := range 2 {
				server.say("K\n") // the server updates its key and asks for the client's
				select {
				case <-updated:
				case <-time.After(patience):
					t.Fatal("no KeyUpdate")
				}
				say(fmt.Sprintf("GET /update/%d", i))
				server.say(fmt.Sprintf("answer %d\n", i))
				heard.await(fmt.Sprintf("answer %d\n", i))
			}
			if name := tls.CipherSuiteName(conn.ConnectionState().CipherSuite); name != suite {
				t.Errorf("the suite is %s", name)
			}
		})
	}
}

// relayed is s_client that reaches a server through the guard.
type relayed struct {
	*tool
	g     *guarded
	ended chan error // what the guard refused, or nil
}

func opensslClient(t *testing.T, address string, args ...string) *relayed {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	file := filepath.Join(t.TempDir(), "keys")
	keys := NewKeys()
	r := &relayed{g: dial(t, address, keys, nil), ended: make(chan error, 1)}
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(conn, r.g)
			_ = conn.(*net.TCPConn).CloseWrite()
		}()
		_, err = io.Copy(writerBefore{r.g, logReader(file, keys.Writer())}, conn)
		_ = r.g.Close()
		_ = conn.Close()
		r.ended <- err
	}()
	r.tool = openssl(t, append([]string{"s_client", "-connect", listener.Addr().String(), "-servername", serverName, "-keylogfile", file}, args...)...)
	return r
}

// writerBefore does something before each write. It hides what else its writer can do from io.Copy.
type writerBefore struct {
	to     io.Writer
	before func()
}

func (w writerBefore) Write(b []byte) (int, error) {
	w.before()
	return w.to.Write(b)
}

// logReader takes what was added to the key log file, as the Sentry would have got it when it was written.
func logReader(file string, log *KeyWriter) func() {
	taken := 0
	return func() {
		content, _ := os.ReadFile(file) // is made with the first line
		_, _ = log.Write(content[taken:])
		taken = len(content)
	}
}

func (r *relayed) refusal() (reason policy.Reason) {
	r.t.Helper()
	select {
	case err := <-r.ended:
		var refused *wire.Error
		if !errors.As(err, &refused) {
			r.t.Fatalf("ended with %v", err)
		}
		return refused.Reason
	case <-time.After(patience):
		r.t.Fatal("the connection does not end")
		return ""
	}
}

func TestOpenSSLClients(t *testing.T) {
	for _, args := range []string{
		"-tls1_3 -ciphersuites TLS_AES_128_GCM_SHA256", "-tls1_3 -ciphersuites TLS_AES_256_GCM_SHA384",
		"-tls1_3 -ciphersuites TLS_CHACHA20_POLY1305_SHA256", "-tls1_3 -groups secp521r1:X25519", "-tls1_3 -no_middlebox", "-tls1_3 -maxfraglen 512",
		"-tls1_2 -cipher ECDHE-RSA-AES128-GCM-SHA256", "-tls1_2 -cipher ECDHE-RSA-AES256-GCM-SHA384", "-tls1_2 -cipher ECDHE-RSA-CHACHA20-POLY1305",
		"-tls1_2 -cipher DHE-RSA-AES128-GCM-SHA256", "-tls1_2 -cipher DHE-RSA-AES256-GCM-SHA384", "-tls1_2 -cipher DHE-RSA-CHACHA20-POLY1305",
		"-tls1_2 -cipher AES128-GCM-SHA256", "-tls1_2 -cipher AES256-GCM-SHA384", "-tls1_2 -maxfraglen 512",
	} {
		t.Run(args, func(t *testing.T) {
			_, address := opensslServer(t, "-rev", "-groups", "X25519:P-521")
			client := opensslClient(t, address, strings.Fields(args)...)
			long := strings.Repeat("x", 3000)
			client.say("first\n")
			client.await("tsrif")
			client.say(long + "y\n")
			client.await("y" + long)
			_ = client.stdin.Close()
			if err := <-client.ended; err != nil {
				t.Errorf("ended with %v", err)
			}
			if got := client.g.plain.String(); got != "first\n"+long+"y\n" {
				t.Errorf("the guard saw %d bytes", len(got))
			}
			if last := client.g.kinds[len(client.g.kinds)-1]; last != KindControl {
				t.Errorf("the last unit is of kind %d", last)
			}
		})
	}
}

func TestOpenSSLResumption(t *testing.T) {
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		t.Run(version, func(t *testing.T) {
			_, address := opensslServer(t, "-rev", "-max_early_data", "1000")
			file := filepath.Join(t.TempDir(), "session")
			for i, args := range [][]string{{"-sess_out", file}, {"-sess_in", file}} {
				client := opensslClient(t, address, append(args, version)...)
				client.say("hello\n")
				client.await("olleh")
				client.await([]string{"New, TLS", "Reused, TLS"}[i])
				_ = client.stdin.Close()
				if err := <-client.ended; err != nil {
					t.Errorf("ended with %v", err)
				}
			}
			if version == "-tls1_3" {
				early := filepath.Join(t.TempDir(), "early")
				if err := os.WriteFile(early, []byte("GET / HTTP/1.1\r\n\r\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				client := opensslClient(t, address, "-sess_in", file, version, "-early_data", early)
				if reason := client.refusal(); reason != policy.ReasonUnsupported || client.g.plain.Len() != 0 {
					t.Errorf("early data: %s", reason)
				}
			}
		})
	}
}

func TestOpenSSLKeyUpdate(t *testing.T) {
	_, address := opensslServer(t, "-rev")
	client := opensslClient(t, address, "-tls1_3")
	client.say("first\n")
	client.await("tsrif")
	for i, command := range []string{"k", "K"} { // K asks the server for one, too
		client.say(command + "\n")
		client.await(fmt.Sprintf("(?s)(KEYUPDATE.*){%d}", i+1))
		client.say("more " + command + "\n")
		client.await(command + " erom")
	}
	if client.g.client.updates != 2 {
		t.Errorf("%d KeyUpdates", client.g.client.updates)
	}
}

func TestOpenSSLIsRefused(t *testing.T) {
	for args, want := range map[string]policy.Reason{
		"-tls1_2 -cipher ECDHE-RSA-AES128-SHA":         policy.ReasonUnsupported,
		"-tls1_2 -cipher ECDHE-RSA-AES128-SHA256":      policy.ReasonUnsupported,
		"-tls1_2 -cipher AES128-CCM":                   policy.ReasonUnsupported,
		"-tls1_3 -ciphersuites TLS_AES_128_CCM_SHA256": policy.ReasonUnsupported,
		"-tls1_1 -cipher ALL:@SECLEVEL=0":              policy.ReasonUnsupported,
		"-tls1_2 renegotiate":                          policy.ReasonUnsupported,
		"-tls1_3 -keylogfile /dev/null":                policy.ReasonNoKey,
		"-tls1_2 -keylogfile /dev/null":                policy.ReasonNoKey,
	} {
		t.Run(args, func(t *testing.T) {
			server, address := opensslServer(t, "-cipher", "ALL:@SECLEVEL=0", "-ciphersuites", "TLS_AES_128_GCM_SHA256:TLS_AES_128_CCM_SHA256", "-client_renegotiation")
			args, renegotiate := strings.CutSuffix(args, " renegotiate")
			client := opensslClient(t, address, strings.Fields(args)...)
			_, err := io.WriteString(client.stdin, "secret\n") // the client may have been refused and be gone already
			if err != nil && !errors.Is(err, syscall.EPIPE) {
				t.Fatal(err)
			}
			if renegotiate {
				server.await("secret")
				client.say("R\n")
				client.await("RENEGOTIATING")
			}
			if reason := client.refusal(); reason != want {
				t.Errorf("refused as %s", reason)
			}
			if !renegotiate && strings.Contains(server.String(), "secret") {
				t.Error("the server saw it")
			}
		})
	}
}
