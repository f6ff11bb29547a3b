package guard

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
)

const (
	// terminationsMax bounds the connections of a sandbox whose TLS ends here, which hold more memory than others: two
	// pipes, two records and two buffers of a pool, at most about 400 KiB.
	terminationsMax = 512
	serverHandshake = 30 * time.Second // for the server to take part in its handshake
	closeMax        = 60 * time.Second // for what was taken before the program closed
	lingerMax       = 2 * time.Second  // and then for the server to end its side
)

// ErrReset is the end of a connection that failed.
var ErrReset = errors.New("connection reset")

// Line is the connection to the server under a termination. Its errors are those of the network, its deadlines mean
// nothing, and Close closes it behind what was written.
type Line interface {
	net.Conn
	// CloseWrite says that nothing follows what was written.
	CloseWrite()
	// Abort resets the connection. denied: the program gets nothing any more of what waits for it.
	Abort(denied bool)
}

// Termination is a connection to an https peer whose TLS ends in the guard, because the function's policy says so. The
// program speaks TLS with the guard, which shows it a certificate of the sandbox's authority; the guard speaks TLS with
// the server, whose certificate it checks; what is in between is judged as in any other connection.
//
// The guard begins with the server: it offers what the program has offered of HTTP/2 and HTTP/1.1, and then has the program
// use what the server has chosen. A server that cannot prove its name never hears of a request, in no mode.
//
// The program's side does not wait: Write of Outgoing fills one pipe, and Read empties another one.
type Termination struct {
	o       *Outgoing
	host    string
	offered []string // by ALPN
	in, out *pipe    // TLS, from and to the program
	plain   channel  // what is in it; belongs to the lock of o

	line     Line
	readable func() // there may be something to read
	writable func() // there may be room

	turn sync.Mutex // one judgement and its send at a time
	hold *time.Timer

	mu       sync.Mutex
	sent     bool // everything that the program will ever send has left, or never will
	received bool // everything that the server will ever send, or nobody waits for it
	closed   bool // by the program
	late     *time.Timer
	lingers  bool
	shut     bool // the line was closed
}

// terminate makes the guard the end of the connection's TLS, whose hello was judged. The lock is held.
func (o *Outgoing) terminate(host string, offered []string) Outcome {
	if o.g.authority.trusted() == nil {
		return o.settle("to "+host+" cannot be terminated: the agent has no tls_roots, or had none for this function when the sandbox began",
			policy.ReasonUnsupported, true)
	}
	if o.g.terminations.Add(1) > terminationsMax {
		o.g.terminations.Add(-1)
		return o.settle(fmt.Sprintf("to %s: more than %d connections whose TLS ends in the guard", host, terminationsMax), policy.ReasonRateBound, true)
	}
	e := &Termination{o: o, host: host, offered: offered, in: newPipe(), out: newPipe()}
	e.plain = channel{o: o}
	o.tls.client.Close()
	o.tls, o.ending = nil, e
	o.front.speaker = terminator{e}
	return Allowed
}

// terminator is the speaker of the program's TLS: it hands everything over.
type terminator struct{ e *Termination }

func (terminator) whole([]byte) int { return 0 }
func (terminator) holdMax() int     { return holdBytesMax }

func (t terminator) unit(data []byte, w *output) ruling {
	w.instead()
	if t.e.in.put(data, false) != nil {
		return ruling{outcome: Denied} // it has failed before, which was settled
	}
	return ruling{n: len(data), outcome: Allowed}
}

// Termination is what the connection is since its TLS ends here, and nil for others. Whoever sees it first calls Run.
func (o *Outgoing) Termination() *Termination {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ending
}

// Prepare says how to reach the server, and the program's waiters. It is called once, before everything else.
func (e *Termination) Prepare(line Line, readable, writable func()) {
	e.line, e.readable, e.writable = line, readable, writable
}

// Run serves the connection to its end.
func (e *Termination) Run() {
	defer func() {
		e.turn.Lock()
		if e.hold != nil {
			e.hold.Stop()
		}
		e.turn.Unlock()
		e.o.Close()
		e.o.g.terminations.Add(-1)
		e.ends(func() { e.sent, e.received = true, true })
	}()
	server, program := e.shakeHands()
	if program == nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() {
		e.up(program, server)
		e.ends(func() { e.sent = true })
	})
	both.Go(func() {
		e.down(server, program)
		e.ends(func() { e.received = true })
	})
	both.Wait()
}

