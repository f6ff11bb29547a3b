package endpoint

import (
	"bytes"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/loopback"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// net is one stack that plays both the sandbox, at 10.137.0.10 and 127.0.0.1, and the world outside of it.
type net struct {
	t     testing.TB
	stack *stack.Stack
	guard *guard.Guard
	c     *guardtest.Controller
}

// wait bounds every wait of these tests. A test that passes never needs it.
const wait = 30 * time.Second

func address(text string) tcpip.Address { return tcpip.AddrFrom4(netip.MustParseAddr(text).As4()) }

func full(text string) tcpip.FullAddress {
	ap := netip.MustParseAddrPort(text)
	if ap.Addr().IsUnspecified() {
		return tcpip.FullAddress{Port: ap.Port()} // as gVisor's socket layer spells "any"
	}
	return tcpip.FullAddress{Addr: tcpip.AddrFrom4(ap.Addr().As4()), Port: ap.Port()}
}

func own(a tcpip.Address) bool {
	return a == address("10.137.0.10") || header.IsV4LoopbackAddress(a)
}

func newNet(t testing.TB, mode string) *net {
	if mode == "" {
		return newNetOf(t, guardtest.Function, nil, guardtest.NewController())
	}
	return newNetOf(t, guardtest.Function, guardtest.Welcome(t, mode), guardtest.NewController())
}

// newNetOf is the surroundings of one function's sandbox; without a welcome it has no guard.
func newNetOf(t testing.TB, function string, welcome *frame.Welcome, c *guardtest.Controller) *net {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		HandleLocal:        true, // as in runsc
	})
	t.Cleanup(s.Destroy)
	must(t, s.CreateNIC(1, loopback.New()))
	for _, text := range []string{"127.0.0.1", "10.137.0.10", guardtest.HostAddress, "10.137.0.77"} {
		must(t, s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: address(text).WithPrefix()}, stack.AddressProperties{}))
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})
	n := &net{t: t, stack: s, c: c}
	if welcome == nil {
		return n
	}
	g, err := guard.New(guard.Identity{Container: "c", App: guardtest.App, Function: function}, guardtest.PublicKey, welcome, n.c)
	if err != nil {
		t.Fatal(err)
	}
	n.guard = g
	return n
}

