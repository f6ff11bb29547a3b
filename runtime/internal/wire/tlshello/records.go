package tlshello

import (
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// Record types of RFC 8446 section 5.1.
const (
	recordChangeCipherSpec = 20
	recordAlert            = 21
	recordHandshake        = 22
	recordApplicationData  = 23
)

const (
	recordHeaderBytes = 5
	recordBytesMax    = 16*1024 + 2048 // RFC 5246 section 6.2.3; TLS 1.3 allows less
	alertBytesMax     = 256
	finishedBytesMax  = 256
	sniffBytes        = 6 // of a handshake message: type, length, and two of legacy_version

	messageClientHello       = 1
	messageCertificate       = 11
	messageClientKeyExchange = 16
)

// Records follows what a client sends behind its ClientHello. It passes records and looks into none that is encrypted,
// but no further hello gets by that names another server: neither the second one of TLS 1.3, which a HelloRetryRequest
// asks for, nor one of a renegotiation.
type Records struct {
	name  string
	stage stage
	left  int // bytes of the record that passes
}

type stage uint8

// The client's handshake. A hello of TLS 1.3 and the end of a resumed session of TLS 1.2 may both follow a
// ChangeCipherSpec; which of the two the server speaks is not seen here.
const (
	helloSent     stage = iota // a second hello, a key exchange, or encrypted records may follow
	helloChanged               // and a ChangeCipherSpec
	helloRepeated              // a second hello
	exchanging                 // TLS 1.2 and before: certificate and key exchange
	finishing                  // and a ChangeCipherSpec: one encrypted handshake record follows
	protected                  // application data and alerts
)

// NewRecords begins behind first, which was judged.
func NewRecords(first *Hello) *Records { return &Records{name: first.SNI} }

// Next tells how many bytes at the front of b may pass; further ones are asked for by further calls. After an error other
// than wire.ErrShort the connection cannot be followed any more.
func (r *Records) Next(b []byte) (n int, err error) {
	if r.left > 0 {
		n = min(r.left, len(b))
		r.left -= n
		return n, nil
	}
	kind, length, err := recordHeader(b)
	if err != nil {
		return 0, err
	}
	switch kind {
	case recordChangeCipherSpec:
		if len(b) < recordHeaderBytes+1 {
			return 0, wire.ErrShort
		}
		if length != 1 || b[recordHeaderBytes] != 1 {
			return 0, wire.Malformed("a ChangeCipherSpec of other content")
		}
		switch r.stage {
		case helloSent:
			r.stage = helloChanged
		case helloRepeated:
		case exchanging:
			r.stage = finishing
		default:
			return 0, wire.Malformed("a ChangeCipherSpec out of place")
		}
	case recordAlert:
		if length > alertBytesMax {
			return 0, wire.Malformed("an alert of %d bytes", length)
		}
	case recordHandshake:
		return r.handshake(b, length)
	default: // application data, see recordHeader
		if r.stage == exchanging || r.stage == finishing {
			return 0, wire.Malformed("application data inside the handshake")
		}
		r.stage = protected
	}
	r.left = length
	return recordHeaderBytes, nil
}

func recordHeader(b []byte) (kind byte, length int, err error) {
	if len(b) > 0 && (b[0] < recordChangeCipherSpec || b[0] > recordApplicationData) {
		return 0, 0, wire.Malformed("record type %d", b[0])
	}
	if len(b) > 1 && b[1] != 3 || len(b) > 2 && (b[2] < 1 || b[2] > 3) {
		return 0, 0, wire.Malformed("a record's version")
	}
	if len(b) < recordHeaderBytes {
		return 0, 0, wire.ErrShort
	}
	length = int(b[3])<<8 | int(b[4])
	if length == 0 || length > recordBytesMax {
		return 0, 0, wire.Malformed("a record of %d bytes", length)
	}
	return b[0], length, nil
}

// handshake reads a record that is either in clear or the encrypted Finished of TLS 1.2.
func (r *Records) handshake(b []byte, length int) (n int, err error) {
	switch r.stage {
	case helloSent:
		if len(b) == recordHeaderBytes {
			return 0, wire.ErrShort
		}
		switch message := b[recordHeaderBytes]; message {
		case messageClientHello:
			return r.repeat(b)
		case messageCertificate, messageClientKeyExchange:
			r.stage = exchanging
		default:
			return 0, wire.Malformed("handshake message %d behind a ClientHello", message)
		}
	case helloChanged:
		if length < sniffBytes {
			return 0, wire.Malformed("a handshake record of %d bytes behind a ChangeCipherSpec", length)
		}
		if len(b) < recordHeaderBytes+sniffBytes {
			return 0, wire.ErrShort
		}
		// What begins as a hello has to be one. An encrypted Finished begins so by chance once in 2^28 connections.
		if start := b[recordHeaderBytes:]; start[0] == messageClientHello && start[1] <= 2 && start[4] == 3 && start[5] <= 4 {
			return r.repeat(b)
		}
		if length > finishedBytesMax {
			return 0, wire.Malformed("a handshake record of %d bytes behind a ChangeCipherSpec", length)
		}
		r.stage = protected
	case exchanging:
	case finishing:
		if length > finishedBytesMax {
			return 0, wire.Malformed("a Finished of %d bytes", length)
		}
		r.stage = protected
	case helloRepeated:
		return 0, wire.Malformed("a handshake message behind the second ClientHello")
	default:
		return 0, wire.Unsupported("a renegotiation")
	}
	r.left = length
	return recordHeaderBytes, nil
}

// repeat reads the second hello, which must be for the same server (RFC 8446 section 4.1.2).
func (r *Records) repeat(b []byte) (n int, err error) {
	second, n, err := Parse(b)
	switch {
	case err != nil:
		return 0, err
	case second.SNI != r.name:
		return 0, &wire.Error{Reason: policy.ReasonSNIMismatch, Text: "a second ClientHello for another server"}
	case second.ECH || second.EarlyData:
		return 0, wire.Unsupported("encrypted hello or early data")
	}
	r.stage = helloRepeated
	return n, nil
}
