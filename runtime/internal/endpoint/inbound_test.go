package endpoint

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

func TestTheProgramSeesARequestWhenItsStartWasGranted(t *testing.T) {
	n := newNet(t, "enforce")
	grant := make(chan bool)
	n.c.OnStart = func(m *frame.Start) (*frame.Answer, error) { <-grant; return guardtest.GrantStart(m) }
	gateway, program := n.served()
	gateway.write("POST / HTTP/1.1\r\nHost: f\r\nX-Kalium-Token: " + guardtest.Token + "\r\nContent-Length: 2\r\n\r\n{}")
	n.eventually("the question", func() bool { return len(n.c.Started()) == 1 })
	program.quiet()

	close(grant)

	program.read(work + "{}")
	program.quiet()
	program.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	gateway.read("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	if ends := n.c.Ended(); len(ends) != 1 || ends[0].Outcome != "answered" {
		t.Errorf("ends %+v", ends)
	}
}

func TestARequestInPiecesIsReleasedWhenItsHeadIsWhole(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()
	for _, c := range work[:len(work)-1] {
		gateway.write(string(c))
	}
	program.quiet()

	gateway.write(work[len(work)-1:] + "{")

	program.read(work + "{")
	program.quiet()
	gateway.write("}")
	program.read("}")
}

func TestARefusalReachesTheGatewayAndTheProgramSeesTheEnd(t *testing.T) {
	n := newNet(t, "enforce")
	n.c.OnStart = func(*frame.Start) (*frame.Answer, error) {
		return &frame.Answer{Reason: "not_an_entry"}, nil
	}
	gateway, program := n.served()
	gateway.write("POST / HTTP/1.1\r\nHost: f\r\nContent-Length: 60000\r\n\r\n" + strings.Repeat("x", 60000))

	got, how := program.end()
	if got != "" || !isEOF(how) {
		t.Errorf("the program got %q and %v", got, how)
	}
	if _, err := program.Write(bytes.NewReader([]byte("HTTP/1.1 200 OK\r\n\r\n")), tcpip.WriteOptions{}); err == nil {
		t.Error("the program could answer")
	}
	program.Close() // with the request's body unread
	answer, how := gateway.end()
	if !strings.HasPrefix(answer, "HTTP/1.1 403 ") || !strings.Contains(answer, `"error":"not_an_entry"`) || !isEOF(how) {
		t.Errorf("the gateway got %q and %v", answer, how)
	}
	gateway.Close()
}

func TestASecondRequestIsHeldUntilTheFirstIsAnswered(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.working()
	gateway.write(work + "[]")
	program.quiet()

	program.write(noContent)

	program.read(work + "[]")
	gateway.read(noContent)
	if starts := n.c.Started(); len(starts) != 2 {
		t.Errorf("%d starts", len(starts))
	}
}

func TestARequestOnAnotherConnectionWaitsItsTurn(t *testing.T) {
	n := newNet(t, "enforce")
	listener := n.stream().listen(inside)
	defer listener.Close()
	ends := func() (gateway, program *peer) {
		gateway = n.plain(tcp.ProtocolNumber)
		must(t, gateway.Bind(full(guardtest.HostAddress+":0")))
		return gateway.connect(inside), listener.accept()
	}
	gateway1, program1 := ends()
	gateway2, program2 := ends()
	gateway1.write(work + "{}")
	program1.read(work + "{}")
	gateway2.write(work + "[]")
	program2.quiet()

	program1.write(noContent)

	gateway1.read(noContent)
	program2.read(work + "[]")
}

func TestBytesThatAnswerNothingDoNotLeave(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()

	program.refused("HTTP/1.1 200 OK\r\n\r\n")

	if got, end := gateway.end(); got != "" || !isReset(end) {
		t.Errorf("the gateway got %q and %v", got, end)
	}
	if got := n.reasons(); got != "incoming no_invocation" {
		t.Errorf("denials: %s", got)
	}
}

func TestBytesBehindTheAnswerDoNotLeave(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.working()

	program.refused(noContent + "and a secret")

	if got, end := gateway.end(); got != noContent || !isEOF(end) {
		t.Errorf("the gateway got %q and %v", got, end)
	}
}

