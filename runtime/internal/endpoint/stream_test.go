package endpoint

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// outgoing connects a guarded client to a server outside, during an invocation.
func outgoing(t *testing.T, mode string) (n *net, client, server *peer) {
	t.Helper()
	n = newNet(t, mode)
	n.working()
	listener := n.plain(tcp.ProtocolNumber).listen(peerServer)
	t.Cleanup(listener.Close)
	client = n.stream().connect(peerServer)
	return n, client, listener.accept()
}

func TestAnAllowedRequestArrivesWhole(t *testing.T) {
	_, client, server := outgoing(t, "enforce")

	client.write(getA[:10])
	client.write(getA[10:])

	server.read(getA)
	server.write("answer")
	client.read("answer")
}

func TestHeldBytesCountAsWrittenAndDoNotLeave(t *testing.T) {
	_, client, server := outgoing(t, "enforce")

	client.write(getA[:len(getA)-1])

	if client.Readiness(waiter.WritableEvents) == 0 {
		t.Error("the socket is not writable")
	}
	server.quiet()
	client.write(getA[len(getA)-1:])
	server.read(getA)
}

func TestADeniedMessageIsEPERMAndAResetAndNoneOfItArrives(t *testing.T) {
	n, client, server := outgoing(t, "enforce")

	client.refused("POST /b HTTP/1.1\r\nHost: api.test:8080\r\n\r\n")

	if got, end := server.end(); got != "" || !isReset(end) {
		t.Errorf("the peer got %q and %v", got, end)
	}
	if _, err := client.Read(io.Discard, tcpip.ReadOptions{}); !isReset(err) {
		t.Errorf("reading: %v", err)
	}
	if _, err := client.Write(bytes.NewReader([]byte(getA)), tcpip.WriteOptions{}); !isReset(err) {
		t.Errorf("writing again: %v", err)
	}
	if err := client.LastError(); !isReset(err) {
		t.Errorf("SO_ERROR: %v", err)
	}
	if got := n.reasons(); got != "http out_of_order" {
		t.Errorf("denials: %s", got)
	}
	client.Close()
}

func TestADenialBehindAPartialResultIsAReset(t *testing.T) {
	n := newNet(t, "enforce")
	n.working()
	listener := n.plain(tcp.ProtocolNumber).listen(guardtest.HostAddress + ":3306")
	defer listener.Close()
	client := n.stream().connect(guardtest.HostAddress + ":3306")
	m := guardtest.LoginPacket("shop") + guardtest.Packet(0, "\x03SELECT "+strings.Repeat("x", 3*messageMax))

	taken, err := client.Write(bytes.NewReader([]byte(m)), tcpip.WriteOptions{})

	// gVisor reports EPERM only when nothing was taken before it.
	if err != nil || taken == 0 || int(taken) == len(m) {
		t.Fatalf("%d of %d bytes and %v", taken, len(m), err)
	}
	if _, err := client.Write(bytes.NewReader([]byte("rest")), tcpip.WriteOptions{}); !isReset(err) {
		t.Errorf("the next write: %v", err)
	}
}

func TestConnectToAStrangerIsEPERMAndSendsNoPacket(t *testing.T) {
	n := newNet(t, "enforce")
	n.working()
	listener := n.plain(tcp.ProtocolNumber).listen("10.137.0.77:8080")
	defer listener.Close()
	before := n.stack.Stats().TCP.SegmentsSent.Value()

	err := n.stream().Connect(full("10.137.0.77:8080"))

	if _, denied := err.(*tcpip.ErrNotPermitted); !denied {
		t.Errorf("connect: %v", err)
	}
	if after := n.stack.Stats().TCP.SegmentsSent.Value(); after != before {
		t.Errorf("%d segments were sent", after-before)
	}
}

