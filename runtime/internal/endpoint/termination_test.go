package endpoint

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/guard"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// newEndingNet is a net whose guard ends TLS, and the certificate of the image server, which it trusts.
func newEndingNet(t *testing.T, mode string) (*net, tls.Certificate) {
	t.Helper()
	n := newNet(t, "")
	certificate := guardtest.Certificate(t, "images.test")
	welcome := guardtest.WelcomeEdited(t, mode, `"tls":"open"`, `"tls":"terminate"`)
	welcome.Roots = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]})
	g, err := guard.New(guard.Identity{Container: "c", App: guardtest.App, Function: guardtest.Function}, guardtest.PublicKey, welcome, n.c)
	if err != nil {
		t.Fatal(err)
	}
	n.guard = g
	n.working()
	return n, certificate
}

// terminated is a connection of a program to the image server that the guard ends, all four ends of it.
func (n *net) terminated(certificate tls.Certificate, version uint16) (program, server *tls.Conn, out, in *socket) {
	n.t.Helper()
	listener := n.plain(tcp.ProtocolNumber).listen(imageServer)
	defer listener.Close()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(n.guard.Trust())
	out = &socket{n.stream().connect(imageServer), true}
	in = &socket{listener.accept(), false}
	return tls.Client(out, &tls.Config{ServerName: "images.test", RootCAs: roots, MaxVersion: version}),
		tls.Server(in, &tls.Config{Certificates: []tls.Certificate{certificate}}), out, in
}

func TestTLSThatEndsInTheGuardCarriesBothWays(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		n, certificate := newEndingNet(t, "enforce")
		before := n.guard.Connections()
		program, server, out, _ := n.terminated(certificate, version)
		body := strings.Repeat("image", 200000)
		served := make(chan error, 1)
		go func() {
			got := make([]byte, len(getI))
			for range 2 {
				if _, err := io.ReadFull(server, got); err != nil || string(got) != getI {
					served <- errors.Join(err, errors.New("the server read "+string(got)))
					return
				}
				if _, err := io.WriteString(server, body); err != nil {
					served <- err
					return
				}
			}
			if n, err := server.Read(got); n != 0 || err != io.EOF {
				served <- errors.Join(err, errors.New("there was more"))
			}
			served <- server.Close()
		}()

		got := make([]byte, len(body))
		for range 2 {
			if _, err := io.WriteString(program, getI); err != nil {
				t.Fatalf("version %x: %v, denials: %s", version, err, n.reasons())
			}
			if _, err := io.ReadFull(program, got); err != nil || string(got) != body {
				t.Fatalf("version %x: %v", version, err)
			}
		}
		program.CloseWrite()
		must(t, out.Shutdown(tcpip.ShutdownWrite))
		if n, err := program.Read(got); n != 0 || err != io.EOF {
			t.Errorf("version %x: %d bytes, %v", version, n, err)
		}
		if err := <-served; err != nil {
			t.Errorf("version %x: %v", version, err)
		}
		if _, err := out.peer.Write(strings.NewReader("x"), tcpip.WriteOptions{}); err == nil {
			t.Error("a write behind the end was taken")
		}
		out.Close()
		n.eventually("the end of the connection", func() bool { return n.guard.Connections() == before })
	}
}

func TestADenialWhereTLSEndsResetsTheConnection(t *testing.T) {
	n, certificate := newEndingNet(t, "enforce")
	program, server, out, _ := n.terminated(certificate, 0)
	read := make(chan string, 1)
	go func() {
		got, err := io.ReadAll(server)
		read <- string(got) + err.Error()
	}()

	if _, err := io.WriteString(program, "GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n"); err != nil {
		t.Fatalf("the write itself: %v", err)
	}

	out.until(waiter.EventHUp|waiter.EventErr|waiter.ReadableEvents, "the reset", func() bool {
		_, err := out.peer.Read(io.Discard, tcpip.ReadOptions{})
		return isReset(err)
	})
	if _, err := out.peer.Write(strings.NewReader("x"), tcpip.WriteOptions{}); !isReset(err) {
		t.Errorf("the next write: %v", err)
	}
	if got := <-read; got != (&tcpip.ErrConnectionReset{}).String() {
		t.Errorf("the server read %q", got)
	}
	if got := n.reasons(); got != "https not_in_policy" {
		t.Errorf("denials: %s", got)
	}
	out.Close()
}

func TestWhatWasTakenBeforeACloseIsSentWhereTLSEnds(t *testing.T) {
	n, certificate := newEndingNet(t, "enforce")
	program, server, out, _ := n.terminated(certificate, 0)
	go server.Handshake()
	if err := program.Handshake(); err != nil {
		t.Fatal(err)
	}
	before := n.guard.Connections()

	const count = 20000
	read := make(chan string, 1)
	go func() {
		time.Sleep(200 * time.Millisecond) // the pipes and the windows fill
		got, err := io.ReadAll(server)
		if err != nil {
			got = append(got, err.Error()...)
		}
		server.Close()
		read <- string(got)
	}()
	if _, err := io.WriteString(program, strings.Repeat(getI, count)); err != nil {
		t.Fatal(err)
	}
	out.Close()

	if got := <-read; got != strings.Repeat(getI, count) {
		t.Errorf("%d bytes arrived, of %d; the last are %q", len(got), count*len(getI), got[max(0, len(got)-60):])
	}
	n.eventually("the end of the connection", func() bool { return n.guard.Connections() == before-1 })
}

func TestAServerThatIsNotTrustedResetsTheProgram(t *testing.T) {
	n, _ := newEndingNet(t, "enforce")
	program, server, _, _ := n.terminated(guardtest.Certificate(t, "images.test"), 0)
	go server.Handshake()

	if err := program.Handshake(); err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("%v", err)
	}
	if got := n.reasons(); got != "https unknown_peer" {
		t.Errorf("denials: %s", got)
	}
}

// A reset from either side ends everything and leaves nothing counted.
func TestAResetWhereTLSEndsLeavesNothing(t *testing.T) {
	for _, side := range []string{"the program", "the program's linger", "the server"} {
		n, certificate := newEndingNet(t, "enforce")
		before := n.guard.Connections()
		program, server, out, in := n.terminated(certificate, 0)
		go server.Handshake()
		if err := program.Handshake(); err != nil {
			t.Fatal(err)
		}
		switch side {
		case "the program":
			out.Abort()
		case "the program's linger":
			out.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: true})
			out.peer.Close()
		case "the server":
			in.Abort()
			out.until(waiter.EventHUp|waiter.EventErr|waiter.ReadableEvents, "the reset", func() bool {
				_, err := out.peer.Read(io.Discard, tcpip.ReadOptions{})
				return isReset(err)
			})
			out.peer.Close()
		}

		n.eventually("the end after a reset by "+side, func() bool { return n.guard.Connections() == before })
	}
}