func TestALongBodyPassesBothWays(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()
	body := strings.Repeat("0123456789abcdef", 1<<16)
	head := fmt.Sprintf("POST / HTTP/1.1\r\nHost: f\r\nContent-Length: %d\r\n\r\n", len(body))
	answer := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	next := work + "{}"
	go gateway.write(head + body + next)
	program.read(head + body)
	program.quiet()

	go program.write(answer)

	gateway.read(answer)
	program.read(next)
}

func TestPeekingShowsTheSameBytesAgain(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()
	gateway.write(work + "{}")
	program.until(waiter.ReadableEvents, "the head", func() bool { return program.Readiness(waiter.ReadableEvents) != 0 })
	for range 2 {
		var got bytes.Buffer
		if _, err := program.Read(&got, tcpip.ReadOptions{Peek: true}); err != nil || got.String() != work {
			t.Fatalf("peeked %q and %v", got.String(), err)
		}
	}
	if waiting, err := program.GetSockOptInt(tcpip.ReceiveQueueSizeOption); err != nil || waiting < len(work) {
		t.Errorf("FIONREAD says %d, %v", waiting, err)
	}

	program.read(work + "{}")
}

func TestHeldBytesAreNotCountedAsReadable(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()
	gateway.write(work[:20])
	n.eventually("the bytes", func() bool {
		program.Endpoint.(*Stream).rx.mu.Lock()
		defer program.Endpoint.(*Stream).rx.mu.Unlock()
		return len(program.Endpoint.(*Stream).rx.held) == 20
	})

	if waiting, err := program.GetSockOptInt(tcpip.ReceiveQueueSizeOption); err != nil || waiting != 0 {
		t.Errorf("FIONREAD says %d, %v", waiting, err)
	}
}

func TestTheEndOfTheConnectionComesBehindTheRequests(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()
	gateway.write(work + "{}")
	must(t, gateway.Shutdown(tcpip.ShutdownWrite))

	if got, how := program.end(); got != work+"{}" || !isEOF(how) {
		t.Errorf("the program got %q and %v", got, how)
	}
	program.write(noContent) // the gateway has only ended its side
	gateway.read(noContent)
	if ends := n.c.Ended(); len(ends) != 1 || ends[0].Outcome != "answered" {
		t.Errorf("ends %+v", ends)
	}
}

func TestABodyIsReadToItsEndAfterTheProgramsOwn(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()
	head := "POST / HTTP/1.1\r\nHost: f\r\nContent-Length: 4\r\n\r\n"
	gateway.write(head + "{}")
	program.read(head + "{}")
	program.write(noContent)
	must(t, program.Shutdown(tcpip.ShutdownWrite))
	gateway.read(noContent)

	gateway.write("ab")
	must(t, gateway.Shutdown(tcpip.ShutdownWrite))

	if got, end := program.end(); got != "ab" || !isEOF(end) {
		t.Errorf("the program read %q and then %v", got, end)
	}
}

func TestAResetEndsTheInvocation(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.working()

	gateway.Abort()

	if _, how := program.end(); !isReset(how) {
		t.Errorf("the program sees %v", how)
	}
	n.eventually("the end", func() bool { return len(n.c.Ended()) == 1 })
	if ends := n.c.Ended(); ends[0].Outcome != "closed" {
		t.Errorf("ends %+v", ends)
	}
	program.Close()
}

func TestAnAnswerUntilTheEndOfTheConnectionIsWhole(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.working()
	body := strings.Repeat("x", 1<<20)

	go func() {
		program.write("HTTP/1.0 200 OK\r\n\r\n" + body)
		program.Close()
	}()

	if got, how := gateway.end(); got != "HTTP/1.0 200 OK\r\n\r\n"+body || !isEOF(how) {
		t.Errorf("%d bytes and %v", len(got), how)
	}
	n.eventually("the end", func() bool { return len(n.c.Ended()) == 1 })
	if ends := n.c.Ended(); ends[0].Outcome != "answered" {
		t.Errorf("ends %+v", ends)
	}
}

func TestAClosedConnectionLeavesNoGoroutineWaiting(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()

	program.Close()

	if _, how := gateway.end(); !isEOF(how) {
		t.Errorf("the gateway sees %v", how)
	}
	select {
	case <-program.Endpoint.(*Stream).rx.gone:
	default:
		t.Error("the keeper was not told")
	}
}