func TestAnotherConnectDoesNotGoElsewhere(t *testing.T) {
	_, client, _ := outgoing(t, "enforce")

	if err := client.Connect(full("10.137.0.77:9999")); err == nil {
		// The first connect after the handshake reports its success; it begins nothing.
		if remote, _ := client.GetRemoteAddress(); remote.Port != 8080 {
			t.Errorf("connected to %v", remote)
		}
	}
}

func TestWritesBeforeAConnectionHaveLinuxErrors(t *testing.T) {
	n := newNet(t, "enforce")
	to := full(peerServer)

	_, err := n.stream().Write(bytes.NewReader([]byte(getA)), tcpip.WriteOptions{To: &to}) // as with MSG_FASTOPEN

	if _, closed := err.(*tcpip.ErrClosedForSend); !closed {
		t.Errorf("writing: %v", err)
	}
}

func TestLoopbackIsFree(t *testing.T) {
	for _, to := range []string{"127.0.0.1:5000", "10.137.0.10:5000", "0.0.0.0:5000"} {
		n := newNet(t, "enforce")
		listener := n.stream().listen("0.0.0.0:5000")
		client := n.stream().connect(to)
		server := listener.accept()

		client.write("any bytes")
		server.read("any bytes")
		server.write("and back")
		client.read("and back")

		if len(n.c.Verdicts()) != 0 {
			t.Errorf("%s: verdicts %+v", to, n.c.Verdicts())
		}
	}
}

func TestWithoutAGuardOnlyLoopbackWorks(t *testing.T) {
	n := newNet(t, "")
	outside := n.plain(tcp.ProtocolNumber).listen(peerServer)
	defer outside.Close()
	if _, denied := n.stream().Connect(full(peerServer)).(*tcpip.ErrNotPermitted); !denied {
		t.Error("connect was not denied")
	}
	listener := n.stream().listen(inside)
	stranger := n.plain(tcp.ProtocolNumber)
	must(t, stranger.Bind(full(guardtest.HostAddress+":0")))
	n.turnedAway(stranger.connect(inside), listener)

	client := n.stream().connect(inside)
	server := listener.accept()
	client.write("x")
	server.read("x")
}

// turnedAway expects that accepting resets stranger's connection and yields none.
func (n *net) turnedAway(stranger, listener *peer) {
	n.t.Helper()
	n.eventually("the reset", func() bool {
		if _, _, err := listener.Accept(nil); err == nil {
			n.t.Fatal("it was accepted")
		}
		return !connected(stranger.State())
	})
}

func TestAConnectionFromAStrangerIsResetBeforeAByte(t *testing.T) {
	for _, try := range []struct{ from, to string }{{"10.137.0.77:0", inside}, {guardtest.HostAddress + ":0", "10.137.0.10:9000"}} {
		n := newNet(t, "enforce")
		listener := n.stream().listen(try.to)
		stranger := n.plain(tcp.ProtocolNumber)
		must(t, stranger.Bind(full(try.from)))
		stranger.connect(try.to)
		stranger.write(work)

		n.turnedAway(stranger, listener)

		if got := n.reasons(); got != "incoming incoming_not_declared" {
			t.Errorf("denials: %s", got)
		}
	}
}

func TestManyBytesArriveWholeThroughASlowReader(t *testing.T) {
	_, client, server := outgoing(t, "audit")
	head := "POST /b HTTP/1.1\r\nHost: api.test:8080\r\n\r\n"
	want := head + strings.Repeat("0123456789abcde\n", 1<<19)
	go func() {
		client.write(want)
		client.Close() // behind what was taken
	}()
	var got bytes.Buffer
	for end := false; !end; {
		server.until(waiter.ReadableEvents, "more", func() bool {
			_, err := server.Read(&tcpip.LimitedWriter{W: &got, N: 10000}, tcpip.ReadOptions{})
			_, empty := err.(*tcpip.ErrWouldBlock)
			end = err != nil && !empty
			return !empty
		})
	}
	if got.String() != want {
		t.Errorf("%d bytes arrived, want %d", got.Len(), len(want))
	}
}

