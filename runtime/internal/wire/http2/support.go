package http2

import (
	"encoding/binary"

	"kalium.dev/kalium/runtime/internal/wire"
)

// Frames that a connection has few of, however long it lives.
const (
	controlSettings = iota
	controlGoAway
	controlEmpty // DATA without content that ends nothing
	controls
)

// controlMax bounds each of them. Frames that answer the server's (PING, WINDOW_UPDATE, acknowledgements) have no natural
// number; the caller bounds their rate.
var controlMax = [controls]int{controlSettings: 1024, controlGoAway: 8, controlEmpty: 1024}

// debugMax bounds the text in a GOAWAY.
const debugMax = 128

// support reads a frame that carries no part of a request.
func (c *Client) support(h header, b []byte) (int, Unit, error) {
	u, err := c.checkHeader(h)
	if err != nil {
		return 0, Unit{}, err
	}
	if len(b) < frameHeader+h.length {
		return 0, Unit{}, wire.ErrShort
	}
	payload := b[frameHeader : frameHeader+h.length]
	if err := c.checkPayload(h, payload); err != nil {
		return 0, Unit{}, err
	}
	if h.kind == frameReset {
		delete(c.open, h.stream)
	}
	c.stage = inFrames
	return frameHeader + h.length, u, nil
}

// checkHeader says what can be said before the payload has come; the payload's length is bounded behind it.
func (c *Client) checkHeader(h header) (Unit, error) {
	u := Unit{Kind: Support}
	length, onStream := -1, false
	switch h.kind {
	case framePriority:
		// Deprecated, but the nghttp2 library sends it. It may name any stream.
		u.Text, length, onStream = "PRIORITY", 5, true
	case frameReset:
		u.Text, length, onStream = "RST_STREAM", 4, true
		if h.stream%2 == 1 {
			u = Unit{Kind: Reset, Stream: h.stream} // an even stream is one that the server has pushed
		}
	case frameSettings:
		u.Text = "SETTINGS"
		if h.has(flagAck) {
			u.Text, length = "SETTINGS ack", 0
		} else if h.length%6 != 0 || h.length > 6*len(settings) {
			return u, wire.Malformed("SETTINGS of %d bytes", h.length)
		}
	case framePing:
		u.Text, length = "PING", 8
	case frameGoAway:
		u.Text = "GOAWAY"
		if h.length < 8 || h.length > 8+debugMax {
			return u, wire.Malformed("a GOAWAY of %d bytes", h.length)
		}
	case frameWindowUpdate:
		u.Text, length, onStream = "WINDOW_UPDATE", 4, h.stream != 0
		if onStream && h.stream%2 == 1 && h.stream > c.last {
			return u, wire.Malformed("WINDOW_UPDATE on an idle stream")
		}
	}
	if length >= 0 && h.length != length {
		return u, wire.Malformed("a frame of type %#02x with %d bytes", uint8(h.kind), h.length)
	}
	if onStream != (h.stream != 0) {
		return u, wire.Malformed("a frame of type %#02x on stream %d", uint8(h.kind), h.stream)
	}
	if h.kind == frameReset && h.stream%2 == 1 && h.stream > c.last {
		return u, wire.Malformed("RST_STREAM on an idle stream")
	}
	return u, nil
}

func (c *Client) checkPayload(h header, payload []byte) error {
	switch h.kind {
	case framePriority:
		return checkPriority(h.stream, payload)
	case frameReset:
		return checkCode(payload)
	case frameSettings:
		if h.has(flagAck) {
			return nil
		}
		if err := c.count(controlSettings); err != nil {
			return err
		}
		return checkSettings(payload)
	case frameGoAway:
		if err := c.count(controlGoAway); err != nil {
			return err
		}
		// Odd streams are the client's own; those it may name are the server's.
		if last := binary.BigEndian.Uint32(payload); last%2 == 1 && last != 1<<31-1 || last >= 1<<31 {
			return wire.Malformed("a GOAWAY for stream %d", last)
		}
		for _, c := range payload[8:] {
			if c < 0x20 || c >= 0x7f {
				return wire.Malformed("byte %#02x in a GOAWAY's text", c)
			}
		}
		return checkCode(payload[4:])
	case frameWindowUpdate:
		if step := binary.BigEndian.Uint32(payload); step == 0 || step >= 1<<31 {
			return wire.Malformed("a WINDOW_UPDATE of %d", step)
		}
	}
	return nil
}

func (c *Client) count(control int) error {
	if c.control[control]++; c.control[control] > controlMax[control] {
		return wire.TooLarge("more than %d SETTINGS, GOAWAY or empty DATA on a connection", controlMax[control])
	}
	return nil
}

// checkPriority reads the fields of RFC 7540 section 6.3. Servers do not look at them any more.
func checkPriority(stream uint32, payload []byte) error {
	if binary.BigEndian.Uint32(payload)&^(1<<31) == stream {
		return wire.Malformed("a stream that depends on itself")
	}
	return nil
}

// checkCode accepts the error codes of RFC 9113 section 7.
func checkCode(payload []byte) error {
	if code := binary.BigEndian.Uint32(payload); code > 0xd {
		return wire.Malformed("error code %#x", code)
	}
	return nil
}

// settings are the ones that clients send, each with its values: RFC 9113 section 6.5.2, RFC 8441, RFC 9218, and gRPC's own.
var settings = [...]struct {
	id       uint16
	from, to uint32
}{
	{0x1, 0, 1<<32 - 1},       // HEADER_TABLE_SIZE: of the server's table
	{0x2, 0, 1},               // ENABLE_PUSH
	{0x3, 0, 1<<32 - 1},       // MAX_CONCURRENT_STREAMS
	{0x4, 0, 1<<31 - 1},       // INITIAL_WINDOW_SIZE
	{0x5, 1 << 14, 1<<24 - 1}, // MAX_FRAME_SIZE
	{0x6, 0, 1<<32 - 1},       // MAX_HEADER_LIST_SIZE
	{0x8, 0, 1},               // ENABLE_CONNECT_PROTOCOL: has no meaning from a client
	{0x9, 0, 1},               // NO_RFC7540_PRIORITIES
	{0xfe03, 0, 1},            // GRPC_ALLOW_TRUE_BINARY_METADATA
	{0xfe04, 0, 1<<31 - 1},    // GRPC_PREFERRED_RECEIVE_MESSAGE_SIZE
	{0xfe05, 0, 1},            // GRPC_ALLOW_SECURITY_FRAME: the frame itself is refused
}

func checkSettings(payload []byte) error {
	var seen [len(settings)]bool
	for ; len(payload) > 0; payload = payload[6:] {
		id, value := binary.BigEndian.Uint16(payload), binary.BigEndian.Uint32(payload[2:])
		known := false
		for i, s := range settings {
			if s.id != id {
				continue
			}
			if seen[i] {
				return wire.Malformed("setting %#x twice", id)
			}
			if value < s.from || value > s.to {
				return wire.Malformed("setting %#x with value %d", id, value)
			}
			seen[i], known = true, true
		}
		if !known {
			return wire.Unsupported("setting %#x", id)
		}
	}
	return nil
}
