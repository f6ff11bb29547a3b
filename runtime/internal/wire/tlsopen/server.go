package tlsopen

import (
	"sync"
	"sync/atomic"

	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/tlshello"
)

// Bounds of the server's side.
const (
	serverHelloMax      = 16 * 1024 // real ones have 80 to 2,000 bytes
	messageHeaderBytes  = 4
	messageHelloRequest = 0
)

// server follows the server's bytes up to its ServerHello.
type server struct {
	done atomic.Bool // nothing more is needed

	mu      sync.Mutex
	header  [headerBytes]byte // of the record; guarded by mu, like the fields below
	n       int               // bytes of header that have come
	left    int               // bytes of the record that have not
	message []byte            // that has begun, with its header
	standing
}

// standing is what the server has said so far.
type standing struct {
	hello    tlshello.Server
	answered bool // hello is the ServerHello
	retry    bool // a HelloRetryRequest came
	refused  error
}

func (s *server) now() standing {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.standing
}

func (s *server) take(b []byte) {
	if s.done.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(b) > 0 && !s.answered {
		var n int
		if n, s.refused = s.step(b); s.refused != nil {
			break
		}
		b = b[n:]
	}
	if s.answered || s.refused != nil {
		s.message = nil
		s.done.Store(true)
	}
}

func (s *server) step(b []byte) (n int, err error) {
	if s.left == 0 {
		n = copy(s.header[s.n:], b)
		if s.n += n; s.n < headerBytes {
			return n, nil
		}
		s.n = 0
		kind, length, err := recordHeader(s.header[:])
		if err != nil {
			return 0, wire.Malformed("the server's bytes are not TLS")
		}
		if kind == contentApplicationData {
			return 0, wire.Malformed("the server sends no ServerHello")
		}
		s.left = length
		return n, nil
	}
	part := b[:min(s.left, len(b))]
	if s.header[0] == contentHandshake {
		if part, err = s.handshake(part); err != nil {
			return 0, err
		}
	}
	s.left -= len(part)
	return len(part), nil
}

// handshake takes some of b, which is not empty, and returns what it took.
func (s *server) handshake(b []byte) ([]byte, error) {
	want := messageHeaderBytes
	if len(s.message) >= messageHeaderBytes {
		want += messageLength(s.message)
	}
	b = b[:min(want-len(s.message), len(b))]
	s.message = append(s.message, b...)
	if len(s.message) < messageHeaderBytes {
		return b, nil
	}
	kind, length := s.message[0], messageLength(s.message)
	switch {
	case kind == messageHelloRequest && length == 0:
		s.message = s.message[:0]
		return b, nil
	case kind != tlshello.MessageServerHello || length == 0 || length > serverHelloMax:
		return nil, wire.Malformed("the server sends no ServerHello")
	case len(s.message) < messageHeaderBytes+length:
		return b, nil
	}
	hello, err := tlshello.ParseServer(s.message[messageHeaderBytes:])
	if err != nil {
		return nil, err
	}
	if hello.Retry && s.retry {
		return nil, wire.Malformed("a second HelloRetryRequest")
	}
	s.hello, s.answered, s.retry = hello, !hello.Retry, s.retry || hello.Retry
	s.message = s.message[:0]
	return b, nil
}

func messageLength(header []byte) int {
	return int(header[1])<<16 | int(header[2])<<8 | int(header[3])
}