// shakeHands makes both TLS connections, or settles why not and returns nil.
func (e *Termination) shakeHands() (server, program *tls.Conn) {
	server = tls.Client(e.line, &tls.Config{
		ServerName: e.host, RootCAs: e.o.g.authority.trusted(), NextProtos: e.offered, MinVersion: tls.VersionTLS12,
	})
	timer := time.AfterFunc(serverHandshake, e.fail)
	err := server.Handshake()
	timer.Stop()
	if err != nil {
		e.unreached(err)
		return nil, nil
	}
	chosen := server.ConnectionState().NegotiatedProtocol
	leaf, err := e.o.g.authority.leaf(e.host)
	if err != nil {
		e.deny("to "+e.host+": "+err.Error(), policy.ReasonUnsupported)
		return nil, nil
	}
	config := &tls.Config{Certificates: []tls.Certificate{*leaf}, MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true}
	if chosen != "" {
		config.NextProtos = []string{chosen}
	}
	e.begin(chosen)
	program = tls.Server(programSide{e}, config)
	timer = time.AfterFunc(HoldMax, func() { e.deny("to "+e.host+": an unfinished handshake", policy.ReasonHeldTooLong) })
	err = program.Handshake()
	timer.Stop()
	if err != nil {
		e.unaccepted(err)
		return nil, nil
	}
	return server, program
}

// begin has what the server has chosen read in the plain bytes.
func (e *Termination) begin(chosen string) {
	e.o.mu.Lock()
	defer e.o.mu.Unlock()
	if chosen == alpnHTTP2 {
		e.plain.speaker = newHTTP2Speaker(e.o)
	} else {
		e.plain.speaker = &http1Speaker{o: e.o, protocol: policy.ProtocolHTTPS}
	}
}

// isNetwork tells errors of the line or of the program's side from those of TLS.
func isNetwork(err error) bool {
	return errors.Is(err, ErrReset) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe)
}

// unreached settles that there is no TLS with the server.
func (e *Termination) unreached(err error) {
	var unproven *tls.CertificateVerificationError
	switch {
	case isNetwork(err):
		e.fail()
	case errors.As(err, &unproven):
		e.deny("to "+e.host+", which does not prove its name: "+unproven.Err.Error(), policy.ReasonUnknownPeer)
	default:
		e.deny("to "+e.host+": "+err.Error(), policy.ReasonUnsupported)
	}
}

// unaccepted settles that there is no TLS with the program. One that does not know the authority says so by an alert.
func (e *Termination) unaccepted(err error) {
	var remote *net.OpError
	text, reason := "to "+e.host+": the program says "+err.Error(), policy.ReasonUnsupported
	switch {
	case isNetwork(err):
		e.fail()
		return
	case errors.As(err, &remote) && remote.Op == "remote error" && !e.o.g.identity.Trusting:
		text += "; the policy says `tls: terminate`, and the bundle has no annotation kalium.io/tls: terminate, by which programs trust the sandbox's authority"
		reason = policy.ReasonPolicyMismatch
	}
	e.deny(text, reason)
}

// deny settles that the connection ends, in every mode, and ends it.
func (e *Termination) deny(text string, reason policy.Reason) {
	e.o.mu.Lock()
	e.o.settle(text, reason, true)
	e.o.mu.Unlock()
	e.end(true)
}

// fail ends the connection without a verdict: the network or the program's TLS has failed.
func (e *Termination) fail() { e.end(false) }

func (e *Termination) end(denied bool) {
	e.in.drop(ErrReset)
	if denied {
		e.out.drop(ErrReset)
	} else {
		e.out.finish(ErrReset)
	}
	e.mu.Lock()
	shut := e.shut
	e.mu.Unlock()
	if !shut { // what was sent may still be on its way
		e.line.Abort(denied)
	}
	e.readable()
}

// up brings what the program sends to the server, as far as it may leave.
func (e *Termination) up(program, server *tls.Conn) {
	var buffer buffer
	buffer.begin()
	defer buffer.end()
	b := buffer.b[:cap(buffer.b)]
	for {
		n, err := program.Read(b)
		if n > 0 && !e.pass(server, b[:n]) {
			return
		}
		switch {
		case err == nil:
		case errors.Is(err, ErrReset):
			return
		case isNetwork(err):
			if e.cut(server) {
				server.CloseWrite()
				e.line.CloseWrite()
			}
			return
		default:
			e.fail()
			return
		}
	}
}

// pass judges plain bytes and sends those that may leave. It says no when the connection is over.
func (e *Termination) pass(server *tls.Conn, b []byte) bool {
	e.turn.Lock()
	defer e.turn.Unlock()
	send, outcome := e.o.takePlain(b)
	return e.send(server, send, outcome)
}

// send belongs to one turn.
func (e *Termination) send(server *tls.Conn, send []byte, outcome Outcome) bool {
	var err error
	if len(send) > 0 {
		_, err = server.Write(send)
	}
	e.o.sentPlain()
	switch {
	case outcome == Denied:
		e.end(true)
		return false
	case err != nil:
		e.fail()
		return false
	}
	e.watchHeld(server)
	return true
}

// watchHeld gives the bytes that are held a deadline.
func (e *Termination) watchHeld(server *tls.Conn) {
	n, since := e.o.Held()
	switch {
	case n == 0 && e.hold != nil:
		e.hold.Stop()
		e.hold = nil
	case n > 0 && e.hold == nil:
		e.hold = time.AfterFunc(time.Until(since.Add(HoldMax)), func() { e.overdue(server) })
	case n > 0:
		e.hold.Reset(time.Until(since.Add(HoldMax)))
	}
}

