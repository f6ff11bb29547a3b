package endpoint

import (
	"bytes"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// query asks for the address of "gateway".
const query = "\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07gateway\x00\x00\x01\x00\x01"

func (p *peer) sendTo(b, to string) (int64, tcpip.Error) {
	p.t.Helper()
	address := full(to)
	return p.Write(bytes.NewReader([]byte(b)), tcpip.WriteOptions{To: &address})
}

func denied(err tcpip.Error) bool {
	_, denied := err.(*tcpip.ErrNotPermitted)
	return denied
}

func (p *peer) receive() (string, tcpip.FullAddress) {
	p.t.Helper()
	var got bytes.Buffer
	var from tcpip.FullAddress
	p.until(waiter.ReadableEvents, "a datagram", func() bool {
		result, err := p.Read(&got, tcpip.ReadOptions{NeedRemoteAddr: true})
		if _, empty := err.(*tcpip.ErrWouldBlock); empty {
			return false
		}
		must(p.t, err)
		from = result.RemoteAddr
		return true
	})
	return got.String(), from
}

func TestDatagramsOutsideAreDenied(t *testing.T) {
	n := newNet(t, "enforce")
	server := n.plain(udp.ProtocolNumber)
	must(t, server.Bind(full("10.137.0.77:7000")))
	for _, to := range []string{"10.137.0.77:7000", peerServer, "10.137.0.255:1", "224.0.0.1:1"} {
		if sent, err := n.datagrams().sendTo("x", to); !denied(err) || sent != 0 {
			t.Errorf("%s: %d bytes and %v", to, sent, err)
		}
	}
	server.quiet()
}

func TestDatagramsInsidePass(t *testing.T) {
	n := newNet(t, "enforce")
	server := n.datagrams()
	must(t, server.Bind(full("127.0.0.1:7000")))
	client := n.datagrams()
	must(t, client.Connect(full("127.0.0.1:7000")))

	if _, err := client.Write(bytes.NewReader([]byte("connected")), tcpip.WriteOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := n.datagrams().sendTo("to an address", "127.0.0.1:7000"); err != nil {
		t.Error(err)
	}

	for _, want := range []string{"connected", "to an address"} {
		if got, _ := server.receive(); got != want {
			t.Errorf("received %q, want %q", got, want)
		}
	}
}

func TestDatagramsFromOutsideAreNotSeen(t *testing.T) {
	n := newNet(t, "enforce")
	server := n.datagrams()
	must(t, server.Bind(full("10.137.0.10:7000")))
	stranger := n.plain(udp.ProtocolNumber)
	must(t, stranger.Bind(full("10.137.0.77:1")))
	if _, err := stranger.sendTo("command", "10.137.0.10:7000"); err != nil {
		t.Fatal(err)
	}

	if _, err := n.datagrams().sendTo("own", "10.137.0.10:7000"); err != nil {
		t.Fatal(err)
	}

	if got, _ := server.receive(); got != "own" {
		t.Errorf("received %q", got)
	}
	if got := n.reasons(); got != "incoming incoming_not_declared" {
		t.Errorf("denials: %s", got)
	}
}

func TestQueriesAreAnsweredWhateverTheServer(t *testing.T) {
	for _, server := range []string{"8.8.8.8:53", "127.0.0.53:53", "10.137.0.1:53"} {
		for _, connect := range []bool{true, false} {
			n := newNet(t, "enforce")
			client := n.datagrams()
			before := n.stack.Stats().IP.PacketsSent.Value()
			if connect {
				must(t, client.Connect(full(server)))
				if remote, err := client.GetRemoteAddress(); err != nil || remote != full(server) {
					t.Errorf("connected to %v, %v", remote, err)
				}
				_, err := client.Write(bytes.NewReader([]byte(query)), tcpip.WriteOptions{})
				must(t, err)
			} else {
				_, err := client.sendTo(query, server)
				must(t, err)
			}

			got, from := client.receive()

			if len(got) < 12 || got[:2] != query[:2] || got[7] != 1 || got[len(got)-4:] != "\x0a\x89\x00\x01" || from != full(server) {
				t.Errorf("answer %x from %v", got, from)
			}
			if after := n.stack.Stats().IP.PacketsSent.Value(); after != before {
				t.Errorf("%d packets were sent", after-before)
			}
			client.quiet()
		}
	}
}

func TestWhatIsNoQueryDoesNotPassAsOne(t *testing.T) {
	n := newNet(t, "enforce")
	client := n.datagrams()

	if _, err := client.sendTo("exfiltrated bytes", "8.8.8.8:53"); !denied(err) {
		t.Error(err)
	}

	client.quiet()
}

func TestAConnectedDatagramSocketSendsToListedHostsNothing(t *testing.T) {
	n := newNet(t, "enforce")
	client := n.datagrams()
	must(t, client.Connect(full(guardtest.HostAddress+":7"))) // as resolvers do to sort addresses

	if _, err := client.Write(bytes.NewReader([]byte("x")), tcpip.WriteOptions{}); !denied(err) {
		t.Error(err)
	}
	if err := client.Connect(full("10.137.0.77:9")); !denied(err) {
		t.Error(err)
	}
}

func TestPeekingAtADatagramKeepsIt(t *testing.T) {
	n := newNet(t, "enforce")
	client := n.datagrams()
	_, err := client.sendTo(query, "8.8.8.8:53")
	must(t, err)
	var peeked bytes.Buffer
	if _, err := client.Read(&peeked, tcpip.ReadOptions{Peek: true}); err != nil {
		t.Fatal(err)
	}

	if got, _ := client.receive(); got != peeked.String() {
		t.Errorf("received %x after %x", got, peeked.String())
	}
}

func TestAnswersThatNobodyReadsAreBounded(t *testing.T) {
	n := newNet(t, "enforce")
	client := n.datagrams()
	for range answersMax + 10 {
		_, err := client.sendTo(query, "8.8.8.8:53")
		must(t, err)
	}

	for range answersMax {
		client.receive()
	}

	client.quiet()
}

func TestNoMulticastGroupIsJoined(t *testing.T) {
	n := newNet(t, "enforce")
	before := n.stack.Stats().IP.PacketsSent.Value()

	err := n.datagrams().SetSockOpt(&tcpip.AddMembershipOption{NIC: 1, MulticastAddr: address("224.1.2.3")})

	if after := n.stack.Stats().IP.PacketsSent.Value(); !denied(err) || after != before {
		t.Errorf("%v, and %d packets were sent", err, after-before)
	}
}

func TestWithoutAGuardNoQueryIsAnswered(t *testing.T) {
	n := newNet(t, "")
	if _, err := n.datagrams().sendTo(query, "8.8.8.8:53"); !denied(err) {
		t.Error(err)
	}
	if err := n.datagrams().Connect(full("8.8.8.8:53")); !denied(err) {
		t.Error(err)
	}
}
