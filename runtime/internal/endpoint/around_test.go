package endpoint

import (
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"kalium.dev/kalium/runtime/internal/guard"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

func (n *net) setPolicy(mode, version string, pairs ...string) {
	n.t.Helper()
	if err := n.guard.SetPolicy(guardtest.App, guardtest.Edited(n.t, mode, version, pairs...)); err != nil {
		n.t.Fatal(err)
	}
}

// asked sends a request on a connection of its own and returns the whole answer.
func (n *net) asked(listener *peer, request string) string {
	n.t.Helper()
	gateway := n.plain(tcp.ProtocolNumber)
	must(n.t, gateway.Bind(full(guardtest.HostAddress+":0")))
	gateway.connect(inside)
	program := listener.accept()
	defer program.Close()
	defer gateway.Close()
	gateway.write(request)
	answer, _ := gateway.end()
	return answer
}

func TestInOffModeConnectionsFromOutsideAreTheProgramsOwn(t *testing.T) {
	n := newNet(t, "off")
	gateway, program := n.served()
	gateway.write("no HTTP at all")
	program.read("no HTTP at all")
	program.write("and no answer")
	gateway.read("and no answer")
	if got := n.c.Verdicts(); len(got) != 0 {
		t.Errorf("verdicts %+v", got)
	}

	n.setPolicy("enforce", "4")

	program.refused("more of it")
	if got, how := gateway.end(); got != "" || !isReset(how) {
		t.Errorf("the gateway got %q and %v", got, how)
	}
}

func TestInOffModeQueriesReachTheirServer(t *testing.T) {
	n := newNet(t, "enforce")
	server := n.plain(udp.ProtocolNumber)
	must(t, server.Bind(full("10.137.0.77:53")))
	before := n.datagrams()
	must(t, before.Endpoint.Connect(full("10.137.0.77:53")))
	n.setPolicy("off", "4")
	connected := n.datagrams()
	must(t, connected.Endpoint.Connect(full("10.137.0.77:53")))

	for name, send := range map[string]func() tcpip.Error{
		"to an address": func() tcpip.Error { _, err := n.datagrams().sendTo("q", "10.137.0.77:53"); return err },
		"connected": func() tcpip.Error {
			_, err := connected.Write(strings.NewReader("q"), tcpip.WriteOptions{})
			return err
		},
		"connected before the mode": func() tcpip.Error { _, err := before.Write(strings.NewReader("q"), tcpip.WriteOptions{}); return err },
	} {
		must(t, send())
		if got, _ := server.receive(); got != "q" {
			t.Errorf("%s: the server got %q", name, got)
		}
	}

	n.setPolicy("enforce", "5")
	if _, err := connected.Write(strings.NewReader("no query"), tcpip.WriteOptions{}); !denied(err) {
		t.Errorf("after the switch: %v", err)
	}
	server.quiet()
}

func TestAConnectionThatIsKeptGoesOnWhenTheGuardIsSwitchedOff(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.working()
	n.setPolicy("off", "4")
	program.write(noContent)
	gateway.read(noContent)

	gateway.write("anything")

	program.read("anything")
	program.write("at all")
	gateway.read("at all")
}

func TestAnInstanceThatWorksOnForNobodyAnswersThatItIsRetired(t *testing.T) {
	n := newNet(t, "enforce")
	n.setPolicy("enforce", "4", guardtest.Retire, `"retire_ms":50`)
	listener := n.stream().listen(inside)
	gateway := n.plain(tcp.ProtocolNumber)
	must(t, gateway.Bind(full(guardtest.HostAddress+":0")))
	gateway.connect(inside)
	program := listener.accept()
	gateway.write(work + "{}")
	program.read(work + "{}")

	gateway.Abort()
	time.Sleep(500 * time.Millisecond)

	for _, request := range []string{work + "{}", "GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"} {
		if answer := n.asked(listener, request); !strings.HasPrefix(answer, "HTTP/1.1 503 ") || !strings.Contains(answer, `"error":"retired"`) {
			t.Errorf("the gateway got %q", answer)
		}
	}
	if ends := n.c.Ended(); len(ends) != 1 || ends[0].Outcome != "closed" {
		t.Errorf("ends %+v", ends)
	}
}

func TestConnectionsThatAreGoneAreNotCounted(t *testing.T) {
	n := newNet(t, "enforce")
	listener := n.stream().listen(inside)
	server := n.plain(tcp.ProtocolNumber).listen(guardtest.HostAddress + ":8080")
	// With each round one more of each kind would be counted, and the bound is 4,096.
	before := n.guard.Connections()
	for round := range 8 {
		gateway := n.plain(tcp.ProtocolNumber)
		must(t, gateway.Bind(full(guardtest.HostAddress+":0")))
		gateway.connect(inside)
		program := listener.accept()
		out := n.stream()
		must(t, out.Bind(full("10.137.0.10:0")))
		out.connect(guardtest.HostAddress + ":8080")
		if got := n.guard.Connections(); got != before+2 {
			t.Fatalf("round %d: %d connections", round, got)
		}
		if round%2 == 0 {
			program.Close()
			out.Close()
		} else {
			program.Abort()
			out.Abort()
		}
		program.Close()
		out.Close()
		gateway.Close()
		server.accept().Close()
		n.eventually("the end of both", func() bool { return n.guard.Connections() == before })
	}
}

// Bytes that come one a second complete nothing in time. Both directions wait at once, because the bound is long.
func TestBytesThatComeSlowlyAreRefusedInTime(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for guard.HoldMax")
	}
	t.Parallel()
	n := newNet(t, "enforce")
	gateway, program := n.served()
	server := n.plain(tcp.ProtocolNumber).listen(guardtest.HostAddress + ":8080")
	out := n.stream()
	must(t, out.Bind(full("10.137.0.10:0")))
	out.connect(guardtest.HostAddress + ":8080")
	receiver := server.accept()
	began := time.Now()
	for _, c := range "POST / H" {
		gateway.write(string(c))
		out.write(string(c))
		time.Sleep(time.Second)
	}

	answer, _ := gateway.end()
	if !strings.HasPrefix(answer, "HTTP/1.1 503 ") || !strings.Contains(answer, `"error":"held_too_long"`) {
		t.Errorf("the gateway got %q", answer)
	}
	if got, how := receiver.end(); got != "" || !isReset(how) {
		t.Errorf("the peer got %q and %v", got, how)
	}
	if took := time.Since(began); took < guard.HoldMax || took > guard.HoldMax+5*time.Second {
		t.Errorf("it took %v", took)
	}
	if got, how := program.end(); got != "" || !isEOF(how) {
		t.Errorf("the program got %q and %v", got, how)
	}
}