// overdue judges bytes whose unit did not become whole in time.
func (e *Termination) overdue(server *tls.Conn) {
	e.turn.Lock()
	defer e.turn.Unlock()
	if n, since := e.o.Held(); n == 0 || time.Since(since) < HoldMax {
		return
	}
	send, outcome := e.o.expirePlain(false)
	e.send(server, send, outcome)
}

// cut judges what the program will not add to any more.
func (e *Termination) cut(server *tls.Conn) bool {
	e.turn.Lock()
	defer e.turn.Unlock()
	send, outcome := e.o.expirePlain(true)
	return e.send(server, send, outcome)
}

// down brings what the server says to the program.
func (e *Termination) down(server, program *tls.Conn) {
	var buffer buffer
	buffer.begin()
	defer buffer.end()
	b := buffer.b[:cap(buffer.b)]
	for {
		n, err := server.Read(b)
		if n > 0 {
			e.o.Answered(n)
			if _, err := program.Write(b[:n]); err != nil {
				return
			}
		}
		switch {
		case err == nil:
		case err == io.EOF:
			e.o.Ended()
			program.CloseWrite()
			e.out.finish(io.EOF)
			e.readable()
			return
		default:
			e.o.Ended()
			e.fail()
			return
		}
	}
}

// programSide is the program's side as crypto/tls wants it.
type programSide struct{ e *Termination }

func (c programSide) Read(b []byte) (int, error) {
	n, err := c.e.in.show(true, true, func(data []byte) int { return copy(b, data) })
	c.e.writable()
	return n, err
}

func (c programSide) Write(b []byte) (int, error) {
	if err := c.e.out.put(b, true); err != nil {
		return 0, err
	}
	c.e.readable()
	return len(b), nil
}

func (programSide) Close() error                     { return nil }
func (programSide) LocalAddr() net.Addr              { return nil }
func (programSide) RemoteAddr() net.Addr             { return nil }
func (programSide) SetDeadline(time.Time) error      { return nil }
func (programSide) SetReadDeadline(time.Time) error  { return nil }
func (programSide) SetWriteDeadline(time.Time) error { return nil }

// WriteClosed tells that CloseWrite or Close was called.
func (e *Termination) WriteClosed() bool {
	_, end := e.in.state()
	return end == io.EOF
}

// HasRoom tells whether what the program writes is taken.
func (e *Termination) HasRoom() bool { return e.in.hasRoom() }

// Failed tells that the connection is over, so that nothing is taken any more.
func (e *Termination) Failed() bool {
	_, end := e.in.state()
	return end != nil && end != io.EOF
}

// Unsent counts the bytes that the program wrote and that wait here.
func (e *Termination) Unsent() int { return e.in.size() }

// Unread counts the bytes that the program can read now. end tells that there will be no others.
func (e *Termination) Unread() (n int, end bool) {
	n, err := e.out.state()
	return n, err != nil
}

// Read gives the program what there is for it; w may take less. end is io.EOF or another error, behind the last byte.
func (e *Termination) Read(w io.Writer, peek bool) (n int, failed, end error) {
	n, end = e.out.show(false, !peek, func(data []byte) (taken int) {
		taken, failed = w.Write(data)
		return taken
	})
	return n, failed, end
}

// CloseRead is told that the program reads no more.
func (e *Termination) CloseRead() {
	e.out.finish(io.EOF)
	e.out.ignore()
	e.readable()
}

// CloseWrite is told that the program writes no more. What was taken is sent before the server hears of it.
func (e *Termination) CloseWrite() { e.in.finish(io.EOF) }

// Close is told that the program has closed the connection. What was taken is sent, within closeMax, and then the line is
// closed.
func (e *Termination) Close() {
	e.in.finish(io.EOF)
	e.out.ignore()
	e.ends(func() {
		e.closed = true
		if !e.sent {
			e.late = time.AfterFunc(closeMax, e.fail)
		}
	})
}

// ends takes a step towards the end of the line. It is closed when the program has closed its side, everything was sent,
// and the server has ended its own side or does not within lingerMax: bytes of the server that come after a close would
// make TCP forget what it still sends.
func (e *Termination) ends(step func()) {
	e.mu.Lock()
	step()
	over := e.closed && e.sent
	shut := over && e.received && !e.shut
	e.shut = e.shut || shut
	lingers := over && !e.shut && !e.lingers
	if e.sent && e.late != nil {
		e.late.Stop()
	}
	e.lingers = e.lingers || lingers
	e.mu.Unlock()
	if shut {
		e.line.Close()
	}
	if lingers {
		time.AfterFunc(lingerMax, func() { e.ends(func() { e.received = true }) })
	}
}

// Abort is told that the connection was reset from the program's side.
func (e *Termination) Abort() {
	e.in.drop(ErrReset)
	e.out.drop(ErrReset)
}
