package guard

import (
	"encoding/binary"

	"kalium.dev/kalium/runtime/internal/policy"
)

// webSocketSpeaker passes the frames of a WebSocket (RFC 6455) unseen: the policy has allowed the connection. Only their
// framing is read. Whether the server has agreed to the upgrade is not seen under TLS; one that has not reads the first
// frame as a request and finds an error, since no request begins like a masked frame.
type webSocketSpeaker struct {
	o    *Outgoing
	kind string
	inv  *invocation // the connection ends with it
	left uint64      // bytes of the frame that passes
}

// Bits and opcodes of RFC 6455 section 5.2.
const (
	frameMasked       = 0x80
	frameExtended     = 0x30 // reserved; the first of the three bits belongs to compression (RFC 7692)
	frameOpcode       = 0x0f
	frameControl      = 0x08
	frameFinal        = 0x80
	opcodeBinary      = 2
	opcodePong        = 10
	frameLength16     = 126
	frameLength64     = 127
	frameLengthShort  = 125
	frameMaskBytes    = 4
	frameHeaderShort  = 2
	frameLengthBytes2 = 2
	frameLengthBytes8 = 8
)

func (*webSocketSpeaker) whole([]byte) int { return 0 }
func (*webSocketSpeaker) holdMax() int     { return holdBytesMax }

func (s *webSocketSpeaker) unit(data []byte, _ *output) ruling {
	if s.inv.over() {
		return ruling{outcome: s.o.refuse("a WebSocket beyond its invocation", policy.ReasonNoInvocation)}
	}
	n := 0
	if s.left == 0 {
		var valid bool
		if n, s.left, valid = frameHead(data); !valid {
			return ruling{outcome: s.o.refuse("bytes that are no WebSocket frame", policy.ReasonMalformed)}
		}
		if n == 0 {
			return short
		}
	}
	part := min(uint64(len(data)-n), s.left)
	s.left -= part
	return ruling{n: n + int(part), outcome: s.o.flow(s.kind, s.kind+" WebSocket")}
}

// frameHead reads the head of a frame that a client sends; n is 0 when it is not whole.
func frameHead(b []byte) (n int, length uint64, valid bool) {
	if b[0]&frameExtended != 0 || !opcodeKnown(b[0]&frameOpcode) {
		return 0, 0, false
	}
	if len(b) < frameHeaderShort {
		return 0, 0, true
	}
	control := b[0]&frameControl != 0
	length = uint64(b[1] &^ frameMasked)
	if b[1]&frameMasked == 0 || control && (length > frameLengthShort || b[0]&frameFinal == 0) {
		return 0, 0, false
	}
	n = frameHeaderShort
	switch length {
	case frameLength16:
		if len(b) < n+frameLengthBytes2 {
			return 0, 0, true
		}
		length = uint64(binary.BigEndian.Uint16(b[n:]))
		n += frameLengthBytes2
		valid = length > frameLengthShort
	case frameLength64:
		if len(b) < n+frameLengthBytes8 {
			return 0, 0, true
		}
		length = binary.BigEndian.Uint64(b[n:])
		n += frameLengthBytes8
		valid = length > 0xffff && length < 1<<63
	default:
		valid = true
	}
	if n += frameMaskBytes; len(b) < n {
		return 0, 0, valid
	}
	return n, length, valid
}

func opcodeKnown(opcode byte) bool {
	return opcode <= opcodeBinary || opcode >= frameControl && opcode <= opcodePong
}