func TestAWriteLargerThanTheQueueIsAnnouncedWhenThereIsRoom(t *testing.T) {
	_, client, server := outgoing(t, "audit")
	client.write("POST /b HTTP/1.1\r\nHost: api.test:8080\r\n\r\n")
	source := bytes.NewReader(make([]byte, 16<<20))
	written := int64(0)
	for {
		n, err := client.Write(source, tcpip.WriteOptions{})
		written += n
		if _, full := err.(*tcpip.ErrWouldBlock); full {
			break
		}
		must(t, err)
		if n == 0 {
			t.Fatal("nothing was taken, and no error given")
		}
	}
	if client.Readiness(waiter.WritableEvents) != 0 {
		t.Error("writable with a full queue")
	}
	if int64(source.Len()) != 16<<20-written {
		t.Errorf("%d bytes were read from the program, %d taken", 16<<20-source.Len(), written)
	}

	go io.Copy(io.Discard, readerOf(server))

	client.until(waiter.WritableEvents, "room", func() bool { return client.Readiness(waiter.WritableEvents) != 0 })
	if _, err := client.Write(source, tcpip.WriteOptions{}); err != nil {
		t.Errorf("writing with room: %v", err)
	}
}

// readerOf reads from p until its end.
func readerOf(p *peer) io.Reader { return &reading{p} }

type reading struct{ p *peer }

func (r *reading) Read(b []byte) (n int, err error) {
	entry, ch := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	r.p.queue.EventRegister(&entry)
	defer r.p.queue.EventUnregister(&entry)
	for {
		var got bytes.Buffer
		result, failed := r.p.Endpoint.Read(&tcpip.LimitedWriter{W: &got, N: int64(len(b))}, tcpip.ReadOptions{})
		if failed == nil {
			copy(b, got.Bytes())
			return result.Count, nil
		}
		if _, empty := failed.(*tcpip.ErrWouldBlock); !empty {
			return 0, io.EOF
		}
		<-ch
	}
}

func TestAnUnfinishedMessageDoesNotLeaveAtTheEnd(t *testing.T) {
	for name, end := range map[string]func(*peer){
		"close":    func(p *peer) { p.Close() },
		"shutdown": func(p *peer) { p.Shutdown(tcpip.ShutdownWrite) },
	} {
		n, client, server := outgoing(t, "enforce")
		client.write(getA[:20])

		end(client)

		if got, how := server.end(); got != "" || !isReset(how) {
			t.Errorf("%s: the peer got %q and %v", name, got, how)
		}
		if got := n.reasons(); got != "http malformed" {
			t.Errorf("%s: denials: %s", name, got)
		}
	}
}

func TestTheTimeOfHeldBytesIsBounded(t *testing.T) {
	n, client, server := outgoing(t, "enforce")
	client.write(getA[:20])
	stream := client.Endpoint.(*Stream)
	stream.write.Lock()
	if stream.hold == nil {
		t.Fatal("no deadline")
	}
	stream.giveUp(false) // what the deadline does
	stream.write.Unlock()

	if got, end := server.end(); got != "" || !isReset(end) {
		t.Errorf("the peer got %q and %v", got, end)
	}
	if got := n.reasons(); got != "http held_too_long" {
		t.Errorf("denials: %s", got)
	}
}

func TestAFaultInTheProgramsMemoryIsNoMessage(t *testing.T) {
	_, client, server := outgoing(t, "enforce")

	n, err := client.Write(&faulty{}, tcpip.WriteOptions{})

	if _, bad := err.(*tcpip.ErrBadBuffer); !bad || n != 0 {
		t.Errorf("%d bytes and %v", n, err)
	}
	client.write(getA)
	server.read(getA)
}

type faulty struct{}

func (*faulty) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }
func (*faulty) Len() int                 { return 10 }