func TestAProbeIsAnsweredWithoutTheController(t *testing.T) {
	n := newNet(t, "enforce")
	n.c.OnStart = func(*frame.Start) (*frame.Answer, error) { t.Error("asked"); return nil, io.EOF }
	gateway, program := n.served()
	const probe = "GET /_/health HTTP/1.1\r\nHost: f\r\n\r\n"
	for range 3 {
		gateway.write(probe)
		program.read(probe)
		program.write("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		gateway.read("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	}
}

func TestAuditLetsAStrangerIn(t *testing.T) {
	n := newNet(t, "audit")
	listener := n.stream().listen("10.137.0.10:9000")
	stranger := n.plain(tcp.ProtocolNumber)
	must(t, stranger.Bind(full("10.137.0.77:0")))
	stranger.connect("10.137.0.10:9000")
	program := listener.accept()

	stranger.write("no http")
	program.read("no http")
	program.write("at all")
	stranger.read("at all")

	if got := n.reasons(); got != "incoming incoming_not_declared" {
		t.Errorf("would-denials: %s", got)
	}
}

// TestNoWakeUpIsLost runs requests over several connections at once, with readers and writers that wait for events only.
func TestNoWakeUpIsLost(t *testing.T) {
	n := newNet(t, "enforce")
	listener := n.stream().listen(inside)
	defer listener.Close()
	const connections, requests = 4, 50
	var all sync.WaitGroup
	for i := range connections {
		gateway := n.plain(tcp.ProtocolNumber)
		must(t, gateway.Bind(full(guardtest.HostAddress+":0")))
		gateway.connect(inside)
		program := listener.accept()
		all.Go(func() {
			for j := range requests {
				body := fmt.Sprintf("%02d%04d", i, j)
				gateway.write("POST / HTTP/1.1\r\nHost: f\r\nContent-Length: 6\r\n\r\n" + body[:3])
				gateway.write(body[3:])
				gateway.read("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n" + body)
			}
			gateway.Close()
		})
		all.Go(func() {
			for range requests {
				head := "POST / HTTP/1.1\r\nHost: f\r\nContent-Length: 6\r\n\r\n"
				program.read(head)
				var body bytes.Buffer
				program.until(waiter.ReadableEvents, "the body", func() bool {
					for body.Len() < 6 {
						if _, err := program.Read(&tcpip.LimitedWriter{W: &body, N: int64(6 - body.Len())}, tcpip.ReadOptions{}); err != nil {
							return false
						}
					}
					return true
				})
				program.write("HTTP/1.1 200 OK\r\n")
				program.write("Content-Length: 6\r\n\r\n" + body.String())
			}
			if got, how := program.end(); got != "" || !isEOF(how) {
				t.Errorf("%q and %v", got, how)
			}
			program.Close()
		})
	}
	all.Wait()
	if ends := n.c.Ended(); len(ends) != connections*requests {
		t.Errorf("%d invocations ended", len(ends))
	}
}

// A program may answer requests that it does not read: what it has not read is bounded nevertheless.
func TestRequestsThatNobodyReadsAreBounded(t *testing.T) {
	n := newNet(t, "enforce")
	gateway, program := n.served()
	request := "GET / HTTP/1.1\r\nHost: f\r\nX-Long: " + strings.Repeat("x", 15<<10) + "\r\n\r\n"
	inside := &program.Endpoint.(*Stream).rx
	unread := func() int {
		inside.mu.Lock()
		defer inside.mu.Unlock()
		return len(inside.open)
	}
	const most = pullBytes/(15<<10) + 1 // that do not reach the bound, and the one that does
	for i := range most {
		gateway.write(request)
		n.eventually("a start", func() bool { return len(n.c.Started()) == i+1 && unread() >= len(request)*(i+1) })
		program.write(noContent)
		gateway.read(noContent)
	}
	gateway.write(request)
	time.Sleep(50 * time.Millisecond)
	if got := len(n.c.Started()); got != most || unread() >= pullBytes+len(request) {
		t.Errorf("%d requests were started, %d bytes wait to be read", got, unread())
	}

	program.read(strings.Repeat(request, most+1))

	program.write(noContent)
	gateway.read(noContent)
}
