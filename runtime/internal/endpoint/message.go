package endpoint

import (
	"slices"
	"sync"
)

const (
	messageMax   = 256 << 10 // bytes of a write that are taken at once; longer ones are taken in parts
	smallMessage = 4 << 10
)

var (
	small = sync.Pool{New: func() any { return new([smallMessage]byte) }}
	large = sync.Pool{New: func() any { return new([messageMax]byte) }}
)

// message is our own copy of what the program sends. Its buffer goes back to a pool, or on to the transmit queue. Without
// a buffer of a pool the bytes are lent, and are copied when they have to wait.
type message struct {
	b     []byte
	small *[smallMessage]byte
	large *[messageMax]byte
}

func newMessage(n int) message {
	if n <= smallMessage {
		p := small.Get().(*[smallMessage]byte)
		return message{b: p[:n], small: p}
	}
	p := large.Get().(*[messageMax]byte)
	return message{b: p[:n], large: p}
}

func (m *message) free() {
	if m.small != nil {
		small.Put(m.small)
	}
	if m.large != nil {
		large.Put(m.large)
	}
	*m = message{}
}

// rest moves all but the first n bytes out of m. A short rest is copied, so that it does not keep a large buffer.
func (m *message) rest(n int) message {
	if m.small != nil || m.large != nil && len(m.b)-n > messageMax/4 {
		r := *m
		r.b = m.b[n:]
		*m = message{}
		return r
	}
	return message{b: slices.Clone(m.b[n:])}
}
