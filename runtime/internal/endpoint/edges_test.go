package endpoint

import (
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// TestATokenGoesFromGuardToGuard has two sandboxes, and the test play the gateway between them.
func TestATokenGoesFromGuardToGuard(t *testing.T) {
	tokens := &guardtest.Tokens{}
	// buyer may invoke payer at once, and again.
	welcome := guardtest.WelcomeEdited(t, "enforce", `"edges":[[0,0,1],`, `"edges":[[0,0,1],[0,2,0],`)
	caller := newNetOf(t, "buyer", welcome, tokens.Controller("shop", "buyer"))
	callee := newNetOf(t, "payer", guardtest.Welcome(t, "enforce"), tokens.Controller("shop", "payer"))
	caller.working()
	gateway := caller.plain(tcp.ProtocolNumber).listen(peerServer)
	out := caller.stream().connect(peerServer)
	out.write("POST /function/payer HTTP/1.1\r\nHost: gateway:8080\r\nx-kalium-token: mine\r\nX-KALIUM-Token: mine\r\nContent-Length: 2\r\n\r\n{}")
	const head = "POST /function/payer HTTP/1.1\r\nHost: gateway:8080\r\nContent-Length: 2\r\nX-Kalium-Token: "
	at := gateway.accept()
	at.read(head)
	token := at.some(32)
	at.read("\r\n\r\n{}")

	listener := callee.stream().listen(inside)
	defer listener.Close()
	pass := func(said string) (toCallee, program *peer) {
		toCallee = callee.plain(tcp.ProtocolNumber)
		must(t, toCallee.Bind(full(guardtest.HostAddress+":0")))
		toCallee.connect(inside)
		program = listener.accept()
		toCallee.write("POST / HTTP/1.1\r\nHost: f\r\nX-Kalium-Token: " + said + "\r\nContent-Length: 2\r\n\r\n{}")
		return toCallee, program
	}
	toCallee, program := pass(token)
	program.read(work + "{}")
	program.write(noContent)
	toCallee.read(noContent)

	for name, said := range map[string]string{
		"replayed": token, "altered": "0" + token[1:], "another's": tokens.Issue("shop", "buyer"), "another app's": tokens.Issue("bank", "payer"),
		"twice": tokens.Issue("shop", "payer") + "\r\nX-KALIUM-TOKEN: " + token,
	} {
		toCallee, program := pass(said)
		if seen, _ := program.end(); seen != "" {
			t.Errorf("%s: the program saw %q", name, seen)
		}
		if answer, _ := toCallee.end(); !strings.HasPrefix(answer, "HTTP/1.1 403 ") || !strings.Contains(answer, `"error":"bad_token"`) {
			t.Errorf("%s: the gateway got %q", name, answer)
		}
	}
}

func TestATrailerWithATokenEndsTheRequest(t *testing.T) {
	tokens := &guardtest.Tokens{}
	n := newNetOf(t, "payer", guardtest.Welcome(t, "enforce"), tokens.Controller("shop", "payer"))
	gateway, program := n.served()
	const head = "POST / HTTP/1.1\r\nHost: f\r\nTransfer-Encoding: chunked\r\n"
	token := tokens.Issue("shop", "payer")
	gateway.write(head + "X-Kalium-Token: " + token + "\r\n\r\n2\r\n{}\r\n0\r\nX-Kalium-Token: " + token + "\r\n\r\n")

	if seen, end := program.end(); strings.Contains(seen, "Kalium") || !isReset(end) {
		t.Errorf("the program saw %q and %v", seen, end)
	}
}

func TestAnInvokeIsSentAgainWhenTheConnectionEndedWithoutAByte(t *testing.T) {
	for name, try := range map[string]struct {
		end     func(server, program *peer)
		retries string
		again   bool
	}{
		"the server resets":                  {func(server, _ *peer) { server.Abort() }, "1", true},
		"the server closes":                  {func(server, _ *peer) { server.Close() }, "1", true},
		"the policy has no retries":          {func(server, _ *peer) { server.Abort() }, "0", false},
		"the server says a byte":             {func(server, _ *peer) { server.write("H"); server.Close() }, "1", false},
		"the program ends, and hears no end": {func(_, program *peer) { program.Close() }, "1", true},
	} {
		line := `"kind":"invoke","line":3,"retries":`
		welcome := guardtest.WelcomeEdited(t, "enforce", line+"0", line+try.retries, `"edges":[[0,0,1],`, `"edges":[[0,0,1],[0,2,1],`)
		n := newNetOf(t, "buyer", welcome, guardtest.NewController())
		asked := []bool{}
		n.c.OnInvoke = func(m *frame.Invoke) (*frame.Answer, error) {
			asked = append(asked, m.Retry)
			return guardtest.GrantInvoke(m)
		}
		n.working()
		listener := n.plain(tcp.ProtocolNumber).listen(peerServer)
		const invoke = "POST /function/payer HTTP/1.1\r\nHost: gateway:8080\r\n\r\n"
		const sent = "POST /function/payer HTTP/1.1\r\nHost: gateway:8080\r\nX-Kalium-Token: " + guardtest.Token + "\r\n\r\n"
		program := n.stream().connect(peerServer)
		program.write(invoke)
		server := listener.accept()
		server.read(sent)
		try.end(server, program)
		if name != "the program ends, and hears no end" {
			program.end()
		}
		second := n.stream().connect(peerServer)

		if !try.again {
			second.refused(invoke)
			continue
		}
		second.write(invoke)
		listener.accept().read(sent)
		if len(asked) != 2 || asked[0] || !asked[1] {
			t.Errorf("%s: asked %v", name, asked)
		}
	}
}

// held is an invocation in whose answer a join waits.
func held(t *testing.T, finish func(*frame.Finish) (*frame.Answer, error)) (n *net, gateway, program *peer) {
	n = newNet(t, "enforce")
	n.c.OnStart = func(m *frame.Start) (*frame.Answer, error) {
		answer, _ := guardtest.GrantStart(m)
		answer.Hold = true
		return answer, nil
	}
	n.c.OnFinish = finish
	gateway, program = n.working()
	return n, gateway, program
}

func TestTheLastByteOfAnAwaitedAnswerWaitsForTheController(t *testing.T) {
	grant := make(chan struct{})
	asked := make(chan struct{})
	_, gateway, program := held(t, func(m *frame.Finish) (*frame.Answer, error) {
		close(asked)
		<-grant
		return guardtest.GrantFinish(m)
	})
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab"
	program.write(answer)
	gateway.read(answer)
	done := make(chan struct{})
	go func() {
		defer close(done)
		program.write("cd")
	}()
	<-asked
	gateway.quiet()

	close(grant)

	gateway.read("cd")
	<-done
}

func TestAnAwaitedAnswerThatNobodyHeardOfEndsInAReset(t *testing.T) {
	silent := func(*frame.Finish) (*frame.Answer, error) {
		return &frame.Answer{Reason: "controller_unavailable"}, nil
	}
	n, gateway, program := held(t, silent)
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc"
	program.write(answer)
	gateway.read(answer)

	program.refused("d")

	if got, end := gateway.end(); got != "" || !isReset(end) {
		t.Errorf("the gateway got %q and %v", got, end)
	}
	if got := n.reasons(); got != "incoming controller_unavailable" {
		t.Errorf("denials: %s", got)
	}
	if ends := n.c.Ended(); len(ends) != 1 || ends[0].Outcome != "closed" {
		t.Errorf("ends %+v", ends)
	}

	// Where the connection's end is that of the answer, it does not look like one.
	for name, end := range map[string]func(*peer){
		"close":    func(program *peer) { program.Close() },
		"shutdown": func(program *peer) { program.Shutdown(tcpip.ShutdownWrite) },
	} {
		_, gateway, program := held(t, silent)
		const answer = "HTTP/1.0 200 OK\r\n\r\nbody"
		program.write(answer)
		gateway.read(answer)
		end(program)
		if got, how := gateway.end(); got != "" || !isReset(how) {
			t.Errorf("%s: the gateway got %q and %v", name, got, how)
		}
	}
}
