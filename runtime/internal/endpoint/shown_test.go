package endpoint

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	stdnet "net"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

const (
	imageServer = guardtest.HostAddress + ":4443"
	getI        = "GET /i HTTP/1.1\r\nHost: images.test:4443\r\n\r\n"
)

// socket is an endpoint as a program has it. With peek each read looks at the bytes twice first.
type socket struct {
	*peer
	peek bool
}

func (s *socket) Write(b []byte) (int, error) {
	source := bytes.NewReader(b)
	var failed error
	s.until(waiter.WritableEvents|waiter.EventErr|waiter.EventHUp, "room to write", func() bool {
		_, err := s.peer.Write(source, tcpip.WriteOptions{})
		if _, full := err.(*tcpip.ErrWouldBlock); err != nil && !full {
			failed = errors.New(err.String())
			return true
		}
		return source.Len() == 0
	})
	return len(b) - source.Len(), failed
}

func (s *socket) Read(b []byte) (n int, failed error) {
	s.until(waiter.ReadableEvents|waiter.EventErr|waiter.EventHUp, "bytes to read", func() bool {
		if s.peek {
			for range 2 {
				into := tcpip.SliceWriter(b)
				s.peer.Read(&into, tcpip.ReadOptions{Peek: true}) // tells nothing that the read below does not
			}
		}
		ready := s.Readiness(waiter.ReadableEvents) != 0
		into := tcpip.SliceWriter(b)
		result, err := s.peer.Read(&into, tcpip.ReadOptions{})
		n = result.Count
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			if ready {
				s.t.Error("readable, and nothing to read")
			}
			return false
		case *tcpip.ErrClosedForReceive:
			failed = io.EOF
		default:
			failed = errors.New(err.String())
		}
		return true
	})
	return n, failed
}

func (s *socket) Close() error                   { s.peer.Close(); return nil }
func (*socket) LocalAddr() stdnet.Addr           { return nil }
func (*socket) RemoteAddr() stdnet.Addr          { return nil }
func (*socket) SetDeadline(time.Time) error      { return nil }
func (*socket) SetReadDeadline(time.Time) error  { return nil }
func (*socket) SetWriteDeadline(time.Time) error { return nil }

// secure is a TLS connection of a program to the image server, both ends.
func (n *net) secure(peek bool, client *tls.Config) (program, server *tls.Conn) {
	n.t.Helper()
	listener := n.plain(tcp.ProtocolNumber).listen(imageServer)
	defer listener.Close()
	client.ServerName, client.InsecureSkipVerify = "images.test", true
	socketOfProgram := &socket{n.stream().connect(imageServer), peek}
	socketOfServer := &socket{listener.accept(), false}
	n.t.Cleanup(func() { socketOfProgram.peer.Close(); socketOfServer.peer.Close() })
	return tls.Client(socketOfProgram, client),
		tls.Server(socketOfServer, &tls.Config{Certificates: []tls.Certificate{guardtest.Certificate(n.t, "images.test")}})
}

func TestTLSIsOpenedAndTheAnswerArrives(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, peek := range []bool{false, true} {
			n := newNet(t, "enforce")
			n.working()
			program, server := n.secure(peek, &tls.Config{MaxVersion: version, KeyLogWriter: n.guard.Keys().Writer()})
			body := strings.Repeat("image", 100000)
			served := make(chan error, 1)
			go func() {
				for range 2 {
					got := make([]byte, len(getI))
					if _, err := io.ReadFull(server, got); err != nil || string(got) != getI {
						served <- errors.Join(err, errors.New("the server read "+string(got)))
						return
					}
					if _, err := io.WriteString(server, body); err != nil {
						served <- err
						return
					}
				}
				served <- nil
			}()
			for range 2 {
				if _, err := io.WriteString(program, getI); err != nil {
					t.Fatalf("version %x: %v, denials: %s", version, err, n.reasons())
				}
				got := make([]byte, len(body))
				if _, err := io.ReadFull(program, got); err != nil || string(got) != body {
					t.Fatalf("version %x: the answer is another one: %v", version, err)
				}
			}
			if err := <-served; err != nil {
				t.Errorf("version %x, peek %v: %v", version, peek, err)
			}
			if got := n.reasons(); got != "" {
				t.Errorf("denials: %s", got)
			}
		}
	}
}

func TestADeniedRequestUnderTLSIsAFailedWrite(t *testing.T) {
	n := newNet(t, "enforce")
	n.working()
	program, server := n.secure(false, &tls.Config{KeyLogWriter: n.guard.Keys().Writer()})
	read := make(chan string)
	go func() {
		got, _ := io.ReadAll(server)
		read <- string(got)
	}()
	if err := program.Handshake(); err != nil {
		t.Fatal(err)
	}

	_, err := io.WriteString(program, "GET /secret HTTP/1.1\r\nHost: images.test:4443\r\n\r\n")

	if err == nil || !strings.Contains(err.Error(), new(tcpip.ErrNotPermitted).String()) {
		t.Errorf("the write gave %v", err)
	}
	if got := <-read; got != "" {
		t.Errorf("%q arrived", got)
	}
	if got := n.reasons(); got != "https not_in_policy" {
		t.Errorf("denials: %s", got)
	}
}

func TestReadsGoDirectlyOnceTheServerIsKnown(t *testing.T) {
	n := newNet(t, "enforce")
	n.working()
	program, server := n.secure(false, &tls.Config{KeyLogWriter: n.guard.Keys().Writer()})
	s := program.NetConn().(*socket).Endpoint.(*Stream)
	if s.shown.direct.Load() {
		t.Error("the server's hello is not looked at")
	}
	go server.Handshake()
	if err := program.Handshake(); err != nil {
		t.Fatal(err)
	}
	go func() { io.WriteString(server, "x") }()

	if _, err := io.ReadFull(program, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}

	if !s.shown.direct.Load() || s.shown.waiting.Len() != 0 {
		t.Errorf("direct %v, %d bytes wait", s.shown.direct.Load(), s.shown.waiting.Len())
	}
}

func TestARequestIsOnlySentAgainWhenThePeerHasEndedItsConnection(t *testing.T) {
	for name, c := range map[string]struct {
		end     func(program, server *peer)
		allowed bool
	}{
		"the peer closed":                    {func(_, server *peer) { server.Close() }, true},
		"the program only shut reading down": {func(program, _ *peer) { program.Shutdown(tcpip.ShutdownRead) }, false},
		"the program shut both ways down":    {func(program, _ *peer) { program.Shutdown(tcpip.ShutdownRead | tcpip.ShutdownWrite) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNet(t, "enforce")
			n.setPolicy("enforce", "4", guardtest.RetriesOfGet, strings.Replace(guardtest.RetriesOfGet, `"retries":0`, `"retries":1`, 1))
			n.working()
			listener := n.plain(tcp.ProtocolNumber).listen(peerServer)
			program := n.stream().connect(peerServer)
			server := listener.accept()
			defer program.Close()
			defer server.Close()
			program.write(getA)
			server.read(getA)

			c.end(program, server)
			if got, _ := program.end(); got != "" {
				t.Fatalf("%q was read", got)
			}

			second := n.stream().connect(peerServer)
			defer second.Close()
			if _, err := second.Write(strings.NewReader(getA), tcpip.WriteOptions{}); (err == nil) != c.allowed {
				t.Errorf("the request again: %v, denials: %s", err, n.reasons())
			}
		})
	}
}