// changing gives other bytes whenever it is read again, as a program does whose other thread writes to its memory.
type changing struct{ reads, left int }

func (c *changing) Read(b []byte) (int, error) {
	c.reads++
	n := copy(b, getA[len(getA)-c.left:])
	c.left -= n
	return n, nil
}
func (c *changing) Len() int { return c.left }

func TestTheProgramsMemoryIsReadOnce(t *testing.T) {
	_, client, server := outgoing(t, "enforce")
	source := &changing{left: len(getA)}

	if _, err := client.Write(source, tcpip.WriteOptions{}); err != nil || source.reads != 1 {
		t.Errorf("%v after %d reads", err, source.reads)
	}
	server.read(getA)
}

func TestAnInvokeWaitsForTheControllerAndNobodyElse(t *testing.T) {
	n, client, server := outgoing(t, "enforce")
	listener := n.plain(tcp.ProtocolNumber).listen(guardtest.HostAddress + ":3306")
	defer listener.Close()
	client.write(getA)
	server.read(getA)
	database := n.stream().connect(guardtest.HostAddress + ":3306")
	database.write(guardtest.LoginPacket("shop") + guardtest.Packet(0, "\x03SELECT a FROM items"))
	asked, answer := make(chan bool), make(chan bool)
	n.c.OnInvoke = func(m *frame.Invoke) (*frame.Answer, error) {
		close(asked)
		<-answer
		return guardtest.GrantInvoke(m)
	}
	const invoke = "POST /function/payer HTTP/1.1\r\nHost: gateway:8080\r\n"
	go client.write(invoke + "\r\n")
	<-asked

	server.quiet()
	server.write("bytes from the peer")
	client.read("bytes from the peer")
	if client.Readiness(waiter.WritableEvents) == 0 {
		t.Error("readiness waits for the judge")
	}

	close(answer)
	server.read(invoke + "X-Kalium-Token: " + guardtest.Token + "\r\n\r\n")
}

func TestBindChoosesNoInterface(t *testing.T) {
	n := newNet(t, "enforce")
	to := full("127.0.0.1:0")
	to.NIC = 1

	if _, denied := n.stream().Bind(to).(*tcpip.ErrNotPermitted); !denied {
		t.Error("an interface was chosen")
	}
}

func BenchmarkAllowedRequest(b *testing.B) {
	n := newNet(b, "enforce")
	n.working()
	listener := n.plain(tcp.ProtocolNumber).listen(guardtest.HostAddress + ":4443")
	defer listener.Close()
	client := n.stream().connect(guardtest.HostAddress + ":4443")
	server := listener.accept()
	hello := guardtest.ClientHello("images.test")
	client.write(hello)
	server.read(hello)
	record := strings.Repeat("r", 1<<10)
	b.SetBytes(1 << 10)
	b.ReportAllocs()
	for b.Loop() {
		client.write(record)
		server.read(record)
	}
}

// A thread may be about to read while another connects anew: what it looks at must be there.
func TestAReadOfAnAttemptThatFailedFindsItsConnection(t *testing.T) {
	n := newNet(t, "enforce")
	listener := n.stream().listen("127.0.0.1:7000")
	defer listener.Close()
	program := n.stream()
	defer program.Close()
	must(t, n.stack.RemoveAddress(1, address(guardtest.HostAddress)))
	n.stack.SetRouteTable(nil)
	if err := program.Connect(full(peerServer)); err == nil || denied(err) || begun(program.State()) {
		t.Fatalf("a connection without a route: %v", err)
	}
	program.connect("127.0.0.1:7000")

	_, err := program.Endpoint.(*Stream).readAnswer(io.Discard, tcpip.ReadOptions{}) // Read saw the first attempt

	if _, empty := err.(*tcpip.ErrWouldBlock); !empty {
		t.Errorf("the read: %v", err)
	}
}
