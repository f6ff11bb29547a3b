package tlsopen

import (
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

// Handshake message types (RFC 8446 section 4).
const (
	messageCertificate       = 11
	messageCertificateVerify = 15
	messageClientKeyExchange = 16
	messageFinished          = 20
	messageKeyUpdate         = 24
)

// flight is the client's messages behind its hello. Their content is between the client and the server that the hello
// was judged for; their order and number are not free.
type flight struct {
	last  byte // type of the message that came last; 0: none
	n     int  // bytes of header that have come
	left  int  // bytes of the message that have not
	total int

	header [messageHeaderBytes]byte
}

// order says what may stand in a flight.
type order struct {
	follows  map[byte]string // types that may follow a type
	finished int             // bytes of a Finished
}

// flightTLS12 ends with a ChangeCipherSpec (RFC 5246 section 7.3).
var flightTLS12 = order{follows: map[byte]string{
	0:                        string([]byte{messageCertificate, messageClientKeyExchange}),
	messageCertificate:       string([]byte{messageClientKeyExchange}),
	messageClientKeyExchange: string([]byte{messageCertificateVerify}),
}}

var followsTLS13 = map[byte]string{
	0:                        string([]byte{messageCertificate, messageFinished}),
	messageCertificate:       string([]byte{messageCertificateVerify, messageFinished}),
	messageCertificateVerify: string([]byte{messageFinished}),
}

// flightTLS13 ends with a Finished as long as the hash (RFC 8446 section 4.4.4).
func flightTLS13(digest int) order { return order{follows: followsTLS13, finished: digest} }

// mayEnd tells whether a ChangeCipherSpec may follow: at once when a session is resumed, else behind a key exchange.
func (f *flight) mayEnd() bool {
	return f.n == 0 && f.left == 0 && f.last != messageCertificate
}

// take reads messages, whole or in parts. ended: a Finished came, and nothing behind it.
func (f *flight) take(b []byte, o order) (ended bool, err error) {
	if f.total += len(b); f.total > handshakeBytesMax {
		return false, wire.TooLarge("a handshake of more than %d bytes", handshakeBytesMax)
	}
	for len(b) > 0 {
		if f.left == 0 {
			n := copy(f.header[f.n:], b)
			b = b[n:]
			if f.n += n; f.n < messageHeaderBytes {
				break
			}
			f.n, f.left = 0, messageLength(f.header[:])
			kind := f.header[0]
			if strings.IndexByte(o.follows[f.last], kind) < 0 || kind == messageFinished && f.left != o.finished || f.left == 0 {
				return false, wire.Malformed("handshake message %d of %d bytes out of place", kind, f.left)
			}
			f.last = kind
		}
		n := min(f.left, len(b))
		f.left -= n
		b = b[n:]
		if f.last == messageFinished && f.left == 0 {
			if len(b) > 0 {
				return false, wire.Malformed("bytes behind a Finished in its record")
			}
			return true, nil
		}
	}
	return false, nil
}
