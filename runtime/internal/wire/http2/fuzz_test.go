package http2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/wire"
)

// seed adds scripts, and what curl, Node and Go have sent without TLS.
func seed(f *testing.F) {
	captures, err := filepath.Glob("testdata/captures/*.bin")
	if err != nil || len(captures) == 0 {
		f.Fatal(captures, err)
	}
	for _, name := range captures {
		capture, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		if _, rest, err := read(capture, whole); rest != 0 || err != nil {
			f.Fatalf("%s: %d bytes left, %v", name, rest, err)
		}
		f.Add(capture, uint8(6))
	}
	for _, s := range []*script{
		begun().get(1).post(3, "content-length: 5").data(3, true, "hello").get(5, "te: trailers"),
		begun().inPieces(1, 3, getLines).frame(frameReset, 0, 1, u32(8)).frame(frameGoAway, 0, 0, u32(0, 0)+"bye"),
		begun().post(1).frame(frameData, flagPadded|flagEndStream, 1, "\x02ab\x00\x00").frame(framePing, 0, 0, "12345678"),
		begun().frame(frameSettings, 0, 0, setting(1, 0)+setting(4, 1<<20)).frame(frameWindowUpdate, 0, 0, u32(1<<20)).frame(framePriority, 0, 3, u32(0)+"\x0f"),
		begun().post(1, "content-type: application/grpc", "te: trailers").data(1, false, "\x00\x00\x00\x00\x00").data(1, true, ""),
	} {
		f.Add(s.Bytes(), uint8(3))
	}
}

// FuzzClient: only the declared errors come out, every cut gives the same units, and a unit that waits is bounded.
func FuzzClient(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		log, rest, err := read(data, whole)
		logPieces, restPieces, errPieces := read(data, func(int) int { return int(size) + 1 })
		if fmt.Sprint(err) != fmt.Sprint(errPieces) || err == nil && rest != restPieces {
			t.Fatalf("whole: %d left, %v; in pieces: %d left, %v", rest, err, restPieces, errPieces)
		}
		if err != nil {
			// Of the last body some may have passed before the fault.
			log, logPieces = withoutData(log), withoutData(logPieces)
		}
		if !slices.Equal(log, logPieces) {
			t.Fatalf("whole:\n%s\nin pieces:\n%s", strings.Join(log, "\n"), strings.Join(logPieces, "\n"))
		}
		if refused := new(wire.Error); err != nil && !errors.As(err, &refused) {
			t.Fatalf("error of another kind: %v", err)
		}
		if err == nil && rest >= UnitBytesMax {
			t.Fatalf("%d bytes wait for more", rest)
		}
	})
}

// FuzzServer: in the bytes that pass, Go's server sees no request that is not seen here.
func FuzzServer(f *testing.F) {
	seed(f)
	server := newSecondReader(f)
	f.Fuzz(func(t *testing.T, data []byte, _ uint8) {
		_, rest, _ := read(data, whole)
		passed := data[:len(data)-rest]
		ours := heads(passed)
		for _, request := range server.read(passed, len(ours)) {
			at := slices.Index(ours, request)
			if at < 0 {
				t.Fatalf("Go's server reads %s, this %q", request, ours)
			}
			ours = slices.Delete(ours, at, at+1)
		}
	})
}

func withoutData(log []string) []string {
	if last := len(log) - 1; last >= 0 && strings.Contains(log[last], " data ") {
		return log[:last]
	}
	return log
}

// heads sums up the requests in bytes that pass.
func heads(b []byte) (found []string) {
	client := NewClient()
	for len(b) > 0 {
		n, u, err := client.Next(b)
		if err != nil {
			panic(err)
		}
		if b = b[n:]; u.Kind == Request {
			found = append(found, summary(u.Head.Method, u.Head.Authority, u.Head.Path, u.Head.Query, 0))
		}
	}
	return found
}

// secondReader is Go's server without a network.
type secondReader struct {
	conns chan net.Conn
	close sync.Once
}

func newSecondReader(t testing.TB) *secondReader {
	s := &secondReader{conns: make(chan net.Conn)}
	server := &http.Server{
		Protocols:   unencrypted(),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, s, c) },
		Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			r.Context().Value(s).(*memory).note(summary(r.Method, r.Host, r.URL.Path, keysOf(r.URL.RawQuery), 0))
		}),
	}
	go server.Serve(s)
	t.Cleanup(func() { server.Close() })
	return s
}

// Accept, Close and Addr make a listener.
func (s *secondReader) Accept() (net.Conn, error) {
	conn, ok := <-s.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (s *secondReader) Close() error {
	s.close.Do(func() { close(s.conns) })
	return nil
}

func (s *secondReader) Addr() net.Addr { return &net.TCPAddr{} }

// read returns the requests that the server sees in b. It waits for at most expected of them.
func (s *secondReader) read(b []byte, expected int) []string {
	conn := &memory{bytes: b, closed: make(chan struct{}), noted: make(chan string, 1000)}
	s.conns <- conn
	deadline := time.After(2 * time.Millisecond)
	var found []string
	for len(found) < expected {
		select {
		case request := <-conn.noted:
			found = append(found, request)
		case <-deadline:
			expected = 0 // Go refuses more than this package
		}
	}
	conn.Close()
	for {
		select {
		case request := <-conn.noted:
			found = append(found, request)
		default:
			return found
		}
	}
}

// memory is a connection whose client has sent bytes and waits.
type memory struct {
	mu     sync.Mutex
	bytes  []byte
	once   sync.Once
	closed chan struct{}
	noted  chan string
}

func (m *memory) note(request string) {
	select {
	case m.noted <- request:
	default:
	}
}

// Read is of net.Conn, as are the methods below.
func (m *memory) Read(b []byte) (int, error) {
	m.mu.Lock()
	n := copy(b, m.bytes)
	m.bytes = m.bytes[n:]
	m.mu.Unlock()
	if n == 0 {
		<-m.closed
		return 0, io.EOF
	}
	return n, nil
}

func (m *memory) Write(b []byte) (int, error) { return len(b), nil }

func (m *memory) Close() error {
	m.once.Do(func() { close(m.closed) })
	return nil
}

func (m *memory) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (m *memory) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (m *memory) SetDeadline(time.Time) error      { return nil }
func (m *memory) SetReadDeadline(time.Time) error  { return nil }
func (m *memory) SetWriteDeadline(time.Time) error { return nil }
