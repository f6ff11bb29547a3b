package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// pair is two ends of a unix stream.
func pair(t *testing.T) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	dir := must(os.MkdirTemp("", "kalium"))
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	listener := must(net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/s", Net: "unix"}))
	defer listener.Close()
	client := must(net.DialUnix("unix", nil, &net.UnixAddr{Name: dir + "/s", Net: "unix"}))
	server := must(listener.AcceptUnix())
	t.Cleanup(func() { _, _ = client.Close(), server.Close() })
	return server, client
}

func TestPiecesStayWholeAndInOrderWhoeverSendsThem(t *testing.T) {
	for name, inline := range map[string]bool{"inline": true, "not inline": false} {
		server, client := pair(t)
		g := must(newGuard(server))
		g.sender.inline = inline
		if inline {
			g.sender.attempt = nil
		}
		const senders, each, size = 4, 2000, 500
		var wait sync.WaitGroup
		for sender := range senders {
			wait.Go(func() {
				piece := bytes.Repeat([]byte{byte(sender)}, size)
				for i := range each {
					binary.BigEndian.PutUint32(piece, uint32(i))
					if err := g.sender.send(piece); err != nil {
						t.Errorf("%s: %v", name, err)
						return
					}
				}
			})
		}
		next := [senders]uint32{}
		for range senders * each {
			piece := make([]byte, size)
			if _, err := io.ReadFull(client, piece); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			sender := piece[4]
			if !bytes.Equal(piece[4:], bytes.Repeat([]byte{sender}, size-4)) || binary.BigEndian.Uint32(piece) != next[sender] {
				t.Fatalf("%s: piece %d of sender %d is broken or out of order", name, next[sender], sender)
			}
			next[sender]++
		}
		wait.Wait()
	}
}

func TestAPeerThatDoesNotReadIsGivenUpAtTheBound(t *testing.T) {
	server, _ := pair(t)
	g := must(newGuard(server))
	piece := make([]byte, 1<<20)
	var err error
	sent := 0
	for err == nil && sent < 100 {
		began := time.Now()
		err = g.sender.send(piece)
		if took := time.Since(began); took > guardWriteTimeout/2 {
			t.Fatalf("sending took %v", took)
		}
		sent++
	}
	// As much may be pending again as is being written.
	if !errors.Is(err, errSlowPeer) || sent > 2*guardPendingMax/len(piece)+2 {
		t.Errorf("after %d pieces: %v", sent, err)
	}
	if err := g.sender.send([]byte("x")); !errors.Is(err, errSlowPeer) {
		t.Errorf("after it was given up: %v", err)
	}
}

// gate is a connection that takes a write when it is told to.
type gate struct {
	net.Conn
	begun  chan int // bytes of the write that waits
	finish chan error
}

func newGate() *gate { return &gate{begun: make(chan int), finish: make(chan error)} }

func (g *gate) Write(data []byte) (int, error) {
	g.begun <- len(data)
	return len(data), <-g.finish
}
func (g *gate) SetWriteDeadline(time.Time) error { return nil }
func (g *gate) Close() error                     { return nil }

func TestWhatManySendMeanwhileLeavesWithOneWrite(t *testing.T) {
	g := newGate()
	s := &sender{conn: g, inline: true, max: 1000}
	sent := make(chan error, 1)
	go func() { sent <- s.send([]byte("lone")) }()

	if n := <-g.begun; n != 4 { // nobody was waited for
		t.Errorf("the first write has %d bytes", n)
	}
	for range 10 {
		if err := s.send([]byte("many")); err != nil { // does not wait for the write that is under way
			t.Fatal(err)
		}
	}
	g.finish <- nil
	if n := <-g.begun; n != 40 {
		t.Errorf("the second write has %d bytes", n)
	}
	g.finish <- nil
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func TestWhoWritesForOthersIsRelieved(t *testing.T) {
	g := newGate()
	s := &sender{conn: g, inline: true, max: 1000}
	sent := make(chan error, 1)
	go func() { sent <- s.send([]byte("x")) }()
	for range inlineWritesMax {
		<-g.begun
		if err := s.send([]byte("x")); err != nil {
			t.Fatal(err)
		}
		g.finish <- nil
	}

	if err := <-sent; err != nil { // although there is more
		t.Error(err)
	}
	<-g.begun // by another goroutine
	g.finish <- nil
}

func TestTheEndWaitsForWhatWasSent(t *testing.T) {
	g := newGate()
	s := &sender{conn: g, inline: true, max: 1000}
	if err := s.sendAside([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	<-g.begun
	ended := make(chan struct{})
	go func() { s.finish(patience); close(ended) }()
	select {
	case <-ended:
		t.Error("ended in the middle of a write")
	case g.finish <- nil:
	}
	<-ended

	if err := s.send([]byte("x")); !errors.Is(err, errClosed) {
		t.Errorf("%v", err)
	}
	// Not for ever.
	s = &sender{conn: g, inline: true, max: 1000}
	if err := s.sendAside([]byte("x")); err != nil {
		t.Fatal(err)
	}
	<-g.begun
	s.finish(time.Millisecond)
	g.finish <- errClosed
}

func TestAWayWithoutBlockingStaysOpenAfterADeadline(t *testing.T) {
	server, client := pair(t)
	g := must(newGuard(server))
	g.sender.timeout = time.Nanosecond
	g.sender.mu.Lock()
	g.sender.writing = true
	g.sender.mu.Unlock()
	if err := g.sender.drain(0); err != nil { // sets and clears the deadline
		t.Fatal(err)
	}

	n := g.sender.attempt([]byte("x"))

	if _, err := io.ReadFull(client, make([]byte, n)); n != 1 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestAWelcomeThatDoesNotFitIsFollowedByItsNames(t *testing.T) {
	s := newSite(t)
	// The compiled policy at its bound, and names that do not fit beside it.
	var addresses []string
	for i := range addressesMax {
		addresses = append(addresses, net.IPv4(100, 100, 100, byte(100+i)).String())
	}
	text := compiled("shop", 1)
	var peers bytes.Buffer
	for i := range 250 {
		host := string(bytes.Repeat([]byte{'h'}, 200)) + string(rune('a'+i/26)) + string(rune('a'+i%26))
		s.config.Names[host] = addresses
		peers.WriteString(`,"z` + host[198:] + `":{"host":"` + host + `","port":1,"protocol":"https"}`)
	}
	text = bytes.Replace(text, []byte(`"protocol":"https"}}`), append(append([]byte(`"protocol":"https"}`), peers.Bytes()...), '}'), 1)
	text = append(text, bytes.Repeat([]byte(" "), 700*1024-len(text))...)
	s.controller.offer("shop", s.sign(text))
	s.controller.start()
	s.start()
	s.untilConnected()
	s.register("c1", "pay")

	g, welcome := s.hello("c1", "shop", "pay")

	_, m := g.receive()
	names, ok := m.(*frame.Names)
	if !welcome.OK || len(welcome.Names) != 0 || !ok || len(names.Names) != 252 {
		t.Errorf("welcome with %d names, then %T", len(welcome.Names), m)
	}
}