func must(t testing.TB, err tcpip.Error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// peer is an endpoint and the queue of its waiters.
type peer struct {
	tcpip.Endpoint
	queue *waiter.Queue
	t     testing.TB
}

func (n *net) plain(transport tcpip.TransportProtocolNumber) *peer {
	n.t.Helper()
	p := &peer{queue: &waiter.Queue{}, t: n.t}
	ep, err := n.stack.NewEndpoint(transport, ipv4.ProtocolNumber, p.queue)
	must(n.t, err)
	p.Endpoint = ep
	return p
}

func (n *net) stream() *peer {
	p := n.plain(tcp.ProtocolNumber)
	p.Endpoint = NewStream(n.guard, p.Endpoint, p.queue, ipv4.ProtocolNumber, own)
	return p
}

func (n *net) datagrams() *peer {
	p := n.plain(udp.ProtocolNumber)
	p.Endpoint = NewDatagrams(n.guard, p.Endpoint, p.queue, ipv4.ProtocolNumber, own)
	return p
}

func (p *peer) listen(at string) *peer {
	p.t.Helper()
	must(p.t, p.Bind(full(at)))
	must(p.t, p.Listen(8))
	return p
}

// until waits until f is done. It registers first and asks then, as gVisor's sockets do, so a wake-up that is lost shows.
func (p *peer) until(mask waiter.EventMask, what string, f func() bool) {
	p.t.Helper()
	entry, ch := waiter.NewChannelEntry(mask)
	p.queue.EventRegister(&entry)
	defer p.queue.EventUnregister(&entry)
	deadline := time.After(wait)
	for !f() {
		select {
		case <-ch:
		case <-deadline:
			p.t.Fatalf("waited in vain for %s", what)
		}
	}
}

func (p *peer) accept() *peer {
	p.t.Helper()
	child := &peer{t: p.t}
	p.until(waiter.ReadableEvents, "a connection", func() bool {
		ep, queue, err := p.Accept(nil)
		if _, none := err.(*tcpip.ErrWouldBlock); none {
			return false
		}
		must(p.t, err)
		child.Endpoint, child.queue = ep, queue
		return true
	})
	return child
}

func (p *peer) connect(to string) *peer {
	p.t.Helper()
	switch err := p.Connect(full(to)); err.(type) {
	case nil:
	case *tcpip.ErrConnectStarted:
		p.until(waiter.WritableEvents, "the handshake", func() bool { return connected(p.State()) })
	default:
		p.t.Fatal(err)
	}
	return p
}

// write writes all of b as a blocking socket does.
func (p *peer) write(b string) {
	p.t.Helper()
	source := bytes.NewReader([]byte(b))
	p.until(waiter.WritableEvents, "room to write", func() bool {
		_, err := p.Write(source, tcpip.WriteOptions{})
		if _, full := err.(*tcpip.ErrWouldBlock); err != nil && !full {
			p.t.Fatalf("writing %q: %v", b[:min(len(b), 60)], err)
		}
		return source.Len() == 0
	})
}

// refused expects a write to be denied.
func (p *peer) refused(b string) {
	p.t.Helper()
	n, err := p.Write(bytes.NewReader([]byte(b)), tcpip.WriteOptions{})
	if _, denied := err.(*tcpip.ErrNotPermitted); !denied || n != 0 {
		p.t.Fatalf("writing %q: %d bytes and %v, not EPERM", b, n, err)
	}
}

// read expects exactly want.
func (p *peer) read(want string) {
	p.t.Helper()
	if got := p.some(len(want)); got != want {
		p.t.Fatalf("read %q, want %q", got, want)
	}
}

// some reads n bytes.
func (p *peer) some(n int) string {
	p.t.Helper()
	var got bytes.Buffer
	p.until(waiter.ReadableEvents, "bytes to read", func() bool {
		for got.Len() < n {
			_, err := p.Read(&tcpip.LimitedWriter{W: &got, N: int64(n - got.Len())}, tcpip.ReadOptions{})
			if _, empty := err.(*tcpip.ErrWouldBlock); empty {
				return false
			}
			if err != nil {
				p.t.Fatalf("%v after %q", err, got.String())
			}
		}
		return true
	})
	return got.String()
}

// end reads to the end of the connection and returns what came before it.
func (p *peer) end() (string, tcpip.Error) {
	p.t.Helper()
	var got bytes.Buffer
	var end tcpip.Error
	p.until(waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr, "the end", func() bool {
		for {
			_, err := p.Read(&got, tcpip.ReadOptions{})
			if _, empty := err.(*tcpip.ErrWouldBlock); empty {
				return false
			}
			if err != nil {
				end = err
				return true
			}
		}
	})
	return got.String(), end
}

// quiet expects nothing to read and nothing to be announced.
func (p *peer) quiet() {
	p.t.Helper()
	if ready := p.Readiness(waiter.ReadableEvents); ready != 0 {
		p.t.Errorf("readable: %x", ready)
	}
	if _, err := p.Read(io.Discard, tcpip.ReadOptions{}); err == nil {
		p.t.Error("there was something to read")
	} else if _, empty := err.(*tcpip.ErrWouldBlock); !empty {
		p.t.Error(err)
	}
}

func isReset(err tcpip.Error) bool {
	_, reset := err.(*tcpip.ErrConnectionReset)
	return reset
}

func isEOF(err tcpip.Error) bool {
	_, eof := err.(*tcpip.ErrClosedForReceive)
	return eof
}

const (
	inside     = "10.137.0.10:8080"
	work       = "POST / HTTP/1.1\r\nHost: f\r\nContent-Length: 2\r\n\r\n"
	noContent  = "HTTP/1.1 204 No Content\r\n\r\n"
	getA       = "GET /a HTTP/1.1\r\nHost: api.test:8080\r\n\r\n"
	peerServer = guardtest.HostAddress + ":8080"
)

// served is a connection from the gateway to a guarded server, both ends.
func (n *net) served() (gateway, program *peer) {
	n.t.Helper()
	listener := n.stream().listen(inside)
	n.t.Cleanup(listener.Close)
	gateway = n.plain(tcp.ProtocolNumber)
	must(n.t, gateway.Bind(full(guardtest.HostAddress+":0")))
	gateway.connect(inside)
	return gateway, listener.accept()
}

// working is a guarded server in the middle of an invocation.
func (n *net) working() (gateway, program *peer) {
	n.t.Helper()
	gateway, program = n.served()
	gateway.write(work + "{}")
	program.read(work + "{}")
	return gateway, program
}

func (n *net) eventually(what string, claim func() bool) {
	n.t.Helper()
	deadline := time.Now().Add(wait)
	for !claim() {
		if time.Now().After(deadline) {
			n.t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// reasons lists the verdicts that deny.
func (n *net) reasons() string {
	var list []string
	for _, r := range n.c.Verdicts() {
		if !r.Allowed || r.WouldDeny {
			list = append(list, r.Kind+" "+r.Reason)
		}
	}
	return strings.Join(list, ", ")
}
